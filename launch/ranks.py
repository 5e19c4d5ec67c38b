"""What every launcher shares: what the ranks of an attempt are, and how what they wrote becomes one outcome.

A launcher is a function `start(attempt: Attempt) -> Ranks`, named in `registry.LAUNCHERS`. It starts `attempt.world_size`
processes that run `attempt.command`, each with the environment by which `parallel.rendezvous` finds its place; its `wait()`
watches them, ends those that wait for one that is gone, and returns `outcome_of(...)`. It decides nothing else: why an attempt
ended is in `rank_R.json`, which each rank writes, and whether there is another one is `supervise`'s business.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from videofm import errors
from videofm.errors import Interrupted, VideofmError
from videofm.run_dir import RunDirectory, read_json

NOTICED = "CollectiveError"
"""What a rank calls its failure where another rank is the cause."""
PASSING = ("", NOTICED, "TransientError")
"""Kinds of failures that another attempt may not meet: errors that are not ours, such as those of a device or of a data worker
that was killed, a rank that left the others waiting, a store that did not answer. Any other of our errors would come again."""

_ERRORS: dict[str, type[VideofmError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, VideofmError) and kind is not Interrupted
}
"""What a rank calls its failure -> what the verb raises, so that a wrong request has its own exit code."""


@dataclass(frozen=True)
class Attempt:
    """What a launcher is asked to start."""

    run: RunDirectory
    folder: Path
    """`attempts/NNNN` of the run directory."""
    world_size: int
    """Number of ranks."""
    avoid: frozenset[str] = frozenset()
    """Places (nodes) that ranks of earlier attempts lost for good, as their launcher called them in `Outcome.gone`."""

    @property
    def number(self) -> int:
        """1 for the first attempt of a run directory."""
        return int(self.folder.name)

    @property
    def command(self) -> list[str]:
        """What each rank runs, with the interpreter of this process."""
        return [sys.executable, "-m", "videofm.train.worker", str(self.run.path), str(self.number)]

    def environment(self, rank: int, local_rank: int, local_world_size: int) -> dict[str, str]:
        """What a launcher that knows each rank's place adds to its environment: torchrun's names."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(local_world_size),
        }

    def output(self, rank: int) -> Path:
        """The file for what a rank prints; rank 0 may print where the launcher does."""
        return self.folder / f"rank_{rank}.out"


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    state: str
    """`finished`; `interrupted`: saved and stopped on request; `failed`: a rank said why; `diverged`: the ranks agreed to go
    back; `hung`: a watchdog ended them; `died`: a rank ended without a word."""
    message: str = ""
    kind: str = ""
    """Of `failed`: the name of our error, or nothing where it is not one of ours."""
    rank: int | None = None
    """Who ended the attempt, where that is one rank."""
    gone: Mapping[int, str] = field(default_factory=dict)
    """Ranks that cannot come back -> the place (node) that is gone with them, as the launcher calls it."""

    @property
    def may_restart(self) -> bool:
        """Whether another attempt could end better."""
        return self.state in ("died", "hung", "diverged") or (self.state == "failed" and self.kind in PASSING)

    def error(self, message: str | None = None) -> VideofmError:
        """The error that a verb raises for it, with `message` in place of its own where given."""
        if self.state == "interrupted":
            return Interrupted(message or self.message)
        return _ERRORS.get(self.kind, VideofmError)(message or self.message)


class Ranks(Protocol):
    """The ranks of one attempt, started."""

    def wait(self) -> Outcome:
        """Wait until all of them have ended. Where one ends that had not finished, the others are ended too, after a moment
        to say what they saw. Whatever is raised meanwhile (as KeyboardInterrupt), none is left running."""
        ...

    def end(self) -> None:
        """End those that still run, at once. May be called at any time, and again."""
        ...


Start = Callable[[Attempt], Ranks]
"""A launcher. It raises a VideofmError where it cannot start the ranks, and a TransientError where another attempt might."""


_KILLED = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""Signals that end a process for no other rank's sake. Libraries abort (SIGABRT) where another rank has left."""
_STOPPED = (
    f"was interrupted, as its exit code {Interrupted.exit_code} says, and could not write more about it: the disk of the run "
    "directory is full or fails. Its log and what it printed may say where the state is"
)
_GRACE = {"stop": 20.0, "hung": 10.0, "other": 2.0}


def grace(attempt: Attempt, states: Collection[str]) -> float:
    """Seconds that ranks have to end by themselves once one of them has ended without being done.

    To save where a stop was asked for, to write their stacks where one hangs, to say what they noticed otherwise; `states` are
    those that ranks wrote so far.
    """
    if attempt.run.stop_requested:
        return _GRACE["stop"]
    return _GRACE["hung" if "hung" in states else "other"]


def said(folder: Path, rank: int) -> dict[str, Any] | None:
    """What `rank` wrote into the attempt's `folder` about its end (`state`, `message` and, of a failure, `kind`), or None."""
    path = folder / f"rank_{rank}.json"
    return read_json(path) if path.exists() else None


def outcome_of(
    folder: Path, codes: Mapping[int, int | None], ended: Collection[int] = (), gone: Mapping[int, str] | None = None
) -> Outcome:
    """One outcome from what the ranks wrote and how they ended.

    A rank that was killed or whose place is gone comes first: what others say then, is of that. Then one that said why it
    failed, one that just died (as one that a library aborts where another left it), one that hung, and those who only noticed.
    What a launcher ended itself is no cause.

    Args:
        folder: `attempts/NNNN`, with `rank_R.json` of each rank that could write it.
        codes: exit code of each rank, negative for a signal, None where the launcher was not told.
        ended: ranks that the launcher ended.
        gone: ranks that cannot come back -> the place that is gone with them.
    """
    gone = dict(gone or {})
    words = {rank: said(folder, rank) for rank in sorted(codes)}
    by_state: dict[str, list[int]] = {}
    for rank, word in words.items():
        if word is not None or rank not in ended:
            by_state.setdefault(_state(word, codes[rank], rank in gone), []).append(rank)
    for state in ("killed", "failed", "diverged", "silent", "hung", "noticed", "interrupted"):
        if not (ranks := by_state.get(state)):
            continue
        rank = next((rank for rank in ranks if words[rank] is not None), ranks[0]) if state == "interrupted" else ranks[0]
        word = words[rank]
        if word is None and state == "interrupted":
            return Outcome(state, f"rank {rank} {_STOPPED}", rank=rank, gone=gone)
        if word is None:
            others = [*by_state.get("noticed", []), *by_state.get("failed", [])]
            more = f"; rank {others[0]} says: {(words[others[0]] or {})['message']}" if others else ""
            return Outcome("died", _died({rank: codes[rank] for rank in ranks}, gone) + more, rank=ranks[0], gone=gone)
        message = word["message"] if state in ("interrupted", "diverged") else _told(folder, rank, word, len(words))
        return Outcome("failed" if state == "noticed" else state, message, word.get("kind", ""), rank, gone)
    if any(word is None for word in words.values()):
        return Outcome("died", "the ranks were ended before they were done", gone=gone)
    return Outcome("finished")


def _state(word: Mapping[str, Any] | None, code: int | None, gone: bool) -> str:
    """The state that a rank wrote, or `noticed` where its failure is that of another; without a word `killed` where nothing
    that another rank does has that effect, `interrupted` where its code says so (the disk did not take the word), else
    `silent`."""
    if word is None and not gone and code == Interrupted.exit_code:
        return "interrupted"
    if word is None:
        return "killed" if gone or (code is not None and -code in _KILLED) else "silent"
    return "noticed" if word["state"] == "failed" and word.get("kind") == NOTICED else str(word["state"])


def _died(codes: Mapping[int, int | None], gone: Mapping[int, str]) -> str:
    """What is told of ranks that left no word: of the first whose end is known."""
    rank = next((rank for rank, code in codes.items() if code is not None), next(iter(codes)))
    code = codes[rank]
    if code is None:
        how = "ended without a word"
    else:
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with code {code}"
    return f"rank {rank} {how}" + (f" on {gone[rank]}, which is gone" if rank in gone else "")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _told(folder: Path, rank: int, word: Mapping[str, Any], num_ranks: int) -> str:
    """The message of a rank, with who it is, and where its traceback lies."""
    where = f" (rank {rank})" if num_ranks > 1 else ""
    traceback = folder / f"rank_{rank}_traceback.txt"
    return f"{word['message']}{where}" + (f"; traceback in {traceback}" if traceback.exists() else "")
