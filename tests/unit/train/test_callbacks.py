"""What the callbacks leave on disk, with a job that is only as real as they need it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from videofm.data.plan import PlanState
from videofm.run_dir import RunDirectory
from videofm.train.callbacks import Metrics


def a_job(checkpoint_every: int) -> Any:
    return SimpleNamespace(config=SimpleNamespace(trainer=SimpleNamespace(checkpoint_every=checkpoint_every)))


def test_rows_are_on_disk_before_the_checkpoint_of_their_step(tmp_path: Path) -> None:
    """A kill after the checkpoint of step 2 must not cost the rows of steps 1 and 2: the resumed run starts at step 3."""
    run, job = RunDirectory(tmp_path), a_job(checkpoint_every=2)
    metrics = Metrics(run, step=0, max_steps=10, log_every=100, attempt=1)
    for step in (1, 2, 3):
        metrics.after_step(job, PlanState(step=step), {"loss": 0.5})
    assert [row["step"] for row in run.metrics()] == [1, 2]
    metrics.after_training(job, PlanState(step=3))
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]


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
