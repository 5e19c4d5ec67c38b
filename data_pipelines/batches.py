"""Clips in batches to a model that may die: who asks, who is to blame, and what comes back.

The actor writes into the attempts log before it works on a batch (`actors.py`). When it dies, the log tells which clips it was
at: those are asked one by one, and one that kills the actor as often as allowed is quarantined.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.attempts import AttemptsLog
from data_pipelines.frames import frames_path, read_frames
from data_pipelines.metrics import StageMetrics, latency_bin
from data_pipelines.rows import FrameRequest, Loss, Refusal, Rejected, Row
from videofm.errors import DataError, TransientError, VideofmError

Array = np.ndarray[Any, Any]
MAX_ROWS = 64
"""Clips in a batch, at most."""
_QUEUE_DEATHS = 20
"""A clip that waited in the queue of an actor that died is sent again this often; then something else is wrong."""
_TRANSIENT_TRIES = 3
_FIRST_PAUSE = 0.5


class ModelDied(Exception):
    """The actor died with a batch on its way to it or in it."""


@dataclass(frozen=True)
class Answers:
    """What a model answered, one a clip, and the seconds of CPU and wall time that it took."""

    rows: list[Row | Rejected]
    cpu_seconds: float
    wall_seconds: float


Ask = Callable[[Sequence[Row], Sequence[Array], Path], Answers]
"""Send clips and their frames `(T, H, W, 3)` to the model; the path is that of the attempts log.

It raises `ModelDied`; a `VideofmError`, which ends the run; or what else the model raised, which says something about the
clips."""


class Batches:
    """Gathers clips of a group and asks the model of a step."""

    def __init__(
        self, ask: Ask, request: FrameRequest, log: Path, max_attempts: int, batch_mib: int, metrics: StageMetrics
    ) -> None:
        self.ask, self.request, self.max_attempts, self.metrics = ask, request, max_attempts, metrics
        self.log = AttemptsLog(log)
        frame_bytes = request.num_frames * request.height * request.width * 3
        self.max_rows = max(1, min(MAX_ROWS, batch_mib * 2**20 // frame_bytes))
        self.losses: list[Loss] = []
        self._rows: list[Row] = []
        self._frames: list[Array] = []

    def add(self, rows: Sequence[Row], scratch: Path) -> list[Row]:
        """Take clips whose frames lie in `scratch`; what the model has answered by now."""
        answered: list[Row] = []
        for row in rows:
            self._rows.append(row)
            self._frames.append(read_frames(scratch, row, self.request))
            frames_path(scratch, row).unlink()
            if len(self._rows) >= self.max_rows:
                answered += self.flush()
        return answered

    def flush(self) -> list[Row]:
        """Ask for what is left."""
        rows, frames = self._rows, self._frames
        self._rows, self._frames = [], []
        suspect = [bool(self.log.failures(row.key)) for row in rows]
        calm = [index for index, bad in enumerate(suspect) if not bad]
        answered = self._batch([rows[i] for i in calm], [frames[i] for i in calm]) if calm else []
        for index in (i for i, bad in enumerate(suspect) if bad):
            answered += self._single(rows[index], frames[index])
        return answered

    def _batch(self, rows: list[Row], frames: list[Array]) -> list[Row]:
        """Several clips at once; one by one where that fails."""
        if len(rows) == 1:
            return self._single(rows[0], frames[0])
        for _ in range(_QUEUE_DEATHS):
            try:
                return self._accept(rows, self._asked(rows, frames))
            except ModelDied:
                if not self._blamed(rows):
                    continue
            except VideofmError:  # says something about the request or the model, not about a clip
                raise
            except Exception:  # one of them is the reason; which one, the single calls tell
                pass
            self.metrics.retries += 1
            return [answer for row, frame in zip(rows, frames, strict=True) for answer in self._single(row, frame)]
        raise self._too_many_deaths()

    def _single(self, row: Row, frame: Array) -> list[Row]:
        queued = 0
        while self.log.failures(row.key) < self.max_attempts:
            try:
                answers = self._asked([row], [frame])
            except ModelDied:
                queued += not self._blamed([row])
                self.metrics.retries += 1
                if queued >= _QUEUE_DEATHS:
                    raise self._too_many_deaths() from None
            except VideofmError:
                raise
            except Exception as error:
                if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
                    raise self._too_little_memory(error) from None
                self._forgive(row)
                self._lose(Loss("errors", self.metrics.stage, row.name, type(error).__name__, str(error)[:500]), row)
                return []
            else:
                self._forgive(row)
                return self._accept([row], answers)
        detail = f"the model's process died {self.log.failures(row.key)} times on it"
        self._lose(Loss("quarantined", self.metrics.stage, row.name, "model_crash", detail), row)
        return []

    def _asked(self, rows: list[Row], frames: list[Array]) -> Answers:
        for attempt in range(_TRANSIENT_TRIES):
            try:
                return self.ask(rows, frames, self.log.path)
            except TransientError:
                if attempt + 1 == _TRANSIENT_TRIES:
                    raise
                self.metrics.retries += 1
                time.sleep(_FIRST_PAUSE * 2**attempt)
        raise AssertionError("the loop returns or raises")

    def _blamed(self, rows: Sequence[Row]) -> bool:
        """Whether the actor died while it worked on these clips; else they only waited for it."""
        before = sum(self.log.failures(row.key) for row in rows)
        self.log = AttemptsLog(self.log.path)
        return sum(self.log.failures(row.key) for row in rows) > before

    def _forgive(self, row: Row) -> None:
        """Earlier deaths were not this clip's: it got through."""
        self.log = AttemptsLog(self.log.path)
        while self.log.failures(row.key) > 0:
            self.log.end(row.key, "stopped")

    def _accept(self, rows: Sequence[Row], answers: Answers) -> list[Row]:
        """Count the answers; the rows among them."""
        assert len(answers.rows) == len(rows), f"{self.metrics.stage}: {len(rows)} clips, {len(answers.rows)} answers"
        self.metrics.cpu_seconds += answers.cpu_seconds
        self.metrics.wall_seconds += answers.wall_seconds
        self.metrics.latency[latency_bin(answers.wall_seconds / len(rows))] += len(rows)
        kept = []
        for row, answer in zip(rows, answers.rows, strict=True):
            if isinstance(answer, Refusal):
                loss = Loss(answer.kind, self.metrics.stage, row.name, answer.reason, answer.detail, scores=answer.scores)
                self._lose(loss, row)
            else:
                kept.append(answer)
        self.metrics.num_out += len(kept)
        self.metrics.num_made += len(kept)
        return kept

    def _lose(self, loss: Loss, row: Row) -> None:
        facts = {**vars(loss), "start": row.start, "stop": row.stop, "span": row.span, "scores": {**row.scores, **loss.scores}}
        self.metrics.lose(loss)
        self.losses.append(Loss(**facts))

    def _too_little_memory(self, error: Exception) -> DataError:
        return DataError(
            f"{self.metrics.stage}: the model has no memory for one clip: {str(error)[:300] or type(error).__name__}; lower "
            "the stage's batch_size, or free memory of the device, then run again"
        )

    def _too_many_deaths(self) -> DataError:
        return DataError(
            f"{self.metrics.stage}: the model's process died {_QUEUE_DEATHS} times while clips waited for it; see that it "
            "fits into the memory of the machine, then run again"
        )
