"""Which checkpoints stay."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from videofm.checkpoint import keep
from videofm.checkpoint.keep import Best, KeepRules
from videofm.checkpoint.record import COMMITTED, Facts, Record, committed, step_folder


def write(checkpoints: Path, step: int, healthy: bool = True, **metrics: float | None) -> Path:
    """A checkpoint without files, which its marker says to have none."""
    folder = step_folder(checkpoints, step)
    folder.mkdir(parents=True)
    (folder / COMMITTED).write_text(json.dumps(Record(Facts(step, healthy, metrics=metrics), "now", {}).to_json()))
    return folder


def steps(checkpoints: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in committed(checkpoints)]


def test_the_last_the_round_and_the_best_stay(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 2.0, 6: None, 7: 9.0}
    for step, loss in losses.items():
        write(tmp_path, step, loss=loss)
    for rules, expected in (
        (KeepRules(9), [1, 2, 3, 4, 5, 6, 7]),
        (KeepRules(2), [6, 7]),
        (KeepRules(1, every=3), [3, 6, 7]),
        (KeepRules(1, best=Best("loss", "min")), [2, 7]),
        (KeepRules(3, best=Best("loss", "max")), [5, 6, 7]),
        (KeepRules(1, every=4, best=Best("loss")), [2, 4, 7]),
        (KeepRules(1, best=Best("accuracy")), [7]),
    ):
        deleted = keep.to_delete(tmp_path, rules)
        assert [step for step in losses if step_folder(tmp_path, step) not in deleted] == expected, rules
    assert keep.prune(tmp_path, KeepRules(1, every=3, best=Best("loss"))) == [step_folder(tmp_path, n) for n in (1, 4, 5)]
    assert steps(tmp_path) == [2, 3, 6, 7] and len(list(tmp_path.iterdir())) == 4


def test_of_equals_the_newest_is_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, loss=1.0 if step < 3 else 2.0)
    keep.prune(tmp_path, KeepRules(1, best=Best("loss")))
    assert steps(tmp_path) == [2, 3]


def test_the_newest_whole_and_the_newest_healthy_stay(tmp_path: Path) -> None:
    """Whatever the rules, for every pattern of health and damage of five checkpoints: what a run goes on from, and what a
    rollback goes to, are there afterwards; and nothing stays beyond the last one and those two."""
    draws = random.Random(0)
    for number in range(60):
        root = tmp_path / str(number)
        healthy = {step: draws.random() < 0.5 for step in range(1, 6)}
        whole = {step: draws.random() < 0.6 for step in range(1, 6)}
        for step in healthy:
            write(root, step, healthy[step])
        keep.prune(root, KeepRules(1), lambda folder, whole=whole: whole[int(folder.name[5:])])  # type: ignore[misc]
        newest = [max((step for step in whole if whole[step]), default=None)]
        newest.append(max((step for step in whole if whole[step] and healthy[step]), default=None))
        assert steps(root) == sorted({5, *(step for step in newest if step is not None)})


def test_a_marker_that_cannot_be_read_keeps_nothing_but_by_age(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    for step in (1, 3):
        (step_folder(tmp_path, step) / COMMITTED).write_text("{")
    keep.prune(tmp_path, KeepRules(1, every=1))
    assert steps(tmp_path) == [2, 3]


def test_leftovers_are_swept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1)
    for name in (".step_00000002.tmp", ".step_00000001.trash", ".notes", "step_00000003"):
        (tmp_path / name).mkdir()
    caplog.set_level("INFO", "videofm")
    assert [path.name for path in keep.sweep(tmp_path)] == [".step_00000001.trash", ".step_00000002.tmp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes", "step_00000001", "step_00000003"]
    assert keep.sweep(tmp_path / "missing") == []


def test_what_is_newer_than_the_one_just_written_was_refused(tmp_path: Path) -> None:
    """Steps 6 and 8 have a changed byte, which sizes do not tell: the run went on from 2 and has written 4. These two count."""
    for step in (1, 2, 4, 6, 8):
        write(tmp_path, step, loss=1.0 / step)
    newest = step_folder(tmp_path, 4)
    for rules in (KeepRules(2), KeepRules(2, best=Best("loss"))):
        assert keep.to_delete(tmp_path, rules, newest=newest) == [step_folder(tmp_path, 1)]
    assert keep.prune(tmp_path, KeepRules(1), newest=newest) == [step_folder(tmp_path, number) for number in (1, 2)]
    assert steps(tmp_path) == [4, 6, 8]
    write(tmp_path, 10)
    keep.prune(tmp_path, KeepRules(1), newest=step_folder(tmp_path, 10))
    assert steps(tmp_path) == [10], "once training is past them they are as any other"
