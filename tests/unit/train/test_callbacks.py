"""What the callbacks leave on disk, with a job that is only as real as they need it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.checkpoint.boundaries import content_of
from videofm.checkpoint.keep import KeepRules
from videofm.checkpoint.record import Facts, committed
from videofm.checkpoint.saver import Saver
from videofm.data.plan import PlanState
from videofm.progress import LOG
from videofm.run_dir import RunDirectory
from videofm.train import state, trainer, worker
from videofm.train.callbacks import Metrics, Wandb
from videofm.train.timeline import Timed
from videofm.train.trainer import Callback
from videofm.train.watchdog import Heartbeat


def a_job(checkpoint_every: int) -> Any:
    return SimpleNamespace(config=SimpleNamespace(trainer=SimpleNamespace(checkpoint_every=checkpoint_every)))


def test_rows_are_on_disk_before_the_checkpoint_of_their_step(tmp_path: Path) -> None:
    """A kill after the checkpoint of step 2 must not cost the rows of steps 1 and 2: the resumed run starts at step 3."""
    run, job = RunDirectory(tmp_path), a_job(checkpoint_every=2)
    metrics = Metrics(run, step=0, max_steps=10, log_every=100, attempt=1)
    for step in (1, 2, 3):
        metrics.after_step(job, PlanState(step=step), {"loss": 0.5})
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    metrics.after_training(job, PlanState(step=3))
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]


def test_a_full_disk_is_told_and_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full takes no byte: the checkpoint, which knows another place, is yet to come."""
    told: list[str] = []
    monkeypatch.setattr(LOG, "error", lambda text, *values: told.append(text % values))
    metrics = Metrics(RunDirectory(tmp_path), step=0, max_steps=2, log_every=1, attempt=1)
    metrics._file.close()
    metrics._file = open("/dev/full", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
    metrics.after_step(a_job(1), PlanState(step=1), {"loss": 0.5})
    metrics.after_training(a_job(1), PlanState(step=1))
    assert told and all("No space left on device" in line for line in told)


def test_a_number_that_is_not_finite_is_null(tmp_path: Path) -> None:
    """JSON has no infinity: the norm of a skipped step must not make the row unreadable to others."""
    run = RunDirectory(tmp_path)
    metrics = Metrics(run, step=0, max_steps=2, log_every=1, attempt=1)
    metrics.after_step(a_job(1), PlanState(step=1), {"loss": 0.5, "grad_norm": float("inf")})
    assert '"loss": 0.5, "grad_norm": null}' in run.metrics_path.read_text()


def test_rows_behind_the_restored_step_are_set_aside(tmp_path: Path) -> None:
    """Rows of steps that are done again move to the attempt's folder, and a row that a kill cut short goes."""
    run = RunDirectory(tmp_path)
    run.metrics_path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    Metrics(run, step=1, max_steps=10, log_every=1, attempt=2).after_training(a_job(5), PlanState(step=1))
    assert [row["step"] for row in run.metrics()] == [1]
    assert '"step": 2' in (tmp_path / "attempts" / "0002" / "superseded_metrics.jsonl").read_text()


# -- Weights & Biases, which is a copy


class Service:
    """In the place of the package wandb; its `init` and the methods of the run it gives raise, or wait, as they are told."""

    Settings = SimpleNamespace

    def __init__(self, **acts: Callable[[], object]) -> None:
        self.acts, self.rows = acts, list[int]()

    def _act(self, name: str) -> None:
        self.acts.get(name, lambda: None)()

    def init(self, **_: Any) -> Service:
        self._act("init")
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._act("log")
        self.rows.append(step)

    def finish(self) -> None:
        self._act("finish")


def refuses() -> None:
    raise RuntimeError("no service")


def a_training(folder: Path, monkeypatch: pytest.MonkeyPatch, service: Service) -> tuple[Any, list[Callback]]:
    """A job of three steps that saves a state of a few numbers, and its callbacks as a rank makes them."""
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setattr(state, "saver", lambda job: Saver(folder / "checkpoints", KeepRules(1)))
    monkeypatch.setattr(state, "facts", lambda job, position, *_: Facts(position.step))
    monkeypatch.setattr(state, "content", lambda job, position: content_of(position.step))
    config = SimpleNamespace(
        trainer=SimpleNamespace(max_steps=3, log_every=9, checkpoint_every=9),
        wandb=SimpleNamespace(mode="online", project="p"),
        data=SimpleNamespace(cache=None, online=None),
        objective=None, samples=None, held_out=None, model_dump=lambda mode: {},
    )  # fmt: skip
    job: Any = SimpleNamespace(
        config=config, run=RunDirectory(folder), mesh=SimpleNamespace(is_main=True), objective=None, heartbeat=Heartbeat(),
        divergence=SimpleNamespace(healthy=True, spent=False),
    )  # fmt: skip
    return job, worker._callbacks(job, 0, 1)


def trained(job: Any, callbacks: Sequence[Callback]) -> None:
    for step in (1, 2, 3):
        for callback in callbacks:
            callback.after_step(job, PlanState(step=step), {"loss": 0.5, "seconds": 1.0})
    trainer._finish(job, PlanState(step=3), callbacks)


def test_the_state_is_saved_before_wandb_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `finish` may wait for a service that is gone, until a scheduler's patience is over."""
    there: list[Path] = []
    service = Service(finish=lambda: there.extend(committed(tmp_path / "checkpoints")))
    trained(*a_training(tmp_path, monkeypatch, service))
    assert [folder.name for folder in there] == ["step_00000003"] and service.rows == [1, 2, 3]


@pytest.mark.parametrize(
    ("fails", "told"),
    [
        ("init", ["wandb could not be started: RuntimeError: no service; metrics.jsonl has every row", "wandb missed 3 rows"]),
        ("log", ["wandb could not log step 1: no service; metrics.jsonl has every row", "wandb missed 3 rows"]),
        ("finish", ["wandb could not finish: no service; "]),
    ],
)
def test_wandb_that_fails_stops_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails: str, told: list[str]
) -> None:
    job, callbacks = a_training(tmp_path, monkeypatch, Service(**{fails: refuses}))
    trained(job, callbacks)
    assert [row["step"] for row in job.run.metrics()] == [1, 2, 3] and committed(tmp_path / "checkpoints")
    warnings = [record.getMessage() for record in caplog.records if "wandb" in record.getMessage()]
    assert len(warnings) == len(told) and all(line.startswith(text) for line, text in zip(warnings, told, strict=True))


def test_wandb_that_hangs_at_the_end_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The wait has an end, and is no hang meanwhile; where its files are is told."""
    over = threading.Event()
    job, callbacks = a_training(tmp_path, monkeypatch, Service(finish=lambda: over.wait(60)))
    copy = callbacks[-1]
    assert isinstance(copy, Timed) and isinstance(copy._callback, Wandb)
    copy._callback._finish_seconds = 0.2
    beats = job.heartbeat.beats
    copy.after_training(job, PlanState(step=3))
    over.set()
    assert job.heartbeat.beats > beats
    assert f"wandb did not finish within 0.2 s and is left behind; {tmp_path / 'wandb'} has its files" in caplog.text
