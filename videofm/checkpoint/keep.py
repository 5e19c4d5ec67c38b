"""Which checkpoints stay: the last ones, those of round steps, the best; and always one to go on from. No torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from videofm.checkpoint.record import Facts, committed, is_whole, read_record, verify
from videofm.errors import CheckpointError
from videofm.progress import LOG

_TMP, _TRASH = ".tmp", ".trash"


@dataclass(frozen=True)
class Best:
    """The checkpoint whose metric is the smallest or the largest is the best; of several, the newest."""

    metric: str
    mode: Literal["min", "max"] = "min"


@dataclass(frozen=True)
class KeepRules:
    """What stays, besides the newest checkpoint that is whole and the newest of those that is healthy, which always do.

    Attributes:
        last: how many of the newest.
        every: those of steps that this divides; None: none for its step.
        best: the best by a metric; None: none as such.
    """

    last: int
    every: int | None = None
    best: Best | None = None


def to_delete(
    checkpoints: Path, rules: KeepRules, whole: Callable[[Path], bool] = is_whole, newest: Path | None = None
) -> list[Path]:
    """The folders that no rule keeps, oldest first.

    Args:
        checkpoints: the folder of the checkpoints.
        rules: what stays.
        whole: whether a checkpoint is whole; the default looks at sizes, not at hashes.
        newest: the one that was just written. What is newer was refused when the run went on: it neither counts as one of the
            last nor as one to go on from, and is left as it is until training comes past its step.
    """
    folders = [folder for folder in committed(checkpoints) if newest is None or folder.name <= newest.name]
    facts = {folder: found for folder in folders if (found := _facts(folder)) is not None}
    kept = {*folders[-rules.last :], *_to_go_on_from(folders, facts, whole)}
    if rules.every is not None:
        kept |= {folder for folder, found in facts.items() if found.step % rules.every == 0}
    if rules.best is not None and (best := best_of(facts, rules.best)) is not None:
        kept.add(best)
    return [folder for folder in folders if folder not in kept]


def best_of(facts: Mapping[Path, Facts], best: Best) -> Path | None:
    """The checkpoint with the best value of the metric, or None where none has a value."""
    sign = 1 if best.mode == "max" else -1
    values = {
        folder: (sign * value, found.step)
        for folder, found in facts.items()
        if (value := found.metrics.get(best.metric)) is not None
    }
    return max(values, key=lambda folder: values[folder], default=None)


def prune(
    checkpoints: Path, rules: KeepRules, whole: Callable[[Path], bool] = is_whole, newest: Path | None = None
) -> list[Path]:
    """Delete what no rule keeps (see `to_delete`); returns these folders. Each is renamed first, so that none is ever seen half
    deleted."""
    folders = to_delete(checkpoints, rules, whole, newest)
    for renamed in [trash(folder) for folder in folders]:
        shutil.rmtree(renamed)
    return folders


def check_newest_kept(checkpoints: Path, folders: Sequence[Path]) -> None:
    """Hash the newest checkpoint that stays when `folders` go, of those that names and sizes tell to be whole.

    Raises:
        CheckpointError: it is damaged, so that one of `folders` may be what the run needs.
    """
    left = [folder for folder in committed(checkpoints) if folder not in folders and is_whole(folder)]
    if not folders or not left:
        return
    try:
        verify(left[-1])
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. It is the newest that would stay, so nothing is deleted: the run may need an older one. Bring its files "
            f"back from a copy or delete {left[-1]}, then prune again"
        ) from None


def trash(folder: Path) -> Path:
    """Rename a checkpoint so that no reader sees it; returns its new name."""
    renamed = folder.with_name(f".{folder.name}{_TRASH}")
    shutil.rmtree(renamed, ignore_errors=True)
    os.replace(folder, renamed)
    return renamed


def sweep(checkpoints: Path) -> list[Path]:
    """Delete what killed saves and killed deletions left; returns these folders. Only before a save begins."""
    found = sorted(path for path in checkpoints.glob(".step_*") if path.suffix in (_TMP, _TRASH))
    for path in found:
        LOG.info("removing %s, which a process left that ended early", path.name)
        shutil.rmtree(path, ignore_errors=True)
    return found


def _to_go_on_from(folders: Sequence[Path], facts: Mapping[Path, Facts], whole: Callable[[Path], bool]) -> set[Path]:
    """The newest whole checkpoint and the newest whole one that is healthy."""
    found: set[Path] = set()
    for folder in reversed(folders):
        if folder in facts and (not found or facts[folder].healthy) and whole(folder):
            found.add(folder)
            if facts[folder].healthy:
                break
    return found


def _facts(folder: Path) -> Facts | None:
    try:
        return read_record(folder).facts
    except CheckpointError:
        return None  # damaged: no rule but its age can keep it
