"""The loop. It knows phases and steps; what is trained, how it is logged and when it is saved are other files' business."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from videofm.data.loader import Step
from videofm.data.plan import PlanState
from videofm.errors import Interrupted
from videofm.train import state
from videofm.train.build import Job
from videofm.train.busy import Stragglers, slowest_rank
from videofm.train.divergence import roll_back
from videofm.train.optim import learning_rate
from videofm.train.share import compare_holdings, held_tensors, shared_steps
from videofm.train.speed import with_speed


class Callback(Protocol):
    """Something that happens around steps. Every rank calls it; it decides what only the main rank does."""

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """`position.step` optimizer steps are done; `metrics` are those of the last one."""
        ...

    def after_training(self, job: Job, position: PlanState) -> None:
        """The last step is done, or a stop was asked for."""
        ...


def name_of(callback: Callback) -> str:
    """What a callback is called in messages: its class, or the `name` of one that stands for another."""
    return getattr(callback, "name", type(callback).__name__)


def fit(job: Job, position: PlanState, callbacks: Sequence[Callback]) -> PlanState:
    """Train from `position` to `trainer.max_steps`.

    Metrics of a step's speed are those of `speed.with_speed`, and `slowest_rank`: over ranks the largest time over the mean
    time of waiting for data and of the forward passes; `slowest_rank_id` is the rank that took it. A step ends for all ranks at
    once, when their gradients have met: what one rank waits for another shows there alone. (ZeRO 3 meets in the forward passes
    too, and hides part of it.) `data/pack_fill`, where clips are packed, is the share of the packs' tokens that the step uses.
    `data/replaced`, where there are some, counts the samples of the step that took the place of clips that cannot be read, and
    `data/passed_over` the steps of the order that were left out so far (see `divergence`).

    Raises:
        Interrupted: a stop was asked for; the callbacks have saved.
        Diverged: too many steps were skipped, and another attempt may go on with other data.
        VideofmError: the run has gone back as often as it may.
    """
    heartbeat, faults = job.heartbeat, job.config.faults
    stragglers = Stragglers(faults.straggler_share, faults.straggler_steps)
    steps, peak = shared_steps(job.loader, position, job.mesh), job.config.trainer.peak_tflops
    while position.step < job.config.trainer.max_steps:
        started = time.perf_counter()
        heartbeat.beat("reading of the data")
        step = next(steps)
        data_wait = time.perf_counter() - started
        heartbeat.sample_ids = [batch.sample_ids for batch in step.batches]
        heartbeat.beat(f"step {step.after.step}")
        metrics = train_step(job, step)
        position = step.after
        if job.num_samples is not None:
            job.num_samples += step.num_samples
        job.divergence.count(position, _was_skipped(job, metrics))
        _compare(job, step)
        busy = data_wait + sum(engine.busy.take() for engine in job.engines.values())
        slowest = slowest_rank(job.mesh, busy, step.num_replaced)
        stragglers.see(slowest, job.mesh)
        metrics = with_speed(metrics, step.num_samples, time.perf_counter() - started, data_wait, job.mesh, peak)
        metrics |= {"slowest_rank": slowest.share, "slowest_rank_id": float(slowest.rank)}
        if step.fill is not None:
            metrics["data/pack_fill"] = step.fill
        if slowest.num_replaced:
            metrics["data/replaced"] = float(slowest.num_replaced)
        if position.passed_over:
            metrics["data/passed_over"] = float(position.passed_over)
        for callback in callbacks:
            heartbeat.beat(f"callback {name_of(callback)} after step {position.step}")
            callback.after_step(job, position, metrics)
        heartbeat.step = position.step
        if job.divergence.spent:
            roll_back(job.run, job.divergence, position, state.peers_of(job.mesh), state.places(job.run, job.config.trainer))
        if job.mesh.any_rank(job.run.stop_requested) and position.step < job.config.trainer.max_steps:
            _finish(job, position, callbacks)
            done = f"step {position.step} of {job.config.trainer.max_steps}"
            raise Interrupted(f"stopped on request after {done}; run the same command again to go on")
    _finish(job, position, callbacks)
    return position


def train_step(job: Job, step: Step) -> dict[str, float]:
    """One optimizer step of every phase that is active in it, then the moving averages of what it moved.

    Metrics of phases after the first carry the phase's name: `discriminator_loss`.
    """
    config, index = job.config, step.after.step - 1
    batches = [batch.to(job.mesh.device) for batch in step.batches]
    choose = getattr(job.objective, "active_phases", None)
    metrics: dict[str, float] = {}
    for phase in choose(index) if choose else job.engines:
        lr = learning_rate(config.phase_optimizers.get(phase, config.optimizer), index, config.trainer.max_steps)
        found = {**job.engines[phase].step(batches, lr), "lr": lr}
        prefix = "" if phase == next(iter(job.engines)) else f"{phase}_"
        metrics |= {prefix + name: value for name, value in found.items()}
        for role in job.objective.phases[phase]:
            if role in job.averages and not found["skipped"]:
                job.averages[role].update(index)
    return metrics


def _was_skipped(job: Job, metrics: Mapping[str, float]) -> bool:
    """Whether a phase skipped the step; `metrics` are those of `train_step`."""
    return any(metrics.get(name) for name in ("skipped", *(f"{phase}_skipped" for phase in job.engines)))


def _compare(job: Job, step: Step) -> None:
    """Each `parallel.digest_every` steps: see that ranks which share samples hold the same."""
    every = job.config.parallel.digest_every
    if every and step.after.step % every == 0:
        weights = held_tensors(job.models, job.trained_roles)
        compare_holdings(step.after.step, step.after.step // every, step.batches, weights, job.mesh)


def _finish(job: Job, position: PlanState, callbacks: Sequence[Callback]) -> None:
    for callback in callbacks:
        job.heartbeat.beat(f"callback {name_of(callback)} after training")
        callback.after_training(job, position)
