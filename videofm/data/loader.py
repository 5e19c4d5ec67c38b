"""From the plan to batches: read the clips of this rank's micro-batches, decode them, make tensors.

The process that trains owns the plan; decoding processes get clips to read and give frames back (`workers.py`). A clip that
cannot be read is replaced by a spare of the plan, the same on every rank. The position counts the steps that were *consumed*,
so what was fetched ahead is simply fetched again after a resume. Pixels stay uint8, in the memory that they were decoded into;
`Batch.to` scales them, on the device that trains.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videofm.config.data import DataConfig
from videofm.data import storage
from videofm.data.bad_clips import BadClips
from videofm.data.buffers import Buffers
from videofm.data.cache import ShardCache
from videofm.data.draws import by_size, units
from videofm.data.fixed import clip_request
from videofm.data.index import ClipRecord
from videofm.data.manifest import Manifest
from videofm.data.packing import pack
from videofm.data.pairs import open_plan
from videofm.data.plan import REMEMBERED_STEPS, Draw, PlanState, StepPlan
from videofm.data.reader import BadClipError, ClipReader, ClipRequest, ReaderSettings, resize, video_tensor, video_view
from videofm.data.workers import Decoding, InProcess, Job, WorkerPool
from videofm.errors import DataError
from videofm.files import sha256_of
from videofm.types import Batch

__all__ = ["Step", "StepLoader", "resize", "video_tensor"]

_CLIPS_AHEAD = 16
"""Clips a worker that are asked for before they are needed, where memory lasts."""


@dataclass(frozen=True)
class Step:
    """The micro-batches of this rank in one optimizer step, the samples of the step over all ranks, the position after it, how
    many samples of this rank took the place of clips that cannot be read, and with packs the share of their tokens in use."""

    batches: list[Batch]
    num_samples: int
    after: PlanState
    num_replaced: int = 0
    fill: float | None = None


@dataclass
class _Asked:
    """A sample that is being read: what the plan drew, the clip that is read for it, its record and job, and what comes beside
    its frames."""

    drawn: Draw
    draw: Draw
    record: ClipRecord
    job: Job
    num_spares: int = 0
    beside: Any = None


@dataclass(frozen=True)
class _MicroBatch:
    """A micro-batch, or the clips of one size of a pack: frames `(B, T, H, W, 3)`, and the samples that are read into them."""

    frames: np.ndarray
    samples: list[_Asked]


class StepLoader:
    """Iterates the steps of one data rank, from a position on.

    Attributes:
        plan: the order.
        bad_clips: the clips that could not be read so far.
        counts: what happened to decoding processes (`WorkerPool.counts`) and to copies of shards (`ShardCache.counts`).
    """

    def __init__(
        self, config: DataConfig, seed: int, data_rank: int = 0, data_degree: int = 1, quarantine: Path | None = None
    ) -> None:
        """
        Args:
            config: the section `data`.
            seed: of the run.
            data_rank: whose micro-batches.
            data_degree: of how many ranks.
            quarantine: a file to which clips are added that cannot be read; see `BadClips`.

        Raises:
            DataError: the shards are missing or damaged, or hold no usable clip; no decoder works.
            ConfigError: the decoder cannot be used here, or not for this dataset.
        """
        self.config, self.data_rank, self.data_degree = config, data_rank, data_degree
        self.settings = reader_settings(config)
        self.plan = open_plan(config, seed, self._fetch if config.reading.cache_dir is not None else None)
        self.bad_clips = BadClips(config.reading.max_replaced_share, quarantine)
        self.counts: Counter[str] = Counter()
        self._reader, self._frames = ClipReader(self.settings), Buffers()
        for manifest in self._manifests.values():
            # The self-test of what decodes, before the first step.
            self._reader.decoder(canonical=not str(manifest.table["config_hash"][0].as_py()).startswith("foreign:"))

    def steps(self, state: PlanState | None = None) -> Iterator[Step]:
        """Steps from `state` on, without end. Call again to start elsewhere."""
        decoding: Decoding = InProcess(self._reader)
        if self.config.num_workers:
            decoding = WorkerPool(self.config.num_workers, self.settings, self.config.reading)
        plans = self.plan.steps(state or PlanState())
        ahead: deque[tuple[StepPlan, list[list[_MicroBatch]]]] = deque()
        decoding.counts = self.counts
        try:
            while True:
                while not ahead or (self.config.num_workers and self._has_room(ahead)):
                    step = next(plans)
                    share = step.share(self.data_rank, self.data_degree)
                    ahead.append((step, [self._begin(decoding, draws) for draws in share]))
                step, micro_batches = ahead.popleft()
                before = self.bad_clips.num_replaced
                batches = [self._batch(decoding, micro_batch, step) for micro_batch in micro_batches]
                yield Step(batches, step.num_samples, step.after, self.bad_clips.num_replaced - before, step.fill)
        finally:
            decoding.close()

    def first_clips(self) -> Iterator[Batch]:
        """Every micro-batch of the order from its beginning, without end, whichever rank asks; decoded in this process."""
        decoding = InProcess(self._reader)
        decoding.counts = self.counts
        for step in self.plan.steps():
            for draws in step.micro_batches:
                yield self._batch(decoding, self._begin(decoding, draws), step)

    def _has_room(self, ahead: deque[tuple[StepPlan, list[list[_MicroBatch]]]]) -> bool:
        """Whether one more step may be read ahead: always one, and more while workers could run dry, memory lasts and the plan
        knows the spares of the first."""
        parts = [part for _, batches in ahead for batch in batches for part in batch]
        num_bytes = sum(part.frames.nbytes for part in parts)
        num_clips = sum(len(part.samples) for part in parts)
        few = num_clips < _CLIPS_AHEAD * self.config.num_workers
        if len(ahead) < 2:
            return True
        lasts = num_bytes + num_bytes // len(ahead) <= self.config.reading.prefetch_mib << 20
        return few and lasts and len(ahead) < REMEMBERED_STEPS

    def _begin(self, decoding: Decoding, draws: list[Draw]) -> list[_MicroBatch]:
        """Ask for the clips of a micro-batch, by size: one but for a pack."""
        return [self._begin_size(decoding, same) for same in by_size(draws)]

    def _begin_size(self, decoding: Decoding, draws: list[Draw]) -> _MicroBatch:
        shape = (len(draws), draws[0].num_frames, draws[0].height, draws[0].width, 3)
        frames = self._frames.take(shape, np.uint8)
        return _MicroBatch(frames, [self._sample(decoding, draw, draw, out) for draw, out in zip(draws, frames, strict=True)])

    def _sample(self, decoding: Decoding, drawn: Draw, draw: Draw, out: np.ndarray, num_spares: int = 0) -> _Asked:
        record = self.plan.record(draw)
        request = clip_request(self._manifests[draw.source], draw.shard, record, draw)
        if not self.config.verify_checksums:
            request = replace(request, sha256=None)
        if (problem := self.bad_clips.problem(request)) is None:
            return _Asked(drawn, draw, record, decoding.ask(request, out, first=num_spares > 0), num_spares)
        job = Job(request, out)
        job.finish(problem)
        return _Asked(drawn, draw, record, job, num_spares)

    def _read(self, decoding: Decoding, unit: list[_Asked]) -> list[_Asked]:
        """Wait for the clips of a sample; them, or those of the spare that took its place."""
        while True:
            # All are waited for, as a spare is read into the same memory.
            found = [(sample, self._problem(decoding, sample)) for sample in unit]
            bad = [(sample.draw, sample.job.request, error) for sample, error in found if error is not None]
            if not bad:
                self.bad_clips.good(len(unit))
                return unit
            self._blame(bad)
            spares = [self.plan.replacement(sample.drawn, sample.num_spares) for sample in unit]
            unit = [
                self._sample(decoding, sample.drawn, spare, sample.job.out, sample.num_spares + 1)
                for sample, spare in zip(unit, spares, strict=True)
            ]

    def _problem(self, decoding: Decoding, sample: _Asked) -> BadClipError | None:
        """Wait for a clip; why it cannot be read, or None."""
        try:
            if sample.job.error is not None:
                raise sample.job.error
            decoding.wait(sample.job)
            sample.beside = self._beside(sample.draw)
        except BadClipError as error:
            error.__traceback__ = None  # the pool remembers the error, and this would keep the frames of each sample
            return error
        return None

    def _blame(self, bad: Sequence[tuple[Draw, ClipRequest, BadClipError]]) -> None:
        """Write down the clips of one sample that cannot be read.

        Raises:
            DataError: they are too many, or the plan does not let another sample take its place.
        """
        for number, (draw, request, error) in enumerate(bad):
            self.plan.check_replaceable(draw, error)
            self.bad_clips.bad(request, error, replaces=number == 0)

    def _batch(self, decoding: Decoding, micro_batch: list[_MicroBatch], step: StepPlan) -> Batch:
        parts = [self._batch_of_size(decoding, part, step) for part in micro_batch]
        return parts[0] if self.config.packing is None else pack(parts)

    def _batch_of_size(self, decoding: Decoding, micro_batch: _MicroBatch, step: StepPlan) -> Batch:
        samples = list(micro_batch.samples)
        for unit in units([sample.drawn for sample in samples]):
            for index, sample in zip(unit, self._read(decoding, [samples[index] for index in unit]), strict=True):
                samples[index] = sample
        return Batch(
            video=video_view(micro_batch.frames),
            captions=[sample.record.caption for sample in samples],
            fps=torch.tensor([sample.record.fps / sample.draw.stride for sample in samples], dtype=torch.float32),
            sample_ids=[sample.draw.sample_id for sample in samples],
            step=step.after.step - 1,
            num_step_samples=step.num_samples,
            **self._fields([sample.beside for sample in samples]),
            **self.plan.batch_fields([sample.draw for sample in samples]),
        )

    def _beside(self, draw: Draw) -> Any:
        """What comes beside the frames of a draw; a loader that has something gives it here.

        Raises:
            BadClipError: it is damaged; another clip takes the place of this one.
        """
        return None

    def _fields(self, beside: Sequence[Any]) -> dict[str, Any]:
        """More fields of a batch, of what `_beside` gave for its clips."""
        return {}

    def _fetch(self, place: str, name: str, sha256: str) -> Path:
        """An index file of a dataset as a local one."""
        where = storage.join(place, name)
        if (local := storage.local_path(where)) is None:
            return self._index_copies.fetch(where, sha256)
        if not local.is_file() or sha256_of(local) != sha256:
            raise DataError(f"{local} is missing or damaged: its SHA-256 is not {sha256}; restore it or curate again")
        return local

    @cached_property
    def _index_copies(self) -> ShardCache:
        reading = self.config.reading
        return ShardCache(str(reading.cache_dir), int(reading.cache_gib * 2**30), reading.read_timeout)

    @cached_property
    def _manifests(self) -> dict[str, Manifest]:
        found = {}
        for name, source in self.plan.sources.items():
            assert isinstance(source.dataset, Manifest)
            found[name] = source.dataset
        return found


def reader_settings(config: DataConfig) -> ReaderSettings:
    """What a reader of clips needs to know of the section `data`."""
    reading = config.reading
    return ReaderSettings(config.decoder, config.cache_mib, reading.read_timeout, reading.cache_dir, reading.cache_gib)
