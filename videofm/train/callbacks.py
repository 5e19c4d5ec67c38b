"""What happens around steps: metrics.jsonl and the console, Weights & Biases, checkpoints."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from videofm import models
from videofm.checkpoint.saver import Saver
from videofm.data.plan import PlanState
from videofm.evaluation.latents import LatentDiagnostics, alarms
from videofm.models.vae.statistics import write_statistics
from videofm.objectives.latent_statistics import first_clips
from videofm.progress import LOG, progress
from videofm.run_dir import RunDirectory, code_version, read_jsonl, write_atomic
from videofm.train import state
from videofm.train.build import Job
from videofm.train.optim import averaged_weights
from videofm.types import Batch


class Metrics:
    """metrics.jsonl, a row each step; on the console a bar, or a line each `log_every` steps where it is no terminal."""

    def __init__(self, run: RunDirectory, step: int, max_steps: int, log_every: int, attempt: int) -> None:
        self.log_every, self.attempt = log_every, attempt
        _set_aside_rows_after(run, step, attempt)
        # A row a write: what a killed run did is known to the step.
        self._file = run.metrics_path.open("a", encoding="utf-8", buffering=1)
        self._stack = ExitStack()
        self._progress = self._stack.enter_context(progress("step", max_steps, every=math.inf))
        self._progress.start_at(step)

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Write the row. Rows are on the disk before each checkpoint: a run that resumes from it does not write them again."""
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no infinity
        self._on_disk(lambda: self._file.write(json.dumps({"step": position.step, "attempt": self.attempt, **numbers}) + "\n"))
        note = ", ".join(f"{name} {metrics[name]:.4g}" for name in ("loss", "psnr", "grad_norm") if name in metrics)
        self._progress.advance(1, note)
        if position.step % self.log_every == 0 and not sys.stderr.isatty():
            LOG.info("%s", self._progress.line(note))
        if position.step % job.config.trainer.checkpoint_every == 0:
            self._on_disk(self._sync)

    def after_training(self, job: Job, position: PlanState) -> None:
        """Close the file and the bar."""
        LOG.info("%s", self._progress.line())
        self._stack.close()
        self._on_disk(self._sync)
        self._on_disk(self._file.close)

    def _on_disk(self, write: Callable[[], object]) -> None:
        """A full disk must not end a run before its state is in `trainer.spare_checkpoints`. What could not be written stays in
        the file's buffer, and goes out with the next row for which there is room."""
        try:
            write()
        except OSError as error:
            LOG.error("%s cannot be written (%s); rows of this attempt may be missing there", self._file.name, error)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


class Wandb:
    """A copy of the metrics to Weights & Biases, on the main rank. It never asks for a key: `offline` writes files.

    It never stops training: a service or a disk that fails costs rows of the copy, which are counted, and one that hangs at the
    end is left behind after `finish_seconds`. It comes last among the callbacks, so that nothing waits for it.
    """

    def __init__(self, job: Job, finish_seconds: float = 60.0) -> None:
        """
        Args:
            job: of the run.
            finish_seconds: longest time that training waits at the end for what is not sent or written yet.
        """
        self._folder, self._finish_seconds, self._failed = job.run.path / "wandb", finish_seconds, 0
        try:
            self._run: Any = _wandb_run(job)
        except Exception as error:
            self._run = None
            LOG.warning("wandb could not be started: %s: %s; metrics.jsonl has every row", type(error).__name__, error)

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Log the row."""
        if self._run is None:
            self._failed += 1
            return
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
        if self._run is None:
            return
        thread = threading.Thread(target=self._finish, name="wandb-finish", daemon=True)
        thread.start()
        deadline = time.monotonic() + self._finish_seconds
        while thread.is_alive() and (left := deadline - time.monotonic()) > 0:
            job.heartbeat.beat()  # a wait with an end of its own is no hang
            thread.join(min(left, 1.0))
        if thread.is_alive():
            LOG.warning(
                "wandb did not finish within %g s and is left behind; %s has its files, for `wandb sync`",
                self._finish_seconds,
                self._folder,
            )

    def _finish(self) -> None:
        try:
            self._run.finish()
        except Exception as error:
            LOG.warning("wandb could not finish: %s; %s has its files, for `wandb sync`", error, self._folder)


def _wandb_run(job: Job) -> Any:
    # wandb wraps an optional service; it is imported only where it is switched on.
    import wandb

    config = job.config
    return wandb.init(
        project=config.wandb.project,
        name=job.run.path.name,
        dir=str(job.run.path),
        mode=config.wandb.mode,
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True),
    )


class Checkpoints:
    """A checkpoint each `checkpoint_every` steps, and one where training stops.

    It has two places among the callbacks. `copying` stands before the row of the step is written: what training waited for is
    one of its metrics. This stands behind it and has the copy written, so that the rows are on disk before their checkpoint is.
    """

    def __init__(self, health: Callable[[], bool] = lambda: True) -> None:
        """
        Args:
            health: whether training goes well at this moment; a checkpoint says so.
        """
        self.copying = CheckpointCopies(self)
        self._health = health
        self._saver: Saver | None = None
        self._code = code_version()
        self._metrics: dict[str, float] = {}
        self._copied = False

    def copy_if_due(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Settle the save before, copy the state where the count says so, and add to the metrics of the step
        `checkpoint_stall`, seconds that training waited for checkpoints since the row before, where it did, and
        `num_failed_saves`, where there are some."""
        writer, trainer = self._writer(job), job.config.trainer
        self._metrics = metrics
        writer.check()
        if job.divergence.spent:
            # The loop goes back now: it must see all checkpoints that there are, and no thread may add one. This state is given
            # up, so it is not saved.
            writer.wait()
        elif position.step % trainer.checkpoint_every == 0 and position.step < trainer.max_steps:
            self._copy(job, position)
            self._copied = True
        if stall := writer.take_stall():
            metrics["checkpoint_stall"] = stall
        if writer.num_failed:
            metrics["num_failed_saves"] = float(writer.num_failed)

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Have the copy written, if there is one."""
        if self._copied:
            self._copied = False
            self._writer(job).write()

    def after_training(self, job: Job, position: PlanState) -> None:
        """Save the last state, unless the last step did, and wait until it is on disk."""
        writer = self._writer(job)
        writer.wait()
        while writer.last_step != position.step:  # a disk may fail once; the second time it raises
            self._copy(job, position)
            writer.write()
            writer.wait()

    def _copy(self, job: Job, position: PlanState) -> None:
        facts = state.facts(job, position, self._metrics, self._health(), self._code)
        self._writer(job).copy(facts, state.content(job, position))

    def _writer(self, job: Job) -> Saver:
        if self._saver is None:
            self._saver = state.saver(job)
        return self._saver


class CheckpointCopies:
    """The first of the two places of `Checkpoints`."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Copy the state where the count says so."""
        self._checkpoints.copy_if_due(job, position, metrics)

    def after_training(self, job: Job, position: PlanState) -> None:
        """The last state is copied where it is written."""


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
            for batch in job.heartbeat.over(first_clips(job.loader.first_clips(), self.num_clips), "diagnostics of latents"):
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
            clips = job.heartbeat.over(job.loader.first_clips(), "what the objective does after training")
            numbers = self._finish(job.models, (batch.to(job.mesh.device) for batch in clips))
        if job.mesh.is_main:
            LOG.info("after the last step: %s", ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
