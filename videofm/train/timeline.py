"""What the main rank writes to `events.jsonl`: its first step, and how long training waited for its callbacks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from videofm.data.plan import PlanState
from videofm.run_dir import RunDirectory
from videofm.train import goodput
from videofm.train.build import Job
from videofm.train.callbacks import CheckpointCopies, Checkpoints
from videofm.train.trainer import Callback, name_of

_LEAST_SECONDS = 0.1
"""Shorter pauses are added up before they are written, so that writing costs nothing beside them."""


class FirstStep:
    """Says when the first step of an attempt was done, and how long it took."""

    def __init__(self, attempt: int) -> None:
        self._attempt, self._told = attempt, False

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Write it once."""
        if not self._told:
            goodput.record(job.run, self._attempt, goodput.FIRST_STEP, step=position.step, seconds=metrics["seconds"])
            self._told = True

    def after_training(self, job: Job, position: PlanState) -> None:
        """Nothing is left to do."""


class Timed:
    """A callback whose time is written: training waits for it."""

    def __init__(self, callback: Callback, run: RunDirectory, attempt: int) -> None:
        self._callback, self._run, self._attempt = callback, run, attempt
        self.name = name_of(callback)
        self._what = goodput.CHECKPOINT if isinstance(callback, Checkpoints | CheckpointCopies) else self.name
        self._seconds = 0.0

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Do what the callback does."""
        with self._counted(_LEAST_SECONDS):
            self._callback.after_step(job, position, metrics)

    def after_training(self, job: Job, position: PlanState) -> None:
        """Do what the callback does, and write what is left to tell."""
        with self._counted(0.0):
            self._callback.after_training(job, position)

    @contextmanager
    def _counted(self, least: float) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started
            if self._seconds > least:
                goodput.record(self._run, self._attempt, goodput.PAUSE, what=self._what, seconds=self._seconds)
                self._seconds = 0.0


def timed(callbacks: Iterable[Callback], run: RunDirectory, attempt: int) -> list[Callback]:
    """The callbacks of the main rank in this attempt, with their time and the first step written."""
    return [FirstStep(attempt), *(Timed(callback, run, attempt) for callback in callbacks)]
