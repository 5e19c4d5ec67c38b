"""What the main rank writes about its time: the first step, and how long it waited for callbacks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from videofm.data.plan import PlanState
from videofm.run_dir import RunDirectory, read_jsonl
from videofm.train import callbacks, timeline
from videofm.train.timeline import FirstStep, timed


class Clock:
    """A callback that takes `seconds`, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.now, self.seconds, self.called = 0.0, seconds, []
        monkeypatch.setattr(timeline.time, "perf_counter", lambda: self.now)

    def after_step(self, job: Any, position: PlanState, metrics: dict[str, float]) -> None:
        self.now += self.seconds
        self.called.append(position.step)

    def after_training(self, job: Any, position: PlanState) -> None:
        self.now += self.seconds
        self.called.append("end")
        raise OSError("the disk is full")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def events(run: RunDirectory) -> list[dict[str, Any]]:
    return list(read_jsonl(run.path / "events.jsonl"))


def test_short_pauses_are_added_up(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 0.04 s each: written with the third, which makes 0.12 s, and what is left at the end, also where that fails."""
    clock = Clock(monkeypatch, 0.04)
    _, counted = timed([clock], run, 3)
    for step in range(1, 5):
        counted.after_step(None, PlanState(step=step), {})
    assert [event["seconds"] for event in events(run)] == pytest.approx([0.12])
    with pytest.raises(OSError, match="the disk is full"):
        counted.after_training(None, PlanState(step=4))
    assert [event["seconds"] for event in events(run)] == pytest.approx([0.12, 0.08])
    assert {(event["what"], event["attempt"]) for event in events(run)} == {("Clock", 3)}
    assert clock.called == [1, 2, 3, 4, "end"]


def test_checkpoints_are_told_apart(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 1.0)
    monkeypatch.setattr(callbacks.Checkpoints, "after_step", clock.after_step)
    timed([callbacks.Checkpoints()], run, 3)[1].after_step(None, PlanState(step=1), {})
    assert [(event["event"], event["what"], event["seconds"]) for event in events(run)] == [("pause", "checkpoint", 1.0)]


def test_the_first_step_of_an_attempt_is_told_once(run: RunDirectory) -> None:
    first = FirstStep(3)
    job = SimpleNamespace(run=run)
    for step in (7, 8):
        first.after_step(job, PlanState(step=step), {"seconds": 2.5})
    (told,) = events(run)
    assert (told["event"], told["step"], told["seconds"]) == ("first_step", 7, 2.5)
