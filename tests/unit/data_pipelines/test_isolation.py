"""Sources that crash, hang or take too much memory cost themselves and nothing else."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest

from data_pipelines import demo
from data_pipelines.attempts import AttemptsLog
from data_pipelines.groups import Job, process_group, split_position
from data_pipelines.isolate import Isolate
from data_pipelines.metrics import Funnel, StageMetrics, render
from data_pipelines.rows import Loss, Row
from videofm.data.manifest import Manifest
from videofm.errors import DataError
from videofm.run_dir import RunDirectory

STAGES = [{"kind": "filter", "min_motion": 0.0}, {"kind": "transcode", "height": 32, "width": 32, "fps": 25.0}]

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


def rows(tmp_path, *names):
    rng = np.random.default_rng(0)
    made = []
    for number, name in enumerate(names):
        path = tmp_path / f"{name}.mp4"
        demo.write_video(path, demo.render_shot("red", "circle", "left", 12, 32, rng), 25)
        made.append(Row(f"{number:024d}", path.name, str(path), path.stat().st_size))
    return made


def job(tmp_path, made, **changes):
    facts = {
        "folder": str(tmp_path / "out"), "group": "00000", "segment": 1, "rows": [row.to_json() for row in made],
        "stages": STAGES, "pack": True, "config_hash": "c", "held_out": 0.0, "memory_mib": 512, "timeout": 2.0,
        "max_attempts": 2,
    }  # fmt: skip
    return Job(**{**facts, **changes})


def test_each_failure_costs_one_source(tmp_path, command):
    made = rows(tmp_path, "good-1", "crash", "hang", "memory", "bug", "parent", "good-2")
    started = time.monotonic()
    report = process_group(job(tmp_path, made), command)
    assert time.monotonic() - started < 25
    found = {loss["source"]: (loss["kind"], loss["stage"], loss["reason"], loss["detail"]) for loss in report["losses"]}
    assert found.pop("crash.mp4") == (
        "quarantined", "transcode", "crash", "failed 2 times; the process was killed by SIGSEGV",
    )  # fmt: skip
    assert found.pop("hang.mp4") == ("quarantined", "transcode", "timeout", "failed 2 times; no answer within 2 s")
    assert found.pop("memory.mp4")[:3] == ("quarantined", "transcode", "memory")
    assert found.pop("bug.mp4")[:3] == ("errors", "transcode", "KeyError")
    assert found.pop("parent.mp4")[2:] == ("crash", "failed 2 times; the parent of the decoding process ended with code -9")
    assert not found
    assert {record.source_id for record in Manifest.load(tmp_path / "out").records()} == {made[0].source_id, made[6].source_id}
    for value in report["metrics"]:
        StageMetrics.from_json(value).check()


def test_source_that_failed_in_earlier_runs_is_not_tried_again(tmp_path, command):
    """The driver died twice while it worked on the second source: two starts without an end."""
    made = rows(tmp_path, "good", "hang")
    log = AttemptsLog(tmp_path / "out/attempts_log/1-00000.jsonl")
    log.start(made[1].source_id)
    log.start(made[1].source_id)
    started = time.monotonic()
    report = process_group(job(tmp_path, made, timeout=60.0), command)
    assert time.monotonic() - started < 20
    assert [(loss["source"], loss["reason"]) for loss in report["losses"]] == [("hang.mp4", "crash")]
    assert "failed 2 times; in an earlier run" in report["losses"][0]["detail"]


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
    made = rows(tmp_path, "good")
    RunDirectory(tmp_path / "out").request_stop()
    assert process_group(job(tmp_path, made), command) is None
    with pytest.raises(DataError, match="no committed shard"):
        Manifest.load(tmp_path / "out")


def test_same_group_twice_gives_the_same_bytes(tmp_path):
    made = rows(tmp_path, "one", "two")
    hashes = []
    for name in ("a", "b"):
        process_group(job(tmp_path, list(reversed(made)), folder=str(tmp_path / name)))
        hashes.append(Manifest.load(tmp_path / name).hash)
    assert hashes[0] == hashes[1]


def test_header_and_rows_are_plain_json(tmp_path):
    (made,) = rows(tmp_path, "one")
    assert Row.from_json(json.loads(json.dumps(made.to_json()))) == made
    (tmp_path / "scratch").mkdir()
    with Isolate(STAGES, tmp_path / "scratch", 512, 10.0) as isolate:
        result = isolate.run(made)
    assert result.failure is None and result.rows[0].clip is not None
    assert [(stage["stage"], stage["in"], stage["made"]) for stage in result.stages] == [("filter", 1, 1), ("transcode", 1, 1)]


def test_split_position_spreads():
    positions = [split_position(f"{number:024d}") for number in range(1000)]
    assert all(0 <= position < 1 for position in positions)
    assert sum(position < 0.1 for position in positions) == pytest.approx(100, abs=30)


def test_funnel_counts_and_checks():
    funnel = Funnel(["probe", "split"])
    probe = StageMetrics("probe", num_in=3, num_out=2, num_made=2)
    loss = Loss("quarantined", "probe", "x.mp4", "truncated")
    probe.lose(loss)
    funnel.add_group([probe.to_json(), StageMetrics("split", num_in=2, num_out=2, num_made=7).to_json()], [vars(loss)])
    funnel.check()
    assert funnel.reasons() == "probe: truncated (1)"
    text = render(funnel, "title", terminal=False)
    assert "truncated 1" in text and "\x1b" not in text
    assert "\x1b" in render(funnel, "title", terminal=True)
    funnel.stages["split"].num_in = 3
    with pytest.raises(AssertionError, match="split: 3 in, 2 out, 0 lost"):
        funnel.check()
