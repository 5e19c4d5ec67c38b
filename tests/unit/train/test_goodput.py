"""Where the time of a run went, from files written by hand: every second is accounted for, and under its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from videofm.progress import LOG
from videofm.run_dir import RunDirectory, read_json, read_jsonl
from videofm.train import goodput
from videofm.train.goodput import PARTS, Goodput, measure, record


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def event(time: float, attempt: int, name: str, **facts: Any) -> dict[str, Any]:
    return {"event": name, "time": 1.7e9 + time, "attempt": attempt, **facts}


def row(step: int, attempt: int, seconds: float = 2.0, data_wait: float = 0.5, skipped: float = 0.0) -> dict[str, Any]:
    return {"step": step, "attempt": attempt, "seconds": seconds, "data_wait": data_wait, "skipped": skipped}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that was killed, together with its supervisor, and then finished.

    Attempt 1 begins at 0 s, its loop at 10 s: steps 1 to 4 of 2 s each, a checkpoint of 1 s after step 2, samples of 3 s: all
    that is known of it ends at 10 + 8 + 4 = 22 s. It has no recorded end.
    Attempt 2 begins at 30 s, its loop at 42 s: steps 3 and 4 again, of which 4 is skipped, then a rank dies in step 5, which is
    noticed at 51 s: 5 s after the last step.
    Attempt 3 begins at 53 s, its loop at 60 s: steps 5 and 6, a checkpoint of 1.5 s, and half a second until it ended at 66 s.
    """
    found = RunDirectory(tmp_path)
    lines(
        tmp_path / "events.jsonl",
        [
            event(0, 1, "started", world_size=2),
            event(6, 1, "loaded"),
            event(12, 1, "first_step", step=1, seconds=2.0),
            event(15, 1, "pause", what="checkpoint", seconds=1.0),
            event(20, 1, "pause", what="Samples", seconds=3.0),
            event(30, 2, "started", world_size=2),
            event(44, 2, "first_step", step=3, seconds=2.0),
            event(51, 2, "ended", state="died"),
            event(53, 3, "started", world_size=1),
            event(62, 3, "first_step", step=5, seconds=2.0),
            event(65.5, 3, "pause", what="checkpoint", seconds=1.5),
            event(66, 3, "ended", state="finished"),
        ],
    )
    kept = [row(1, 1), row(2, 1), row(3, 2), row(4, 2, skipped=1.0), row(5, 3), row(6, 3)]
    lines(found.metrics_path, kept)
    lines(tmp_path / "attempts/0002/superseded_metrics.jsonl", [row(3, 1), row(4, 1)])
    return found


def test_every_second_is_accounted_for(run: RunDirectory) -> None:
    """The parts are those of the docstring above and sum to the 66 s between the first launch and the last end."""
    expected = {
        "useful": 5 * 1.5,  # steps 1, 2, 3, 5 and 6
        "data_wait": 6 * 0.5,  # of every step that was kept
        "checkpoint_stall": 1.0 + 1.5,
        "watching": 3.0,
        "startup": 10.0 + 12.0 + 7.0,
        "skipped": 1.5,  # step 4
        "redone": 2 * 2.0,  # steps 3 and 4 of attempt 1
        "unfinished": 51 - 42 - 2 * 2.0,  # of attempt 2
        "down": (30 - 22) + (53 - 51),
        "other": 66 - 60 - 2 * 2.0 - 1.5,
    }
    found = measure(run)
    assert found is not None
    assert found.seconds == pytest.approx(expected, abs=1e-5)  # times of today have some 1e-7 s in double precision
    assert list(found.seconds) == list(PARTS)
    assert sum(expected.values()) == 66
    assert found.wall_seconds == pytest.approx(66, abs=1e-5)
    assert found.effective == pytest.approx(7.5 / 66)
    assert (found.num_attempts, found.num_redone_steps) == (3, 2)


def test_it_is_told_and_kept(run: RunDirectory) -> None:
    found = measure(run)
    assert found is not None
    assert read_json(run.path / "goodput.json") == {**found.as_json(), "about": PARTS}
    told = found.describe()
    assert told.startswith("effective training time 11 % of 1 min 06 s: waiting for data 5 %, waiting for checkpoints 4 %")
    assert "start-up of attempts 44 %" in told and "other" not in told  # half a second of 66


def test_an_attempt_that_made_no_step_was_all_start_up(tmp_path: Path) -> None:
    lines(tmp_path / "events.jsonl", [event(0, 1, "started"), event(4, 1, "loaded"), event(7, 1, "ended", state="failed")])
    found = measure(RunDirectory(tmp_path))
    assert found is not None
    assert found.seconds["startup"] == found.wall_seconds == pytest.approx(7, abs=1e-5)
    assert found.effective == 0.0


def test_attempts_that_nobody_recorded_count_for_nothing(tmp_path: Path) -> None:
    """As those of a run that an older version began: their steps have no attempt that they could be part of."""
    run = RunDirectory(tmp_path)
    lines(run.metrics_path, [row(1, 1), row(2, 2)])
    assert measure(run) is None
    assert not (tmp_path / "goodput.json").exists()
    lines(
        tmp_path / "events.jsonl",
        [event(0, 2, "started"), event(5, 2, "first_step", step=2, seconds=2.0), event(5, 2, "ended", state="finished")],
    )
    found = measure(run)
    assert found is not None
    assert found.seconds["useful"] == 1.5 and found.wall_seconds == pytest.approx(5, abs=1e-5)


def test_nothing_is_divided_by_a_run_without_time() -> None:
    assert Goodput(dict.fromkeys(PARTS, 0.0), 1, 0).effective == 0.0


def test_events_are_lines_with_time_and_attempt(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    record(run, 1, goodput.STARTED, world_size=2)
    record(run, 2, goodput.ENDED, state="died")
    first, second = read_jsonl(tmp_path / "events.jsonl")
    assert (first["event"], first["attempt"], first["world_size"]) == ("started", 1, 2)
    assert (second["event"], second["attempt"], second["state"]) == ("ended", 2, "died")
    assert first["time"] <= second["time"]


def test_a_full_disk_is_told_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOG, "propagate", True)
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with caplog.at_level("WARNING", "videofm"):
        record(RunDirectory(tmp_path), 4, goodput.STARTED)
    assert "the event 'started' of attempt 4 was not recorded: [Errno 28] No space left on device" in caplog.text


def test_half_a_line_costs_no_other_event(tmp_path: Path) -> None:
    """A disk was full in the middle of a line, and took the next one: that begins a line of its own."""
    run = RunDirectory(tmp_path)
    record(run, 1, goodput.STARTED)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "first_st')
    record(run, 1, goodput.ENDED, state="finished")
    found = measure(run)
    assert found is not None and found.num_attempts == 1
    first, torn, last = (line for line in (tmp_path / "events.jsonl").read_text().splitlines() if line)
    assert torn == '{"event": "first_st' and [json.loads(line)["event"] for line in (first, last)] == ["started", "ended"]
    assert found.wall_seconds == pytest.approx(json.loads(last)["time"] - json.loads(first)["time"], abs=1e-5)


@pytest.mark.parametrize("ended", [True, False])
def test_a_first_step_that_was_not_recorded_makes_nothing_negative(tmp_path: Path, ended: bool) -> None:
    """Three steps of 2 s each stand in the metrics. Of 10 s until the recorded end they take 6; the rest was start-up. Where no
    end is recorded either, they are all that is known."""
    run = RunDirectory(tmp_path)
    lines(tmp_path / "events.jsonl", [event(0, 1, "started"), *([event(10, 1, "ended", state="died")] if ended else [])])
    lines(run.metrics_path, [row(step, 1) for step in (1, 2, 3)])
    found = measure(run)
    assert found is not None and min(found.seconds.values()) >= 0
    assert found.seconds["startup"] == pytest.approx(4 if ended else 0, abs=1e-5)
    assert found.seconds["useful"] == 4.5 and found.wall_seconds == pytest.approx(10 if ended else 6, abs=1e-5)
