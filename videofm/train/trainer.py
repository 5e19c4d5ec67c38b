"""The loop. It knows phases and steps; what is trained, how it is logged and when it is saved are other files' business."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from videofm.data.loader import Step
from videofm.data.plan import PlanState
from videofm.errors import Interrupted
from videofm.train.build import Job
from videofm.train.optim import learning_rate


class Callback(Protocol):
    """Something that happens around steps. Every rank calls it; it decides what only the main rank does."""

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """`position.step` optimizer steps are done; `metrics` are those of the last one."""
        ...

    def after_training(self, job: Job, position: PlanState) -> None:
        """The last step is done, or a stop was asked for."""
        ...


def fit(job: Job, position: PlanState, callbacks: Sequence[Callback]) -> PlanState:
    """Train from `position` to `trainer.max_steps`.

    Raises:
        Interrupted: a stop was asked for; the callbacks have saved.
    """
    steps = job.loader.steps(position)
    while position.step < job.config.trainer.max_steps:
        started = time.perf_counter()
        step = next(steps)
        data_wait = time.perf_counter() - started
        metrics = train_step(job, step)
        position = step.after
        metrics |= _speed(job, time.perf_counter() - started, data_wait)
        for callback in callbacks:
            callback.after_step(job, position, metrics)
        if job.mesh.any_rank(job.run.stop_requested) and position.step < job.config.trainer.max_steps:
            _finish(job, position, callbacks)
            done = f"step {position.step} of {job.config.trainer.max_steps}"
            raise Interrupted(f"stopped on request after {done}; run the same command again to go on")
    _finish(job, position, callbacks)
    return position


def train_step(job: Job, step: Step) -> dict[str, float]:
    """One optimizer step of every phase, then the moving averages."""
    index = step.after.step - 1
    lr = learning_rate(job.config.optimizer, index, job.config.trainer.max_steps)
    batches = [batch.to(job.mesh.device) for batch in step.batches]
    metrics: dict[str, float] = {}
    for engine in job.engines.values():
        metrics |= engine.step(batches, lr)
    for average in job.averages.values():
        average.update(index)
    return {**metrics, "lr": lr}


def _finish(job: Job, position: PlanState, callbacks: Sequence[Callback]) -> None:
    for callback in callbacks:
        callback.after_training(job, position)


def _speed(job: Job, seconds: float, data_wait: float) -> dict[str, float]:
    samples = job.loader.plan.num_step_samples
    return {"seconds": seconds, "data_wait": data_wait, "samples_per_second": samples / seconds}
