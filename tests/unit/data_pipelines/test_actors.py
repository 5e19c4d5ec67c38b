"""The process of a model, without Ray: what of it outlives an error, and what the way to it makes of failures."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipelines import actors
from data_pipelines.actors import Client, Model
from data_pipelines.attempts import AttemptsLog
from data_pipelines.rows import Row
from videofm.errors import CheckpointError, DataError

ROW = Row(f"{7:024d}", "clip.mp4", "", 1, start=3, stop=9)


def model_that_raises(error: Exception) -> Model:
    def process_batch(rows: object, frames: object) -> None:
        raise error

    made = Model.__new__(Model)
    made.stage, made.device, made.loaded = SimpleNamespace(process_batch=process_batch), "cpu", True
    return made


def exit_code_of(model: Model, log: Path) -> int:
    """How a process ends in which the model is asked: 1 where it ends itself, 7 where the exception is its answer."""
    pid = os.fork()
    if pid == 0:
        try:
            model.process([ROW.to_json()], str(log))
        finally:
            os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_lost_cuda_context_ends_the_process_and_blames_the_clips(tmp_path: Path) -> None:
    """The log holds a start without an end, as after any death; other errors leave both, and the process lives."""
    lost = RuntimeError("CUDA error: device-side assert triggered")
    assert exit_code_of(model_that_raises(lost), tmp_path / "lost.jsonl") == 1
    assert AttemptsLog(tmp_path / "lost.jsonl").failures(ROW.key) == 1
    assert exit_code_of(model_that_raises(ValueError("a strange clip")), tmp_path / "log.jsonl") == 7
    assert AttemptsLog(tmp_path / "log.jsonl").failures(ROW.key) == 0


class FakeHandle:
    """An actor whose calls answer, or fail as they are told."""

    def __init__(self, ready: object = None, process: object = None) -> None:
        self.ready = SimpleNamespace(remote=lambda: ready)
        self.process = SimpleNamespace(remote=lambda *arguments: process)


def task_error(cause: Exception) -> Exception:
    return actors.ray.exceptions.RayTaskError("ready", "traceback", cause)


@pytest.fixture(autouse=True)
def get(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(reference: object, timeout: float = 0.0) -> object:
        if isinstance(reference, Exception):
            raise reference
        return reference

    monkeypatch.setattr(actors.ray, "get", fake)
    monkeypatch.setattr(actors, "START_SECONDS", -1.0)  # the first failure is the last


def ask(handle: FakeHandle, log: Path) -> None:
    Client([handle], 0)([ROW], [], log)


def test_a_model_that_does_not_come_back_is_no_fault_of_a_clip(tmp_path: Path) -> None:
    exceptions = actors.ray.exceptions
    with pytest.raises(DataError, match="begun again, does not load it: RuntimeError.*no kernel image"):
        ask(FakeHandle(task_error(RuntimeError("no kernel image"))), tmp_path / "log")
    with pytest.raises(CheckpointError, match="damaged weights"):
        ask(FakeHandle(task_error(CheckpointError("damaged weights"))), tmp_path / "log")
    for error in (exceptions.RayActorError(), exceptions.GetTimeoutError("still loads")):
        with pytest.raises(DataError, match="the model's process did not come back: .*run again to go on"):
            ask(FakeHandle(error), tmp_path / "log")


def test_a_full_object_store_is_no_fault_of_a_clip(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the model could not be asked: .*full; run again"):
        ask(FakeHandle(1, actors.ray.exceptions.ObjectStoreFullError("full")), tmp_path / "log")
