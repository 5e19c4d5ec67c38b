"""What happens around steps: metrics.jsonl and the console, Weights & Biases, checkpoints."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from videofm import models
from videofm.data.plan import PlanState
from videofm.evaluation.latents import LatentDiagnostics, alarms
from videofm.models.vae.statistics import write_statistics
from videofm.objectives.latent_statistics import first_clips
from videofm.progress import LOG, progress
from videofm.run_dir import RunDirectory, read_jsonl, write_atomic
from videofm.train import state
from videofm.train.build import Job
from videofm.train.optim import averaged_weights
from videofm.types import Batch


class Metrics:
    """metrics.jsonl, a row each step; on the console a bar, or a line each `log_every` steps where it is no terminal."""

    def __init__(self, run: RunDirectory, step: int, max_steps: int, log_every: int, attempt: int) -> None:
        self.log_every, self.attempt = log_every, attempt
        _set_aside_rows_after(run, step, attempt)
        self._file = run.metrics_path.open("a", encoding="utf-8")
        self._stack = ExitStack()
        self._progress = self._stack.enter_context(progress("step", max_steps, every=math.inf))
        self._progress.start_at(step)

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Write the row. Rows are flushed with each line of the console, and before each checkpoint: a run that resumes from
        it does not write them again."""
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no infinity
        self._file.write(json.dumps({"step": position.step, "attempt": self.attempt, **numbers}) + "\n")
        note = ", ".join(f"{name} {metrics[name]:.4g}" for name in ("loss", "psnr", "grad_norm") if name in metrics)
        self._progress.advance(1, note)
        if position.step % self.log_every == 0:
            self._file.flush()
            if not sys.stderr.isatty():
                LOG.info("%s", self._progress.line(note))
        if position.step % job.config.trainer.checkpoint_every == 0:
            self._sync()

    def after_training(self, job: Job, position: PlanState) -> None:
        """Close the file and the bar."""
        LOG.info("%s", self._progress.line())
        self._stack.close()
        self._sync()
        self._file.close()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


class Wandb:
    """A copy of the metrics to Weights & Biases, on the main rank. It never asks for a key: `offline` writes files."""

    def __init__(self, job: Job) -> None:
        # wandb wraps an optional service; it is imported only where it is switched on.
        import wandb

        config = job.config
        self._run = wandb.init(
            project=config.wandb.project,
            name=job.run.path.name,
            dir=str(job.run.path),
            mode=config.wandb.mode,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True),
        )
        self._failed = 0

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Log the row. A failure of the service is counted and never stops training."""
        try:
            self._run.log(metrics, step=position.step)
        except Exception as error:
            self._failed += 1
            if self._failed == 1:
                LOG.warning("wandb could not log step %d: %s; metrics.jsonl has every row", position.step, error)

    def after_training(self, job: Job, position: PlanState) -> None:
        """Finish the copy and say how many rows it lacks."""
        if self._failed:
            LOG.warning("wandb missed %d rows; metrics.jsonl has them", self._failed)
        self._run.finish()


class Checkpoints:
    """A checkpoint each `checkpoint_every` steps, and one where training stops."""

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Save where the count says so."""
        if position.step % job.config.trainer.checkpoint_every == 0 and position.step < job.config.trainer.max_steps:
            state.save(job, position)

    def after_training(self, job: Job, position: PlanState) -> None:
        """Save the last state."""
        state.save(job, position)


def _set_aside_rows_after(run: RunDirectory, step: int, attempt: int) -> None:
    """Steps after the restored one are done again: their old rows move to the attempt's folder."""
    rows = run.metrics()
    kept: list[dict[str, Any]] = [row for row in rows if row["step"] <= step]
    if len(kept) == len(rows) and (not run.metrics_path.exists() or run.metrics_path.read_bytes()[-1:] in (b"", b"\n")):
        return
    aside = run.path / "attempts" / f"{attempt:04d}" / "superseded_metrics.jsonl"
    write_atomic(aside, "".join(json.dumps(row) + "\n" for row in rows if row["step"] > step))
    write_atomic(run.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))


class Diagnostics:
    """What the latents of the role `vae` are like, each `every` steps and at the end: `diagnostics.jsonl` and, of the end,
    `latent_statistics.json`. Alarms go to the log.

    It reads the first clips of the training order through the moving average where there is one. Every rank does the same work
    on the same clips; one writes. The statistics, and the hash of the weights that they belong to, are those of the last
    checkpoint, which holds whole tensors where ZeRO 3 does not; so this comes after `Checkpoints`.
    """

    def __init__(self, every: int, num_clips: int) -> None:
        self.every, self.num_clips = every, num_clips

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Look where the count says so."""
        if self.every and position.step % self.every == 0 and position.step < job.config.trainer.max_steps:
            self._look(job, position.step)

    def after_training(self, job: Job, position: PlanState) -> None:
        """Look once more and write the statistics, unless training stopped early."""
        if position.step == job.config.trainer.max_steps:
            num_clips = self._look(job, position.step)
            if job.mesh.is_main:
                write_statistics(models.load(job.run.path, role="vae"), job.run.path, num_clips)

    def _look(self, job: Job, step: int) -> int:
        vae, found, read = job.models["vae"], LatentDiagnostics(), 0
        with averaged_weights(job.averages.values()), torch.no_grad():
            vae.eval()
            for batch in first_clips(job.loader.first_clips(), self.num_clips):
                found.update(vae.encode(batch.to(job.mesh.device).video))
                read += len(batch.video)
            vae.train()
        if job.mesh.is_main:
            result = found.result()
            path = job.run.path / "diagnostics.jsonl"
            rows = [row for row in read_jsonl(path) if row["step"] < step]  # a resumed run looks again
            rows.append({"step": step, "num_clips": read, **result})
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
            for alarm in alarms(result):
                LOG.warning("latents at step %d: %s", step, alarm)
        return read


class AfterTraining:
    """What an objective does once the last step is done, such as measuring latent statistics; before the last checkpoint.

    It sees the moving average where there is one, because that is what others load; buffers that it sets belong to both.
    """

    def __init__(self, finish: Callable[[Mapping[str, nn.Module], Iterable[Batch]], Mapping[str, float]]) -> None:
        self._finish = finish

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Nothing happens between steps."""

    def after_training(self, job: Job, position: PlanState) -> None:
        """Run it, unless training stopped early. Every rank does the same work on the same clips."""
        if position.step < job.config.trainer.max_steps:
            return
        with averaged_weights(job.averages.values()), torch.no_grad():
            numbers = self._finish(job.models, (batch.to(job.mesh.device) for batch in job.loader.first_clips()))
        if job.mesh.is_main:
            LOG.info("after the last step: %s", ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
