"""Moments of a save at which files change: a test counts them, and has the process die, or the disk fail, at each in turn."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from videofm.checkpoint.content import Content, replicated
from videofm.checkpoint.keep import KeepRules
from videofm.checkpoint.peers import Peers
from videofm.checkpoint.record import Facts, committed, verify
from videofm.checkpoint.resume import newest_whole
from videofm.checkpoint.save import read_tensors
from videofm.checkpoint.saver import Saver

ALL = KeepRules(9)
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
_active: Boundaries | None = None
_hooked = False


class Killed(BaseException):
    """Stands for the death of a process: nothing catches it."""


class Boundaries:
    """Counts, in the thread that writes checkpoints, what opens a file to write, flushes, makes, renames or removes.

    Attributes:
        seen: the moments so far, as the operation and the name of what it is about.
    """

    def __init__(self, number: int = 0, act: Callable[[], None] | None = None) -> None:
        """`act` is called just before the `number`-th moment, from 1."""
        self.seen: list[str] = []
        self._number, self._act = number, act

    @property
    def fired(self) -> bool:
        """Whether the chosen moment came."""
        return len(self.seen) >= self._number > 0

    def comes(self, what: str) -> None:
        """One more moment."""
        self.seen.append(what)
        if len(self.seen) == self._number and self._act is not None:
            self._act()


@contextmanager
def watched(boundaries: Boundaries) -> Iterator[Boundaries]:
    """Inside, the moments of the thread `videofm-checkpoint` go to `boundaries`. Nothing is really flushed: a process dies
    here, not the machine, and a thousand flushes take minutes on a busy disk."""
    global _active, _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # for good: it cannot be taken away
        _hooked = True

    def counted(descriptor: int) -> None:
        if _is_writer():
            boundaries.comes(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    _active = boundaries
    try:
        with mock.patch.object(os, "fsync", counted):
            yield boundaries
    finally:
        _active = None


def _is_writer() -> bool:
    return threading.current_thread().name == "videofm-checkpoint"


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _active is None or not _is_writer():
        return
    if event in _CHANGES:
        _active.comes(f"{event.removeprefix('os.')} {Path(arguments[0]).name}")
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        _active.comes(f"open {Path(arguments[0]).name}")


def tensors_of(step: int) -> dict[str, dict[str, Tensor]]:
    """What a state of `step` holds, every number of it another one than at any other step."""
    base = torch.arange(15.0).reshape(3, 5) + 100 * step
    return {
        "models/dit/model": {"weight": base.t(), "bias": base[0] + 0.5, "table": base.to(torch.bfloat16)},
        "ema/dit/model": {"weight": base.t() + 0.25, "bias": base[0] + 0.75, "table": base + 0.125},
        "optimizer/train": {"num_steps": torch.tensor(step), "exp_avg.weight": -base.double()},
    }


def content_of(step: int) -> Content:
    """The same for a save; one rank or several, which all hold it."""
    stored = [replicated(file, name, value) for file, own in tensors_of(step).items() for name, value in own.items()]
    return Content(stored, {"state": {"step": step}, "models/dit/model": {"name": "test"}})


def save(checkpoints: Path, step: int, peers: Peers | None = None, rules: KeepRules = ALL) -> Path | None:
    """Save the state of `step` through a `Saver`, to the end."""
    saver = Saver(checkpoints, rules, peers)
    saver.copy(Facts(step, metrics={"loss": 1.0 / step}), content_of(step))
    saver.write()
    return saver.wait()


def whole_step(checkpoints: Path, peers: Peers | None = None) -> int:
    """The step of the checkpoint that a run would go on from, every file and number of which is that of this step."""
    folder = newest_whole([checkpoints], peers)
    assert folder is not None
    record = verify(folder)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert there == {*record.files, "COMMITTED.json"}, folder
    for file, expected in tensors_of(record.facts.step).items():
        found = read_tensors(folder, file)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())
    return record.facts.step


def visible(checkpoints: Path) -> list[str]:
    """Names of complete checkpoints; there are no half ones under such a name."""
    names = sorted(path.name for path in checkpoints.glob("step_*"))
    assert names == [folder.name for folder in committed(checkpoints)]
    return names
