"""A rank that does not go on: who notices, what is written down, and how the attempt ends.

Every rank has a `Heartbeat`, which the loop moves on, and a `Watchdog`, a thread that looks at it. When nothing was heard for
too long the thread writes the stacks of all threads, and makes the folder `hung/` in the attempt's folder, at which those of
the other ranks do the same. Then every rank that could do so knows of every other where it stood, and they end together:

```
attempts/NNNN/rank_R_stacks.txt     why, the step and its samples, and every Python stack
attempts/NNNN/hung/rank_R.json      what the others read: where the rank stood, and the collective that it waited in
attempts/NNNN/rank_R.json           state `hung`, with a message that names who did not go on
```
A process that is stopped, or stuck in a library that holds Python's lock, writes nothing, and is named for that: whoever
launched the ranks ends it. Of one that is stuck with the lock, faulthandler's own thread still writes the stacks.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from videofm.config.faults import FaultsConfig
from videofm.files import look_into
from videofm.parallel.collectives import under_way, waits_in
from videofm.progress import LOG
from videofm.run_dir import read_json, write_json

ANSWER_SECONDS = 3.0
"""Longest time between the first rank that hangs and the end of all: for the others to write down where they stand."""

_MOST_TOLD = 8
Item = TypeVar("Item")


class Heartbeat:
    """What a rank does. Whatever takes its time calls `beat`; who looks from another thread sees whether it goes on.

    Attributes:
        beats: how often something was done.
        doing: what was begun last.
        step: optimizer steps that are done; None before the first one of this attempt.
        sample_ids: of the step that was begun last, a list a micro-batch.
    """

    def __init__(self) -> None:
        self.beats, self.doing = 0, "start"
        self.step: int | None = None
        self.sample_ids: Sequence[Sequence[str]] = ()

    def beat(self, doing: str | None = None) -> None:
        """Something was done; `doing` begins now, unless what was begun goes on."""
        self.beats += 1
        self.doing = doing or self.doing

    def over(self, items: Iterable[Item], doing: str) -> Iterator[Item]:
        """`items`, with a beat before each."""
        for item in items:
            self.beat(doing)
            yield item


class Watchdog:
    """Watches the `Heartbeat` of this process while entered, from the thread that enters."""

    def __init__(self, config: FaultsConfig, folder: Path, rank: int, world_size: int) -> None:
        """
        Args:
            config: the section `faults`.
            folder: `attempts/NNNN`.
            rank: of this process.
            world_size: number of ranks.
        """
        self.heartbeat = Heartbeat()
        self._config, self._folder, self._rank, self._world_size = config, folder, rank, world_size
        self._poll = min(1.0, config.hang_timeout / 10, config.startup_timeout / 10)
        self._done, self._ending = threading.Event(), threading.Lock()
        self._main = threading.get_ident()

    def __enter__(self) -> Watchdog:
        self._main = threading.get_ident()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = self._file("stacks.txt").open("a", encoding="utf-8")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching. Where it was too late, this waits for the end of the process."""
        self._done.set()
        with self._ending:
            faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        self._stacks.close()
        if self._file("stacks.txt").stat().st_size == 0:
            self._file("stacks.txt").unlink()

    def _watch(self) -> None:
        quiet, seen, last = 0.0, -1, time.monotonic()
        while not self._done.wait(self._poll):
            now = time.monotonic()
            # Time in which this process was stopped as a whole (suspended by a scheduler, then continued) is no hang.
            quiet, last = quiet + min(now - last, 2 * self._poll), now
            if self.heartbeat.beats != seen:
                quiet, seen = 0.0, self.heartbeat.beats
            starting = self.heartbeat.step is None
            limit = self._config.startup_timeout if starting else self._config.hang_timeout
            if quiet >= limit:
                name = "startup_timeout" if starting else "hang_timeout"
                self._end(f"no sign of life for {quiet:.1f} s, and faults.{name} is {limit:g} s")
            elif self._another_hangs():
                self._end(f"another rank hangs; {quiet:.1f} s since the last sign of life of this one")
            else:
                # In case this thread never comes here again: a C thread that needs nothing of Python.
                faulthandler.dump_traceback_later(limit - quiet + 2 * self._poll + 1, file=self._stacks)

    def _another_hangs(self) -> bool:
        look_into(self._folder)  # this name was absent at every look before
        try:
            return (self._folder / "hung").exists()
        except OSError:  # a file system that does not answer
            return False

    def _end(self, why: str) -> None:
        """Write down where this rank stands, learn where the others do, and end the process."""
        with self._ending:
            if self._done.is_set():
                return
            faulthandler.cancel_dump_traceback_later()
            try:
                here = where(self._main)
                self._dump(why, here)
                write_json(self._folder / "hung" / f"rank_{self._rank}.json", here)
                message = verdict(self._answers(), self._world_size, self.heartbeat.step, why)
                LOG.error("%s; stacks in %s", message, self._folder)
                write_json(self._file("").with_suffix(".json"), {"state": "hung", "message": message, "kind": ""})
            finally:
                os._exit(1)  # whatever the disk says to all that

    def _dump(self, why: str, here: Mapping[str, str | None]) -> None:
        heart = self.heartbeat
        lines = [
            f"rank {self._rank} of {self._world_size} on {socket.gethostname()}, process {os.getpid()}: {why}",
            f"steps done: {'none in this attempt' if heart.step is None else heart.step}; last begun: {heart.doing}",
            f"main thread: {describe(here)}",
            *(f"samples of micro-batch {index}: {', '.join(ids)}" for index, ids in enumerate(heart.sample_ids)),
        ]
        self._stacks.write("\n".join(lines) + "\n\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)
        os.fsync(self._stacks.fileno())

    def _answers(self) -> dict[int, Any]:
        """Where each rank stands that says so; waits for them."""
        deadline, found, folder = time.monotonic() + ANSWER_SECONDS, dict[int, Any](), self._folder / "hung"
        while len(found) < self._world_size and time.monotonic() < deadline:
            there = set(os.listdir(folder))  # no name is asked for before it is there: NFS remembers what was absent
            for rank in set(range(self._world_size)) - set(found):
                if (name := f"rank_{rank}.json") in there:
                    found[rank] = read_json(folder / name)
            time.sleep(0.05)
        return found

    def _file(self, suffix: str) -> Path:
        return self._folder / "_".join(filter(None, [f"rank_{self._rank}", suffix]))


def where(thread: int, frames: Callable[[], Mapping[int, FrameType]] = sys._current_frames) -> dict[str, str | None]:
    """Where a thread stands: `place` (its innermost Python function), `doing` and the collective that it `waits` in."""
    frame = frames().get(thread)
    place = None
    if frame is not None:
        code = frame.f_code
        place = f"{code.co_qualname} ({code.co_filename}:{frame.f_lineno})"
    return {"place": place, "doing": under_way(thread), "waits": waits_in(frame)}


def describe(here: Mapping[str, str | None]) -> str:
    """What `where` found, in words."""
    doing = f", in the {here['doing']}" if here["doing"] else ""
    return f"waits in {here['waits']}{doing}" if here["waits"] else f"is in {here['place']}{doing}"


def verdict(answers: Mapping[int, Mapping[str, str | None]], world_size: int, step: int | None, why: str) -> str:
    """Who did not go on, by where each rank stands: who says nothing, else who waits for nobody, else each one's place."""
    silent = [rank for rank in range(world_size) if rank not in answers]
    busy = [rank for rank in sorted(answers) if not answers[rank]["waits"]]
    if silent:
        told = f"{_listed(silent)} did not answer: stopped, gone, or stuck outside of Python"
    elif busy and (world_size == 1 or len(busy) < world_size):
        told = "; ".join(f"rank {rank} {describe(answers[rank])}" for rank in busy[:_MOST_TOLD])
        told += ", and the others wait" if world_size > 1 else ""
    else:
        told = "; ".join(f"rank {rank} {describe(answers[rank])}" for rank in sorted(answers)[:_MOST_TOLD])
    after = "before the first step" if step is None else f"after step {step}"
    return f"hung {after}: {told} ({why})"


def _listed(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - _MOST_TOLD} more" if len(ranks) > _MOST_TOLD else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_MOST_TOLD]))}{more}"
