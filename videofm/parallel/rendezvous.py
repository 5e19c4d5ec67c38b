"""Where this process stands among the ranks of a run, and how they find each other.

`find_place` reads the environment, in this order:

1. ours: `VIDEOFM_RENDEZVOUS`, a file that the ranks of one local launch share, beside `RANK` and `WORLD_SIZE`;
2. torchrun's: `RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` (Ray and MPI wrappers set them too);
3. Slurm's: the variables of a task that `srun` started; the first node of its step hosts the meeting;
4. none of these: one process.

`meet` brings the ranks together: each leaves its name in a store, rank 0 sees who came and tells all. A rank that never comes
is named. The keys of an attempt have a prefix of their own: a store that outlives an attempt (torchrun's agent hosts one) still
has the addresses of its dead ranks. There they agree on `ranks_per_node`, too: a rank of torchrun or Ray is told the number of
its own node, and nodes may differ.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from videofm.errors import ParallelError, TransientError
from videofm.parallel.collectives import CollectiveError
from videofm.parallel.hostlist import expand_counts, expand_hosts

FIRST_PORT, NUM_PORTS = 20000, 10000
"""Ports for meetings under Slurm: 20000 to 29999, below the ephemeral ones (Linux: from 32768), from which the kernel takes
any for outgoing connections, and above those of common services."""
PORTS_OF_A_JOB = 16
"""Ports that the attempts of a job take in turn, so that a new attempt does not wait for the port of a dead one. Jobs whose
numbers differ by less than NUM_PORTS / PORTS_OF_A_JOB = 625 share none."""

_SLACK = 10.0
"""Seconds by which others wait longer than rank 0, whose word names all that are missing."""


@dataclass(frozen=True)
class Place:
    """A process among the ranks of a run.

    Attributes:
        rank: number of this process, from 0.
        world_size: number of ranks.
        local_rank: number of this process on its node, from 0.
        local_world_size: ranks of this node; None where that is not known.
        address, port: of the TCP store; empty and 0 where there is none.
        store: `alone`: one process; `file`: a file; `rank`: a TCP store that rank 0 hosts; `agent`: one that torchrun's hosts.
        file: of the store `file`.
        attempt: what tells this meeting from those before it in the same store.
        ranks_per_node: the largest number of neighbouring ranks of which every block lies on one node, as far as this process
            is told (`agreed_ranks_per_node` is that of the run); None: not known.
        hosts: node of each rank; empty where that is not known.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int | None = None
    address: str = ""
    port: int = 0
    store: Literal["alone", "file", "rank", "agent"] = "alone"
    file: Path | None = None
    attempt: str = "0"
    ranks_per_node: int | None = None
    hosts: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """What libraries ask for (DeepSpeed, torch), whoever started this process."""
        local = self.local_world_size
        found = {"RANK": self.rank, "WORLD_SIZE": self.world_size, "LOCAL_RANK": self.local_rank}
        return {name: str(value) for name, value in {**found, **({} if local is None else {"LOCAL_WORLD_SIZE": local})}.items()}

    def where(self, rank: int) -> str:
        """`rank 3 (on n2)`, or `rank 3` where hosts are not known."""
        return f"rank {rank} (on {self.hosts[rank]})" if self.hosts else f"rank {rank}"


def find_place(environment: Mapping[str, str] | None = None, attempt: int = 0, file: Path | None = None) -> Place:
    """The place that the environment gives this process; see the head of this file for the order.

    Args:
        environment: of the process; its own unless given.
        attempt: number of the attempt, the same on all ranks.
        file: a file in place of that of `VIDEOFM_RENDEZVOUS`.

    Raises:
        ParallelError: the environment contradicts itself, or leaves out what ranks need to find each other.
    """
    held = os.environ if environment is None else environment
    if file is None and held.get("VIDEOFM_RENDEZVOUS"):
        file = Path(held["VIDEOFM_RENDEZVOUS"])
    if file is not None or "WORLD_SIZE" in held or "RANK" in held:
        return _of_launcher(held, attempt, file)
    # Batch scripts and `salloc` shells have SLURM_PROCID 0 and the tasks of the whole job; only a task of srun has a step.
    if "SLURM_PROCID" in held and "SLURM_NTASKS" in held and ("SLURM_STEP_ID" in held or "SLURM_STEPID" in held):
        return _of_slurm(held, attempt)
    return Place(attempt=str(attempt))


def slurm_port(job: int, attempt: int) -> int:
    """The port at which the ranks of a Slurm job meet; see `FIRST_PORT` and `PORTS_OF_A_JOB`."""
    return FIRST_PORT + (job * PORTS_OF_A_JOB + attempt % PORTS_OF_A_JOB) % NUM_PORTS


def meet(place: Place, timeout: float) -> dist.Store:
    """Wait until all ranks are there.

    Args:
        place: of this process.
        timeout: seconds to wait for the others.

    Returns:
        A store for `init_process_group`, with the prefix of the attempt.

    Raises:
        CollectiveError: ranks did not come; they are named.
        TransientError: another program has the port.
        ParallelError: the address or the port cannot be used.
    """
    deadline = time.monotonic() + timeout
    store = _open(place, deadline)
    if place.store == "alone":
        return store
    store = dist.PrefixStore(f"attempt-{place.attempt}", store)
    own = {"host": socket.gethostname(), "pid": os.getpid(), "ranks_per_node": place.ranks_per_node}
    store.set(f"here/{place.rank}", json.dumps(own))
    try:
        problem = _see_who_came(store, place, deadline) if place.rank == 0 else _hear_who_came(store, place, deadline)
    except RuntimeError as error:
        raise CollectiveError(
            f"{_through(place)} went away while rank {place.rank} waited for the others; {place.where(0)} or the launcher "
            "ended. Look at its log, and run the same command again."
        ) from error
    if problem:
        raise CollectiveError(problem)
    store.set_timeout(timedelta(seconds=timeout))
    return store


def agreed_ranks_per_node(store: dist.Store, place: Place) -> int | None:
    """`Place.ranks_per_node` as it holds for the whole run, the same on all ranks: nodes may have different numbers of them.

    Args:
        store: as `meet` returned it.
        place: of this process.
    """
    if place.store == "alone":
        return place.ranks_per_node
    agreed: int | None = json.loads(store.get("ranks_per_node"))
    return agreed


# -- where a process stands


def _of_launcher(held: Mapping[str, str], attempt: int, file: Path | None) -> Place:
    """Of our own launcher or of torchrun: both count ranks in the same words."""
    if "RANK" not in held and "WORLD_SIZE" not in held:
        return Place(store="file", file=file, attempt=str(attempt))
    rank, world_size = _number(held, "RANK"), _number(held, "WORLD_SIZE")
    if not 0 <= rank < world_size:
        raise ParallelError(f"RANK {rank} must be from 0 to WORLD_SIZE - 1 = {world_size - 1}; start ranks with one launcher.")
    local = _number(held, "LOCAL_WORLD_SIZE") if held.get("LOCAL_WORLD_SIZE") else None
    # torchrun starts the same command again: its count tells one meeting from the next.
    restart = held.get("TORCHELASTIC_RESTART_COUNT")
    place = Place(
        rank=rank,
        world_size=world_size,
        local_rank=_number(held, "LOCAL_RANK") if held.get("LOCAL_RANK") else 0,
        local_world_size=local,
        attempt=f"{attempt}.{restart}" if restart else str(attempt),
        ranks_per_node=local,
    )
    if file is not None:
        return _changed(place, store="file", file=file)
    if world_size == 1:
        return place
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not held.get(name)]
    if missing:
        raise ParallelError(
            f"WORLD_SIZE is {world_size}, but {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set, so ranks "
            "cannot find each other. Start them with `videofm train`, torchrun or srun, or set the address and a free port of "
            "the node of rank 0 on all ranks."
        )
    hosted = held.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _changed(
        place, store="agent" if hosted else "rank", address=held["MASTER_ADDR"], port=_number(held, "MASTER_PORT", 65535)
    )


def _of_slurm(held: Mapping[str, str], attempt: int) -> Place:
    """Of a task that srun started. A step may use fewer tasks and nodes than its job: its own variables come first."""
    rank, local_rank = _number(held, "SLURM_PROCID"), _number(held, "SLURM_LOCALID") if held.get("SLURM_LOCALID") else 0
    world_size = _number(held, _first(held, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))
    if world_size == 1:
        return Place(attempt=str(attempt), local_world_size=1, ranks_per_node=1)
    nodes = _first(held, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    names = expand_hosts(held[nodes]) if held.get(nodes) else []
    counts = _tasks_of_nodes(held, world_size, len(names))
    if counts:
        _check_blocks(held, rank, local_rank, counts)
    if not names and not held.get("MASTER_ADDR"):
        raise ParallelError(
            "this is a task of Slurm, but SLURM_JOB_NODELIST is not set, so ranks cannot find the first node; set MASTER_ADDR."
        )
    if not held.get("MASTER_PORT") and not held.get("SLURM_JOB_ID"):
        raise ParallelError(
            "this is a task of Slurm, but SLURM_JOB_ID, of which the port is made, is not set; set MASTER_PORT."
        )
    node = _node_of(rank, counts)
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=counts[node] if counts else None,
        address=held.get("MASTER_ADDR") or names[0],
        port=_number(held, "MASTER_PORT", 65535)
        if held.get("MASTER_PORT")
        else slurm_port(_number(held, "SLURM_JOB_ID"), attempt),
        store="rank",
        # A program of another job at the same port must not be taken for one of ours.
        attempt=f"{held.get('SLURM_JOB_ID', 'job')}.{attempt}",
        ranks_per_node=math.gcd(*counts) if counts else None,
        hosts=tuple(name for name, count in zip(names, counts, strict=True) for _ in range(count)) if counts and names else (),
    )


def _tasks_of_nodes(held: Mapping[str, str], world_size: int, num_nodes: int) -> list[int]:
    """Ranks of each node; empty where Slurm does not say, or says it of the job and not of this step."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        if not held.get(name):
            continue
        counts = expand_counts(held[name])
        if name == "SLURM_NTASKS_PER_NODE":
            counts *= num_nodes
        if sum(counts) == world_size and num_nodes in (0, len(counts)):
            return counts
    return []


def _check_blocks(held: Mapping[str, str], rank: int, local_rank: int, counts: Sequence[int]) -> None:
    """Neighbouring ranks share a node: groups that talk much are made of neighbours, and rank 0 is on the first node."""
    node = _number(held, "SLURM_NODEID") if held.get("SLURM_NODEID") else _node_of(rank, counts)
    if node >= len(counts) or rank != sum(counts[:node]) + local_rank:
        raise ParallelError(
            f"task {rank} is number {local_rank} of node {node}, whose nodes have {', '.join(map(str, counts))} tasks: ranks "
            "are dealt out in turn. Neighbouring ranks must share a node: start them with srun --distribution=block."
        )


def _node_of(rank: int, counts: Sequence[int]) -> int:
    for node, count in enumerate(counts):
        if rank < count:
            return node
        rank -= count
    return 0


def _first(held: Mapping[str, str], *names: str) -> str:
    """The first of these variables that is set; the last one where none is."""
    return next((name for name in names if held.get(name)), names[-1])


def _number(held: Mapping[str, str], name: str, most: int | None = None) -> int:
    text = held.get(name, "")
    if not text.isdecimal() or (most is not None and not 0 < int(text) <= most):
        rule = "a whole number" if most is None else f"from 1 to {most}"
        raise ParallelError(
            f"{name} is {text!r} and must be {rule}. Launchers set it: start ranks with `videofm train`, torchrun or srun, or "
            "unset RANK and WORLD_SIZE for one process."
        )
    return int(text)


def _changed(place: Place, **values: object) -> Place:
    return Place(**{**vars(place), **values})


# -- how they meet


def _open(place: Place, deadline: float) -> dist.Store:
    if place.store == "alone":
        return dist.HashStore()
    if place.store == "file":
        return dist.FileStore(str(place.file), place.world_size)
    hosts = place.store == "rank" and place.rank == 0
    if not hosts:
        _wait_for_host(place, deadline)
    remaining = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    try:
        return dist.TCPStore(place.address, place.port, None, hosts, remaining, wait_for_workers=False)
    except RuntimeError as error:
        if not hosts:
            raise CollectiveError(
                f"{_through(place)} does not answer as a store does: {first_line(error)}. {_OTHER_PORT}"
            ) from error
        # Another attempt meets at another port, unless MASTER_PORT says which.
        kind = TransientError if "EADDRINUSE" in str(error) else ParallelError
        raise kind(f"rank 0 cannot host {_through(place)}: {first_line(error)}. {_OTHER_PORT}") from error


_OTHER_PORT = "If another program has the port, set MASTER_PORT to a free one, the same on all ranks, or end that program."


def _wait_for_host(place: Place, deadline: float) -> None:
    """Until someone listens: torch tries too, and writes a page of C++ for each time that nobody does."""
    delay, reason = 0.05, "nobody listens there"
    while True:
        try:
            with socket.create_connection((place.address, place.port), timeout=max(1.0, deadline - time.monotonic())):
                return
        except socket.gaierror as error:
            if error.errno == socket.EAI_NONAME:
                raise ParallelError(
                    f"rank {place.rank} on {socket.gethostname()} cannot find the address of {place.address!r}, where rank 0 "
                    "is; set MASTER_ADDR to a name or address of its node that all nodes know."
                ) from error
            reason = str(error)
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() + delay > deadline:
            raise CollectiveError(
                f"rank {place.rank} on {socket.gethostname()} reached nobody at {place.address}:{place.port}: {reason}. "
                f"{place.where(0)} did not come, or the network lets nothing through to its port; look at its log, or set "
                "MASTER_PORT to a port that is open between nodes."
            )
        time.sleep(delay)
        delay = min(2 * delay, 1.0)


def _see_who_came(store: dist.Store, place: Place, deadline: float) -> str:
    """Rank 0 waits for all, and says what is wrong, if anything is."""
    started = time.monotonic()
    if _wait(store, keys := [f"here/{rank}" for rank in range(place.world_size)], deadline):
        told = [json.loads(text)["ranks_per_node"] for text in store.multi_get(keys)]
        store.set("ranks_per_node", json.dumps(None if None in told else math.gcd(*told)))
        store.set("verdict", "all")
        return ""
    problem = _who_is_missing(store, place, time.monotonic() - started)
    store.set("verdict", problem)
    came = [rank for rank in range(1, place.world_size) if store.check([f"here/{rank}"])]
    # They read it from a store that ends with this process.
    _wait(store, [f"told/{rank}" for rank in came], time.monotonic() + 5.0)
    return problem


def _hear_who_came(store: dist.Store, place: Place, deadline: float) -> str:
    """The others listen to rank 0, and look for themselves where it says nothing."""
    started = time.monotonic()
    if not _wait(store, ["verdict"], deadline + _SLACK):
        return _who_is_missing(store, place, time.monotonic() - started)
    verdict = store.get("verdict").decode()
    if verdict == "all":
        return ""
    with suppress(RuntimeError):
        store.set(f"told/{place.rank}", "")
    return verdict


def _wait(store: dist.Store, keys: Sequence[str], deadline: float) -> bool:
    """Whether the keys were set in time."""
    if not keys:
        return True
    try:
        store.wait(list(keys), timedelta(seconds=max(0.1, deadline - time.monotonic())))
    except RuntimeError:
        return store.check(list(keys))  # raises where the store is gone
    return True


def _who_is_missing(store: dist.Store, place: Place, seconds: float) -> str:
    came = [rank for rank in range(place.world_size) if store.check([f"here/{rank}"])]
    missing = [rank for rank in range(place.world_size) if rank not in came]
    hosts = {json.loads(store.get(f"here/{rank}"))["host"] for rank in came}
    return (
        f"{_listed(map(place.where, missing))} of {place.world_size} did not come within {seconds:.0f} s; {len(came)} came, "
        f"from {_listed(sorted(hosts))}. They died while they started, or were never started: look at their logs, or raise "
        "parallel.timeout if they are only slow."
    )


def _listed(names: Iterable[str], most: int = 16) -> str:
    found = list(names)
    more = f", ... {len(found)} in all" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def _through(place: Place) -> str:
    return f"the file {place.file}" if place.store == "file" else f"the store at {place.address}:{place.port}"


def first_line(error: BaseException) -> str:
    """The first line of an error, without the stack of C++ behind it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
