"""Ranks inside of a Slurm allocation (`VIDEOFM_RANKS=slurm`): one step of srun, a task a rank.

A batch script of `videofm launch --on slurm` sets `VIDEOFM_SRUN` (more options) and `VIDEOFM_CONTAINER` (what stands before the
worker); in a shell of `salloc` neither is needed. Ranks find each other by what Slurm tells a task (`parallel.rendezvous`): the
address is that of the first node, the port follows from the job and the attempt.

srun is told not to end the others when a rank fails: they have a moment to say what they saw, and a rank that saved and stopped
(75) is no failure. This file ends them. Where this process itself dies, srun gets SIGTERM and ends its step: ranks that went on
would be in the way of the next attempt.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.ranks import Attempt, Outcome, grace, outcome_of, said
from videofm.errors import ConfigError, Interrupted, ParallelError
from videofm.parallel.hostlist import expand_counts, expand_hosts

OPTIONS, CONTAINER = "VIDEOFM_SRUN", "VIDEOFM_CONTAINER"
"""Environment variables of the batch script; words, quoted as for a shell."""

_POLL_SECONDS = 0.1
_END_SECONDS = 60.0
"""How long srun may take to end its step before it is killed itself."""
_SEE_SECONDS = 70.0
"""How long what a rank wrote may be hidden: NFS remembers for up to a minute which files a folder has."""
_STEP_SECONDS = 600
"""How long srun may wait for the nodes of its step, as those that still clean up after the step before."""
_ENDED = re.compile(r"^srun: error: \S+: tasks? ([\d,-]+): (.+)$", re.MULTILINE)
_NODE_FAILED = re.compile(r"^srun: error: Node failure on (\S+)", re.MULTILINE)
_WAITS, _BEGAN = "step creation", "Step created"
"""What srun says while its step cannot begin, and once it could after all."""
_EXIT_CODE = re.compile(r"Exited with exit code (\d+)")
_SIGNALS = {text: number for number in signal.valid_signals() if (text := signal.strsignal(number))}
_MAY_HAVE_SAID = (None, 0, 1, Interrupted.exit_code)
"""Exit codes, as far as they are known, of ranks that wrote how they ended."""
_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "VIDEOFM_RENDEZVOUS", "VIDEOFM_LAUNCHER")
"""What ranks would take for their place: theirs is what Slurm says."""

_GUARD = """\
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("srun is not started: the process that wants ranks has died")
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""What becomes srun, with SIGTERM for the day that its parent dies. A program of its own: what runs between fork and exec may
lock up where there are threads. Linux takes the end of the thread that started it for that of the parent: here the main one."""


@dataclass(frozen=True)
class Allocation:
    """The nodes that this process may use, without those to avoid."""

    job: str
    hosts: tuple[str, ...]
    ranks_per_node: int

    @classmethod
    def of(cls, environment: Mapping[str, str], avoid: Collection[str] = ()) -> Allocation:
        """What Slurm says in the environment of a batch script or of a shell of `salloc`.

        Raises:
            ConfigError: this is no allocation of Slurm.
        """
        job, nodes = environment.get("SLURM_JOB_ID"), environment.get("SLURM_JOB_NODELIST")
        if not job or not nodes:
            raise ConfigError(
                "VIDEOFM_RANKS is slurm, but this process is not in an allocation (SLURM_JOB_ID is not set): launch with "
                "`videofm launch --on slurm`, run inside of `salloc`, or unset VIDEOFM_RANKS for ranks on this machine"
            )
        hosts = tuple(host for host in expand_hosts(nodes) if host not in avoid)
        said = environment.get("SLURM_NTASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or "1"
        return cls(job, hosts, expand_counts(said)[0])

    def nodes_for(self, world_size: int) -> tuple[str, ...]:
        """The nodes that `world_size` ranks fill, the first one first.

        Raises:
            ParallelError: there are not enough, or the ranks do not fill them evenly.
        """
        needed = math.ceil(world_size / self.ranks_per_node)
        if needed > len(self.hosts):
            raise ParallelError(
                f"{world_size} ranks need {needed} nodes of {self.ranks_per_node} tasks, and job {self.job} has "
                f"{len(self.hosts)} left ({', '.join(self.hosts) or 'none'}); ask for more nodes, or choose "
                "parallel.data_degree, context_degree and tensor_degree whose product is at most "
                f"{len(self.hosts) * self.ranks_per_node}"
            )
        if needed > 1 and world_size % self.ranks_per_node:
            raise ParallelError(
                f"{world_size} ranks do not fill nodes of {self.ranks_per_node} tasks evenly; choose degrees whose product is "
                f"a multiple of {self.ranks_per_node}"
            )
        return self.hosts[:needed]


class SrunRanks:
    """The ranks of one attempt, a step of the job; see `launch.ranks.Ranks`."""

    def __init__(self, attempt: Attempt, hosts: tuple[str, ...], process: subprocess.Popen[bytes]) -> None:
        self._attempt, self._hosts, self._process = attempt, hosts, process
        self._codes: dict[int, int | None] = {}
        self._ended: set[int] = set()

    def wait(self) -> Outcome:
        """Wait for the step; once a rank ended that was not done, the others have a moment left."""
        try:
            while self._process.poll() is None and self._all_well():
                if self._attempt.run.stop_requested and self._waits_for_step():
                    return Outcome("interrupted", "stopped on request before a rank began")
                time.sleep(_POLL_SECONDS)
            self._wait_for_rest()
        finally:
            self.end()
        ranks = range(self._attempt.world_size)
        self._wait_for_words()
        silent = not self._codes and not self._ended and not any(said(self._attempt.folder, rank) for rank in ranks)
        if silent and self._process.returncode:
            return Outcome("died", f"srun ended with code {self._process.returncode} and started no rank: {self._last_words()}")
        return outcome_of(self._attempt.folder, {rank: self._codes.get(rank) for rank in ranks}, self._ended, self._gone())

    def end(self) -> None:
        """Have srun kill its step, if it has not ended."""
        running = self._process.poll() is None
        self._collect()
        if not running:
            return
        self._ended |= set(range(self._attempt.world_size)) - set(self._codes) - set(self._gone())
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _all_well(self) -> bool:
        self._collect()
        return all(state in ("finished", "interrupted") for state in self._states()) and not self._failed_nodes()

    def _states(self) -> Iterator[str]:
        """What ranks that ended, and those that said that they will, said."""
        for rank in range(self._attempt.world_size):
            word = said(self._attempt.folder, rank)
            if word is not None:
                yield word["state"]
            elif self._codes.get(rank, 0) not in (0, None):
                yield "interrupted" if self._codes[rank] == Interrupted.exit_code else "silent"

    def _wait_for_rest(self) -> None:
        started = time.monotonic()
        while self._process.poll() is None and time.monotonic() < started + grace(self._attempt, list(self._states())):
            time.sleep(_POLL_SECONDS)
            self._collect()

    def _wait_for_words(self) -> None:
        """Until what each rank wrote about its end is seen here, where it can be that it wrote something."""
        ranks = range(self._attempt.world_size)
        if self._process.returncode and not any(said(self._attempt.folder, rank) for rank in ranks):
            return
        without = (*self._ended, *self._gone())
        told = [rank for rank in ranks if rank not in without and self._codes.get(rank) in _MAY_HAVE_SAID]
        deadline = time.monotonic() + _SEE_SECONDS
        while any(said(self._attempt.folder, rank) is None for rank in told) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            os.listdir(self._attempt.folder)  # has NFS ask its server again

    def _waits_for_step(self) -> bool:
        """Whether the step has not begun: srun says so, but only after a while; until then, no rank has left a file."""
        log = self._log()
        if _BEGAN in log:
            return False
        return _WAITS in log or not any(name.startswith("rank_") for name in os.listdir(self._attempt.folder))

    def _collect(self) -> None:
        """Read how tasks ended from what srun wrote, until the rest is ended by us: then it says nothing about causes."""
        if not self._ended:
            for tasks, how in _ENDED.findall(self._log()):
                for rank in _expand(tasks):
                    self._codes.setdefault(rank, _code(how))

    def _log(self) -> str:
        return log_path(self._attempt).read_text(encoding="utf-8", errors="replace")

    def _last_words(self) -> str:
        return " / ".join(self._log().strip().splitlines()[-3:]) or "it said nothing"

    def _failed_nodes(self) -> list[str]:
        return [name for name in _NODE_FAILED.findall(self._log()) if name in self._hosts]

    def _gone(self) -> dict[int, str]:
        """Ranks on nodes that failed, where the job outlives its nodes (`sbatch --no-kill`)."""
        failed, per_node = self._failed_nodes(), math.ceil(self._attempt.world_size / len(self._hosts))
        places = {rank: self._hosts[rank // per_node] for rank in range(self._attempt.world_size)}
        return {rank: host for rank, host in places.items() if host in failed}


def log_path(attempt: Attempt) -> Path:
    """What srun itself says, beside what the ranks print."""
    return attempt.folder / "srun.log"


def start(attempt: Attempt) -> SrunRanks:
    """Start the ranks of `attempt` as a step of the allocation that this process is in.

    Raises:
        ConfigError: it is in none.
        ParallelError: the allocation has too few nodes.
    """
    allocation = Allocation.of(os.environ, attempt.avoid)
    hosts = allocation.nodes_for(attempt.world_size)
    environment = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
    environment.setdefault("MASTER_ADDR", address_of(hosts[0]))
    command = srun_command(attempt, hosts, allocation.ranks_per_node, os.environ)
    guarded = [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid()), *command]
    with log_path(attempt).open("wb") as log:
        process = subprocess.Popen(guarded, env=environment, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True)
    return SrunRanks(attempt, hosts, process)


def srun_command(attempt: Attempt, hosts: tuple[str, ...], ranks_per_node: int, environment: Mapping[str, str]) -> list[str]:
    """The srun that starts the ranks of `attempt` on `hosts`."""
    container = shlex.split(environment.get(CONTAINER, ""))
    worker = attempt.command if not container else [*container, *attempt.command[1:]]
    output = str((attempt.folder / "rank_").absolute()).replace("%", "%%")
    return [
        "srun",
        f"--job-name=attempt-{attempt.number}",
        f"--nodes={len(hosts)}",
        f"--nodelist={','.join(hosts)}",
        f"--ntasks={attempt.world_size}",
        f"--ntasks-per-node={min(ranks_per_node, attempt.world_size)}",
        "--distribution=block",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--input=none",
        f"--immediate={_STEP_SECONDS}",
        "--export=ALL",
        f"--output={output}%t.out",
        "--open-mode=append",
        *shlex.split(environment.get(OPTIONS, "")),
        *worker,
    ]


def address_of(node: str) -> str:
    """Where other nodes reach `node`: its address as Slurm knows it, or its name."""
    answer = subprocess.run(["scontrol", "show", "node", node, "--oneliner"], capture_output=True, text=True, check=False)
    found = re.search(r"\bNodeAddr=(\S+)", answer.stdout)
    return found[1] if found else node


def _expand(tasks: str) -> Iterator[int]:
    """`0-2,5` is 0, 1, 2, 5."""
    for part in tasks.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _code(how: str) -> int | None:
    """The exit code that srun tells in words; negative for a signal; None where it is not known."""
    if code := _EXIT_CODE.match(how):
        return int(code[1])
    number = _SIGNALS.get(how.removesuffix(" (core dumped)"))
    return -number if number is not None else None
