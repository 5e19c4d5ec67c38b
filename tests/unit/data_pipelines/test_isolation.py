"""Sources that crash, hang or take too much memory cost themselves and nothing else."""

from __future__ import annotations

import json
import sys
import time

import pytest

from data_pipelines.attempts import AttemptsLog
from data_pipelines.groups import process_group, split_position
from data_pipelines.isolate import Isolate
from data_pipelines.metrics import Funnel, StageMetrics, render
from data_pipelines.rows import Loss, Row
from tests.unit.data_pipelines.tiny_groups import STAGES, job, make_rows, report
from videofm.data import storage
from videofm.data.manifest import Manifest
from videofm.errors import DataError, TransientError
from videofm.run_dir import RunDirectory

FAULTY_CHILD = """
import os, signal, sys, time
from data_pipelines import child
from data_pipelines.stages.transcode import TranscodeStage

class Faulty(TranscodeStage):
    def process(self, row, work):
        if "crash" in row.name:
            os.kill(os.getpid(), signal.SIGSEGV)
        if "hang" in row.name:
            time.sleep(600)
        if "spin" in row.name:
            while True: pass
        if "memory" in row.name:
            import numpy; numpy.ones((8 << 30,), numpy.uint8)
        if "bug" in row.name:
            raise KeyError("a mistake of ours")
        if "parent" in row.name:
            os.kill(os.getppid(), signal.SIGKILL)
        return super().process(row, work)

child.registry.CURATION_STAGES["transcode"] = "faulty:Faulty"
sys.modules["faulty"] = sys.modules["__main__"]
child.main()
"""


@pytest.fixture
def command(tmp_path):
    """A child whose transcode stage misbehaves on files with telling names."""
    path = tmp_path / "faulty_child.py"
    path.write_text(FAULTY_CHILD)
    return [sys.executable, str(path)]


def test_each_failure_costs_one_source(tmp_path, command):
    made = make_rows(tmp_path, "good-1", "crash", "hang", "memory", "bug", "parent", "good-2")
    started = time.monotonic()
    assert process_group(job(tmp_path, made, task_timeout=4.0), command=command)
    assert time.monotonic() - started < 300  # what hangs would do so for ten minutes
    summary, losses = report(tmp_path)
    found = {loss["source"]: (loss["kind"], loss["stage"], loss["reason"], loss["detail"]) for loss in losses}
    assert found.pop("crash.mp4") == (
        "quarantined", "transcode", "crash", "failed 2 times; the process was killed by SIGSEGV",
    )  # fmt: skip
    hint = "for long sources set engine.chunk_seconds or raise engine.task_timeout"
    assert found.pop("hang.mp4") == ("quarantined", "transcode", "timeout", f"failed 2 times; no answer within 4 s; {hint}")
    assert found.pop("memory.mp4")[:3] == ("quarantined", "transcode", "memory")
    assert found.pop("bug.mp4")[:3] == ("errors", "transcode", "KeyError")
    assert found.pop("parent.mp4")[2:] == ("crash", "failed 2 times; the parent of the decoding process ended with code -9")
    assert not found
    assert {record.source_id for record in Manifest.load(tmp_path / "out").records()} == {made[0].source_id, made[6].source_id}
    stages = [StageMetrics.from_json(value) for value in summary.metrics]
    for stage in stages:
        stage.check()
    assert [stage.retries for stage in stages] == [1, 2]  # the death outside of any stage counts for the first


def test_source_that_failed_in_earlier_runs_is_not_tried_again(tmp_path, command):
    """The driver died twice while it worked on the second source: two starts without an end."""
    made = make_rows(tmp_path, "good", "hang")
    log = AttemptsLog(tmp_path / "out/attempts_log/0-00000.jsonl")
    log.start(made[1].source_id)
    log.start(made[1].source_id)
    started = time.monotonic()
    assert process_group(job(tmp_path, made, task_timeout=300.0), command=command)
    assert time.monotonic() - started < 300
    _, losses = report(tmp_path)
    assert [(loss["source"], loss["reason"]) for loss in losses] == [("hang.mp4", "crash")]
    assert "failed 2 times; in an earlier run" in losses[0]["detail"]


def test_attempts_log_survives_a_cut_line(tmp_path):
    log = AttemptsLog(tmp_path / "log.jsonl")
    log.start("a")
    log.end("a", "done")
    log.start("b")
    with log.path.open("a") as file:
        file.write('{"source": "c", "ev')
    again = AttemptsLog(log.path)
    assert (again.failures("a"), again.failures("b"), again.failures("c")) == (0, 1, 0)
    again.end("b", "crash")
    assert AttemptsLog(log.path).failures("b") == 1


def test_stop_request_commits_nothing(tmp_path, command):
    made = make_rows(tmp_path, "good")
    RunDirectory(tmp_path / "out").request_stop()
    assert not process_group(job(tmp_path, made), command=command)
    with pytest.raises(DataError, match="no committed shard"):
        Manifest.load(tmp_path / "out")


def test_a_store_that_never_answers_is_given_up_in_the_fourth_run(tmp_path, monkeypatch):
    """Three runs leave the group as it is, having asked for all its sources; then the dead one is lost, and told."""
    made = [row.with_(source_id="9" * 24) for row in make_rows(tmp_path, "good")]
    dead = [Row(f"{n:024d}", f"dead-{n}", f"https://gone.example.com/{n}.mp4", 0) for n in (7, 8)]
    asked: list[str] = []

    def silent(place, *_, **__):
        asked.append(place)
        raise TransientError("no answer")

    monkeypatch.setattr(storage, "fetch", silent)
    monkeypatch.setattr(storage, "exists", silent)
    limits = {"task_timeout": 60.0}
    for number in range(3):
        with pytest.raises(TransientError, match="no answer"):
            process_group(job(tmp_path, [*made, *dead], **limits))
        assert asked == [row.path for row in dead] * (number + 1)
        with pytest.raises(DataError, match="no committed shard"):
            Manifest.load(tmp_path / "out")
    assert process_group(job(tmp_path, [*made, *dead], **limits))
    summary, losses = report(tmp_path)
    assert [(loss["source"], loss["kind"], loss["reason"], loss["detail"]) for loss in losses] == [
        (row.name, "quarantined", "unreachable", "in 4 runs; no answer") for row in dead
    ]
    first = StageMetrics.from_json(summary.metrics[0])
    first.check()
    assert (first.num_in, first.num_out) == (3, 1) and len(Manifest.load(tmp_path / "out").records()) == 1


def test_same_group_twice_gives_the_same_bytes(tmp_path):
    made = make_rows(tmp_path, "one", "two")
    hashes = []
    for name in ("a", "b"):
        process_group(job(tmp_path / name, list(reversed(made))))
        hashes.append(Manifest.load(tmp_path / name / "out").hash)
    assert hashes[0] == hashes[1]


def test_a_request_that_cannot_be_met_stops_the_group(tmp_path):
    """A filter on a score that nobody measured says nothing about the clip: no clip is lost, and none passes."""
    stages = [{"kind": "filter", "rules": [{"score": "beauty", "min": 0.5, "reason": "ugly"}]}, STAGES[1]]
    made = make_rows(tmp_path, "one")
    with pytest.raises(DataError, match=r"curation of one.mp4 cannot go on: filter: one.mp4 has no score 'beauty'"):
        process_group(job(tmp_path, made, stages=stages, names=["filter", "transcode"]))
    assert AttemptsLog(tmp_path / "out/attempts_log/0-00000.jsonl").failures(made[0].unit) == 0
    with pytest.raises(DataError, match="no committed shard"):
        Manifest.load(tmp_path / "out")


def test_a_source_that_vanished_or_is_not_the_promised_one(tmp_path):
    made = make_rows(tmp_path, "here", "gone", "other")
    (tmp_path / "gone.mp4").unlink()
    made[2] = made[2].with_(promised_sha256="0" * 64)
    assert process_group(job(tmp_path, made))
    summary, losses = report(tmp_path)
    assert {loss["source"]: (loss["kind"], loss["reason"]) for loss in losses} == {
        "gone.mp4": ("quarantined", "missing"), "other.mp4": ("quarantined", "checksum"),
    }  # fmt: skip
    for value in summary.metrics:
        StageMetrics.from_json(value).check()
    assert len(Manifest.load(tmp_path / "out").records()) == 1


def test_header_and_rows_are_plain_json(tmp_path):
    (made,) = make_rows(tmp_path, "one")
    assert Row.from_json(json.loads(json.dumps(made.to_json()))) == made
    (tmp_path / "scratch").mkdir()
    with Isolate(STAGES, tmp_path / "scratch", 512, 10.0) as isolate:
        result = isolate.run(made)
    assert result.failure is None and result.rows[0].clip is not None
    assert [(stage["stage"], stage["in"], stage["made"]) for stage in result.stages] == [("scores", 1, 1), ("transcode", 1, 1)]


def test_split_position_spreads():
    positions = [split_position(f"{number:024d}") for number in range(1000)]
    assert all(0 <= position < 1 for position in positions)
    assert sum(position < 0.1 for position in positions) == pytest.approx(100, abs=30)


def test_funnel_counts_and_checks():
    funnel = Funnel(["probe", "split"])
    probe = StageMetrics("probe", num_in=3, num_out=2, num_made=2)
    loss = Loss("quarantined", "probe", "x.mp4", "truncated")
    probe.lose(loss)
    funnel.add_group([probe.to_json(), StageMetrics("split", num_in=2, num_out=2, num_made=7).to_json()])
    funnel.check()
    assert funnel.reasons() == "probe: truncated (1)"
    text = render(funnel, "title", terminal=False)
    assert "truncated 1" in text and "\x1b" not in text
    assert "\x1b" in render(funnel, "title", terminal=True)
    funnel.stages["split"].num_in = 3
    with pytest.raises(AssertionError, match="split: 3 in, 2 out, 0 lost"):
        funnel.check()
