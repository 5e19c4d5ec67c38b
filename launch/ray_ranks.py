"""Ranks on a Ray cluster: an actor in a placement group for each, which runs the rank as a process of its own.

Core actors rather than Ray Train: its `fit()` cannot be asked to end its workers, does not tell how each one ended, waits for
room without end, and restarts by itself, which is `launch.supervise`'s business.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from data_pipelines import engine
from data_pipelines.address import check_address
from launch.ranks import Attempt, Outcome, grace, outcome_of, said
from launch.ray_config import SETTINGS, RayRanksConfig, rank_settings
from launch.ray_host import SEE_SECONDS, RankHost, Spot, gpu_order
from videofm.config.curate import EngineConfig
from videofm.errors import Interrupted, ParallelError, TransientError
from videofm.parallel.rendezvous import FIRST_PORT, NUM_PORTS
from videofm.progress import LOG, duration

PASSED = ("VIDEOFM_", "NCCL_", "GLOO_", "TORCH_", "OMP_", "HF_", "TRANSFORMERS_", "WANDB_", "PYTHON")
"""Variables of the verb that its ranks get wherever they run, by how their names begin. All others are those of the node and
of the job."""
_NOT_PASSED = ("VIDEOFM_RENDEZVOUS", "VIDEOFM_LAUNCHER")
"""What ranks would take for their own place."""
_NOTICE_SECONDS = 30.0
"""For Ray to notice that a node is gone, once an actor of it is."""
_KNOCK_SECONDS = 10.0
"""For the head of the cluster to answer."""
_END_SECONDS = 10.0
"""For a rank to be gone that was killed."""
_POLL_SECONDS = 0.2
_LOOK_SECONDS = 1.0
"""How often a wait for actors that start looks for a request to stop."""
_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.ActorPlacementGroupRemoved,
)
"""What Ray raises where an actor, or the node that it was on, is gone."""


class RayRanks:
    """The ranks of one attempt; see `launch.ranks.Ranks`. Their actors and their room go when they have ended.

    Args:
        attempt: what they work on.
        spots: where each rank runs.
        runs: what will be the result of `RankHost.run` of each rank.
        room: to be closed at the end.
        need: what a rank takes of a node.
        settings: how ranks are placed.
    """

    def __init__(
        self,
        attempt: Attempt,
        spots: Sequence[Spot],
        runs: Sequence[Any],
        room: ExitStack,
        need: Mapping[str, float],
        settings: RayRanksConfig,
    ) -> None:
        self.spots = tuple(spots)
        self._attempt, self._room, self._need, self._settings = attempt, room, need, settings
        self._running = dict(zip(runs, range(len(runs)), strict=True))
        self._codes: dict[int, int | None] = {}
        self._states: dict[int, str] = {}
        self._ended: set[int] = set()
        self._printed = 0

    def wait(self) -> Outcome:
        """Wait for all of them; once one ended that was not done, the others have a moment left.

        A rank cannot come back where its node is gone and the other nodes have no room for it.
        """
        gone: dict[int, str] = {}
        deadline: float | None = None
        try:
            while self._running and (deadline is None or time.monotonic() < deadline):
                self._collect(_POLL_SECONDS)
                if deadline is None and not set(self._states.values()) <= {"finished", "interrupted"}:
                    deadline = time.monotonic() + grace(self._attempt, self._states.values())
            if any(code is None for code in self._codes.values()):
                gone = self._gone()
        finally:
            self.end()
        return outcome_of(self._attempt.folder, self._codes, self._ended, gone)

    def end(self) -> None:
        """Kill those that still run, and give their room back."""
        try:
            self._ended |= set(self._running.values())
            for rank in self._running.values():
                self.spots[rank].actor.kill.remote()
            deadline = time.monotonic() + _END_SECONDS
            while self._running and time.monotonic() < deadline:
                self._collect(_POLL_SECONDS)
        finally:
            self._codes |= dict.fromkeys(self._running.values())
            self._running.clear()
            self._room.close()

    def _collect(self, seconds: float) -> None:
        """Wait for the next rank to end, `seconds` at most, and see how it did; print what rank 0 printed."""
        done, _ = ray.wait(list(self._running), timeout=seconds) if self._running else ([], [])
        for reference in done:
            rank = self._running.pop(reference)
            try:
                code, wrote = ray.get(reference)
            except ray.exceptions.RayTaskError:
                raise  # ours: a rank could not be started at all
            except ray.exceptions.RayError as error:
                LOG.warning("rank %d on %s is lost: %s", rank, self.spots[rank].place, engine.first_line(error))
                code, wrote = None, False
            self._codes[rank] = code
            word = _seen(self._attempt.folder, rank, wrote)
            self._states[rank] = "silent" if word is None else word["state"]
        self._print()

    def _print(self) -> None:
        """What rank 0 printed since the last time: the verb shows it, as where ranks are local."""
        with suppress(OSError), self._attempt.output(0).open("rb") as file:
            file.seek(self._printed)
            text = file.read()
            self._printed += len(text)
            if text:
                sys.stdout.write(text.decode(errors="replace"))
                sys.stdout.flush()

    def _gone(self) -> dict[int, str]:
        """Ranks whose nodes are gone, as many as the nodes that are left have no room for."""
        lost = [rank for rank, code in self._codes.items() if code is None]
        deadline = time.monotonic() + _NOTICE_SECONDS
        while True:
            alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
            dead = [rank for rank in lost if self.spots[rank].node not in alive]
            # Ray tells of the actor first; where a rank died that was alone on a living node, time is up.
            if dead or time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        short = max(0, self._attempt.world_size - _room(ray.nodes(), self._need, self._settings))
        return {rank: self.spots[rank].place for rank in sorted(dead)[:short]}


def start(attempt: Attempt) -> RayRanks:
    """Start the ranks of `attempt` on the cluster that `VIDEOFM_RAY` names, by default that of this job or machine.

    Raises:
        ParallelError: no cluster answers, it had no room in time, or its nodes do not see the run directory.
        TransientError: a node or an actor was lost meanwhile.
        Interrupted: a stop was asked for before the ranks had begun.
        ConfigError: the address is open to everybody, or public without a token.
    """
    settings = rank_settings(os.environ)
    check_address(settings.address, os.environ, f"ranks.address (in {SETTINGS})")
    with ExitStack() as stack:
        stack.enter_context(_connected(settings.address))
        need = _need(settings, attempt.run.config["trainer"]["device"])
        group = _reserve(attempt, settings, need, stack)
        spots = _spots(attempt, group, need, settings, stack)
        _check_folders(attempt, spots)
        asked = [spots[0].actor.free_port.remote(FIRST_PORT, NUM_PORTS)]
        [port] = _answers(attempt, asked, settings.start_timeout)
        places = environments(attempt, spots, port)
        passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED) and name not in _NOT_PASSED}
        runs = [
            spot.actor.run.remote(
                attempt.command, passed | place, os.getcwd(), str(attempt.output(rank).absolute()), str(_word(attempt, rank))
            )
            for rank, (spot, place) in enumerate(zip(spots, places, strict=True))
        ]
        counts = Counter(spot.place for spot in spots)
        LOG.info("%d ranks on Ray: %s", len(spots), ", ".join(f"{number} on {place}" for place, number in counts.items()))
        return RayRanks(attempt, spots, runs, stack.pop_all(), need, settings)
    raise AssertionError("an ExitStack hides nothing")


def environments(attempt: Attempt, spots: Sequence[Spot], port: int) -> list[dict[str, str]]:
    """What tells each rank its place; the ranks of a node see all GPUs of these ranks, by which `LOCAL_RANK` counts."""
    nodes: dict[str, list[Spot]] = {}
    found = []
    for spot in spots:
        nodes.setdefault(spot.node, []).append(spot)
    for rank, spot in enumerate(spots):
        here = nodes[spot.node]
        place = attempt.environment(rank, here.index(spot), len(here))
        place |= {"MASTER_ADDR": spots[0].address, "MASTER_PORT": str(port)}
        if gpus := [gpu for other in here for gpu in other.gpus]:
            place["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        found.append(place)
    return found


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Part of the cluster at `address`.

    Raises:
        ParallelError: there is none.
    """
    with ExitStack() as stack:
        try:
            _knock(os.environ.get("RAY_ADDRESS", "") if address == "auto" else address)
            stack.enter_context(engine.cluster(EngineConfig(address=address)))
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ParallelError(
                f"no Ray cluster answers at {address}: {engine.first_line(error)}. Start one (`ray start --head` on one node, "
                "`ray start --address=HEAD:6379` on the others) with the RAY_AUTH_MODE and the token that this process has, "
                "name another one in cluster.ranks.address, or unset VIDEOFM_RANKS to train on this machine alone"
            ) from None
        yield


def _knock(address: str) -> None:
    """See that somebody listens at HOST:PORT: Ray itself asks an address where nobody does for twenty minutes.

    Raises:
        OSError: nobody does.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        return  # a cluster of this machine, whose address Ray knows
    deadline = time.monotonic() + _KNOCK_SECONDS
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS):
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)


def _need(settings: RayRanksConfig, device: str) -> dict[str, float]:
    """What a rank takes of a node."""
    gpus = settings.gpus
    if gpus is None:
        gpus = int(device != "cpu" and any(node["Resources"].get("GPU") for node in ray.nodes() if node["Alive"]))
    return {"CPU": settings.cpus, **({"GPU": float(gpus)} if gpus else {}), **settings.resources}


def _reserve(attempt: Attempt, settings: RayRanksConfig, need: Mapping[str, float], stack: ExitStack) -> PlacementGroup:
    """Room for all ranks, given back when `stack` is closed.

    Raises:
        ParallelError: there was none in time; says what is asked for and what there is.
        Interrupted: a stop was asked for.
    """
    group = placement_group([dict(need)] * attempt.world_size, strategy=settings.placement)
    stack.callback(remove_placement_group, group)
    started, told = time.monotonic(), False
    while not (group.wait(timeout_seconds=1) and _spare(settings, need, attempt.world_size) >= settings.spare_cpus):
        waited = time.monotonic() - started
        if attempt.run.stop_requested:
            raise Interrupted(f"stopped on request while {attempt.world_size} ranks waited for room on the Ray cluster")
        if waited > settings.start_timeout:
            raise ParallelError(_no_room(attempt, settings, need))
        if waited > 5.0 and not told:
            told = True
            LOG.info(
                "waiting for room on the Ray cluster, %s at most: %s", duration(settings.start_timeout), _asked(attempt, need)
            )
    return group


def _spare(settings: RayRanksConfig, need: Mapping[str, float], world_size: int) -> float:
    """CPUs of the cluster beside those of the ranks."""
    return float(ray.cluster_resources().get("CPU", 0.0)) - world_size * need["CPU"]


def _asked(attempt: Attempt, need: Mapping[str, float]) -> str:
    return f"{attempt.world_size} rank{'s' if attempt.world_size > 1 else ''} with {_listed(list(need), need)} each"


def _listed(kinds: Sequence[str], amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {amounts.get(kind, 0.0):g}" for kind in kinds)


def _no_room(attempt: Attempt, settings: RayRanksConfig, need: Mapping[str, float]) -> str:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    room = _room(nodes, need, settings)
    kinds = sorted({"CPU", "GPU", *need})
    has = [f"{node['NodeManagerAddress']} ({_listed(kinds, node['Resources'])})" for node in nodes]
    free = _listed(kinds, ray.available_resources())
    spare = f", and {settings.spare_cpus:g} CPUs are to stay free (cluster.ranks.spare_cpus)" if settings.spare_cpus else ""
    return (
        f"the Ray cluster had no room within {settings.start_timeout:g} s (cluster.ranks.start_timeout) for "
        f"{_asked(attempt, need)}, placed {settings.placement}{spare}. It has {len(nodes)} nodes: {'; '.join(has[:8])}"
        f"{f' and {len(has) - 8} more' if len(has) > 8 else ''}; empty, they hold {room} such ranks; free now, in all: {free}. "
        "Add nodes, end what uses them, ask for less a rank (cluster.ranks.cpus), or choose a smaller parallel.data_degree"
    )


def _room(nodes: Sequence[Mapping[str, Any]], need: Mapping[str, float], settings: RayRanksConfig) -> int:
    """How many ranks the living of `nodes` could hold, placed as asked for, if they were empty."""
    alive = [node for node in nodes if node["Alive"]]
    each = [_room_on(node, need) for node in alive]
    if settings.placement == "STRICT_SPREAD":
        room = sum(number > 0 for number in each)
    else:
        room = max(each, default=0) if settings.placement == "STRICT_PACK" else sum(each)
    cpus = sum(node["Resources"].get("CPU", 0.0) for node in alive)
    return max(0, min(room, int((cpus - settings.spare_cpus) / need["CPU"])))


def _room_on(node: Mapping[str, Any], need: Mapping[str, float]) -> int:
    """How many ranks `node` could hold if it were empty."""
    return int(min(node["Resources"].get(kind, 0.0) / amount for kind, amount in need.items() if amount))


def _spots(
    attempt: Attempt, group: PlacementGroup, need: Mapping[str, float], settings: RayRanksConfig, stack: ExitStack
) -> list[Spot]:
    """An actor in each bundle, by rank: neighbours share a node, since groups that talk much are made of neighbours."""
    other = {name: amount for name, amount in need.items() if name not in ("CPU", "GPU")}
    made = ray.remote(num_cpus=need["CPU"], num_gpus=need.get("GPU", 0.0), resources=other, max_restarts=0, max_concurrency=2)(
        RankHost
    )
    actors = []
    for bundle in range(attempt.world_size):
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
        actors.append(made.options(scheduling_strategy=strategy).remote())
        stack.callback(ray.kill, actors[-1])
    found = _answers(attempt, [actor.describe.remote() for actor in actors], settings.start_timeout)
    spots = [Spot(actor, *place) for actor, place in zip(actors, found, strict=True)]
    return sorted(spots, key=lambda spot: (spot.address, spot.node, [*map(gpu_order, spot.gpus)]))


def _answers(attempt: Attempt, references: Sequence[Any], seconds: float) -> list[Any]:
    """What the actors of ranks answer, for which they have `seconds`.

    Raises:
        Interrupted: a stop was asked for meanwhile.
        TransientError: one of them is lost, as with its node: another attempt finds another place.
        ParallelError: one could not start, or does not answer.
    """
    deadline, ready = time.monotonic() + seconds, 0
    try:
        while ready < len(references):
            if attempt.run.stop_requested:
                raise Interrupted(f"stopped on request while {attempt.world_size} ranks were started on the Ray cluster")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {seconds:g} s")
            done, _ = ray.wait(list(references), num_returns=len(references), timeout=_LOOK_SECONDS)
            ready = len(ray.get(done))  # one that failed is told of at once
        return list(ray.get(list(references)))
    except (ray.exceptions.RayError, TimeoutError) as error:
        told = engine.first_line(error)
        if isinstance(error, _LOST) and not getattr(error, "actor_init_failed", False):
            raise TransientError(f"a node or an actor was lost while ranks were started on the Ray cluster: {told}") from None
        raise ParallelError(
            f"an actor of a rank did not start: {told}. See that all nodes have the same Python, Ray and videofm as this one, "
            "and look at the logs of Ray on its node"
        ) from None


def _check_folders(attempt: Attempt, spots: Sequence[Spot]) -> None:
    """See that every node has the run directory and the current folder of this process.

    Raises:
        ParallelError: one has not, or has another folder of this name.
        TransientError, Interrupted: see `_answers`.
    """
    note, text = attempt.folder.absolute() / "seen.txt", secrets.token_hex(16)
    note.write_text(text, encoding="utf-8")
    folders = [os.getcwd(), str(attempt.run.path.absolute())]
    firsts = list({spot.node: spot for spot in reversed(spots)}.values())
    try:
        answers = _answers(attempt, [spot.actor.sees.remote(folders, str(note), text) for spot in firsts], 3 * SEE_SECONDS)
    finally:
        note.unlink()
    wrong = [(spot.place, missing) for spot, missing in zip(firsts, answers, strict=True) if missing]
    if wrong:
        place, missing = min(wrong)
        raise ParallelError(
            f"{place} does not see {missing} as this process does ({len(wrong)} of {len(firsts)} nodes do not). Ranks share "
            "the run directory and start in the current folder: put both on a file system that all nodes have at the same path"
        )


def _word(attempt: Attempt, rank: int) -> Path:
    return attempt.folder.absolute() / f"rank_{rank}.json"


def _seen(folder: Path, rank: int, wrote: bool) -> dict[str, Any] | None:
    """What a rank wrote about its end; a file of another node may need a moment until it is seen here."""
    deadline = time.monotonic() + SEE_SECONDS
    while (word := said(folder, rank)) is None and wrote and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return word
