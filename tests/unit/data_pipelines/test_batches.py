"""Clips on their way to a model that dies, fails or is out of reach: each costs itself and nothing else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import batches as batches_module
from data_pipelines.attempts import AttemptsLog, log_end, log_start
from data_pipelines.batches import Answers, Batches, ModelDied
from data_pipelines.frames import cover, frames_path, spaced
from data_pipelines.groups import process_group
from data_pipelines.metrics import StageMetrics
from data_pipelines.rows import FrameRequest, Rejected, Row, Unusable
from tests.unit.data_pipelines.tiny_groups import job, make_rows, report
from videofm.errors import DataError, TransientError

REQUEST = FrameRequest(2, 4, 6)


class FakeModel:
    """Scores the mean of the frames. Names say what goes wrong; `asked` counts how often a clip was at the model."""

    def __init__(self, deaths_in_queue: int = 0, no_answers: int = 0) -> None:
        self.asked: Counter[str] = Counter()
        self.sizes: list[int] = []
        self.memory = 99
        self.deaths_in_queue, self.no_answers = deaths_in_queue, no_answers

    def __call__(self, rows, frames, log):
        if self.deaths_in_queue:
            self.deaths_in_queue -= 1
            raise ModelDied("while it waited")
        if self.no_answers:
            self.no_answers -= 1
            raise TransientError("no answer")
        self.sizes.append(len(rows))
        keys = [row.key for row in rows]
        self.asked.update(row.name for row in rows)
        log_start(log, keys)
        if any("kill" in row.name for row in rows):
            raise ModelDied("killed")
        log_end(log, keys, "done")
        if any("bug" in row.name for row in rows):
            raise ValueError("a strange clip")
        if any("wide" in row.name for row in rows) or len(rows) > self.memory:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        if any("weights" in row.name for row in rows):
            raise DataError("wrong weights or dtype?")
        answers: list[Row | Rejected] = []
        for row, frame in zip(rows, frames, strict=True):
            score = float(frame.mean())
            answers.append(Rejected("ugly", "", {"mean": score}) if "ugly" in row.name else row.with_(scores={"mean": score}))
        return Answers(answers, 0.5, 1.0)


def run(tmp_path: Path, model: FakeModel, *names: str, max_rows: int = 3):
    """Ask about clips of constant colour: the score of clip i is i."""
    metrics = StageMetrics("model", num_in=len(names))
    batches = Batches(model, REQUEST, tmp_path / "log.jsonl", 2, 1, metrics)
    batches.max_rows = max_rows
    kept = []
    for index, name in enumerate(names):
        row = Row(f"{index:024d}", name, "", 1, start=3, stop=9)
        frames_path(tmp_path, row).write_bytes(bytes([index]) * (2 * 4 * 6 * 3))
        kept += batches.add([row], tmp_path)
    kept += batches.flush()
    metrics.check()
    assert not list(tmp_path.glob("*.rgb"))
    return {row.name: row.scores["mean"] for row in kept}, {loss.source: loss for loss in batches.losses}, metrics


def test_clips_go_in_batches_and_come_back_in_order(tmp_path):
    model = FakeModel()
    kept, losses, metrics = run(tmp_path, model, "a", "b", "ugly", "c", "d")
    assert kept == {"a": 0.0, "b": 1.0, "c": 3.0, "d": 4.0} and model.sizes == [3, 2]
    loss = losses["ugly"]
    assert (loss.kind, loss.reason, loss.scores, loss.start, loss.stop) == ("dropped", "ugly", {"mean": 2.0}, 3, 9)
    assert (metrics.num_out, metrics.retries, metrics.cpu_seconds, sum(metrics.latency.values())) == (4, 0, 1.0, 5)


def test_a_clip_that_kills_the_model_twice_is_quarantined(tmp_path):
    model = FakeModel()
    kept, losses, metrics = run(tmp_path, model, "a", "kill", "b", "c")
    assert set(kept) == {"a", "b", "c"} and metrics.retries == 2
    assert model.asked["kill"] == 2 and (losses["kill"].kind, losses["kill"].reason) == ("quarantined", "model_crash")
    log = AttemptsLog(tmp_path / "log.jsonl")  # the others were only near
    assert [log.failures(f"{index:024d}-00000003") for index in range(4)] == [0, 2, 0, 0]
    again = FakeModel()
    assert set(run(tmp_path, again, "a", "kill", "b", "c")[0]) == {"a", "b", "c"} and again.asked["kill"] == 0


def test_a_driver_that_died_leaves_no_blame_on_a_batch(tmp_path):
    """Three clips were at the model when everything stopped: they go one by one, and pass."""
    log_start(tmp_path / "log.jsonl", [f"{index:024d}-00000003" for index in range(3)])
    model = FakeModel()
    kept, losses, _ = run(tmp_path, model, "a", "b", "c", "d", max_rows=4)
    assert set(kept) == {"a", "b", "c", "d"} and not losses and model.sizes == [1, 1, 1, 1]
    assert AttemptsLog(tmp_path / "log.jsonl").failures(f"{0:024d}-00000003") == 0


def test_an_exception_costs_the_clip_that_raises_it(tmp_path):
    kept, losses, _ = run(tmp_path, FakeModel(), "a", "bug", "b")
    assert set(kept) == {"a", "b"}
    assert (losses["bug"].kind, losses["bug"].reason, losses["bug"].detail) == ("errors", "ValueError", "a strange clip")


@pytest.mark.parametrize("names", [["wide"], ["a", "wide", "b"]])
def test_a_model_without_memory_for_one_clip_ends_the_run(tmp_path, names):
    with pytest.raises(
        DataError, match="model: the model has no memory for one clip: CUDA out of memory.*lower the stage's batch"
    ):
        run(tmp_path, FakeModel(), *names)


def test_a_batch_that_is_too_large_for_the_memory_goes_one_by_one(tmp_path):
    model = FakeModel()
    model.memory = 1
    kept, losses, _ = run(tmp_path, model, "a", "b", "c")
    assert set(kept) == {"a", "b", "c"} and not losses and model.sizes == [3, 1, 1, 1]


@pytest.mark.parametrize("names", [["weights"], ["a", "weights", "b"]])
def test_what_a_model_says_of_itself_is_no_loss_of_a_clip(tmp_path, names):
    with pytest.raises(DataError, match="wrong weights or dtype"):
        run(tmp_path, FakeModel(), *names)


def test_waiting_for_a_model_that_dies_is_no_fault(tmp_path, monkeypatch):
    kept, losses, _ = run(tmp_path, FakeModel(deaths_in_queue=5), "a", "b", "c")
    assert set(kept) == {"a", "b", "c"} and not losses
    for names in (["a"], ["a", "b"]):
        with pytest.raises(DataError, match="died 20 times while clips waited for it"):
            run(tmp_path, FakeModel(deaths_in_queue=99), *names)


def test_no_answer_is_asked_again_and_then_told(tmp_path, monkeypatch):
    monkeypatch.setattr(batches_module, "_FIRST_PAUSE", 0.0)
    assert run(tmp_path, FakeModel(no_answers=2), "a", "b")[2].retries == 2
    with pytest.raises(TransientError, match="no answer"):
        run(tmp_path, FakeModel(no_answers=3), "a", "b")


def test_batches_are_bounded_in_bytes(tmp_path):
    small = Batches(FakeModel(), FrameRequest(8, 224, 224), tmp_path / "log", 2, 4, StageMetrics("model"))
    assert small.max_rows == 3  # of 1.2 MB each
    assert Batches(FakeModel(), FrameRequest(64, 1024, 1024), tmp_path / "log", 2, 4, StageMetrics("model")).max_rows == 1


def test_a_group_with_a_model_sees_decoded_frames(tmp_path):
    """Frames come from the isolated child: the mean of a clip is that of its pixels; what does not decode never gets there."""
    made = make_rows(tmp_path, "a", "b", "broken")
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:700])
    model = FakeModel()
    request = {"num_frames": 3, "height": 16, "width": 32}
    assert process_group(job(tmp_path, made, stages=[], names=["model"], pack=False, frames=request), model)
    summary, losses = report(tmp_path)
    assert summary.parts[0].num_rows == 2 and model.sizes == [2]
    assert [(loss["source"], loss["stage"], loss["kind"]) for loss in losses] == [("broken.mp4", "model", "quarantined")]
    (metrics,) = [StageMetrics.from_json(value) for value in summary.metrics]
    metrics.check()
    assert (metrics.num_in, metrics.num_out, metrics.num_made) == (3, 2, 2) and metrics.bytes_in > 0


def test_frames_are_spaced_and_cover_the_picture():
    assert spaced(10, 20, 2) == [12, 17] and spaced(5, 6, 3) == [5, 5, 5] and spaced(0, 8, 8) == list(range(8))
    with pytest.raises(Unusable, match="empty_clip"):
        spaced(3, 3, 1)
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 255  # the middle 40x40
    assert cover(image, 20, 20).shape == (20, 20, 3) and cover(image, 20, 20).min() == 255
    assert cover(image, 50, 31).shape == (50, 31, 3) and cover(image[:7, :9], 14, 30).shape == (14, 30, 3)
