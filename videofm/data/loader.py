"""From the plan to batches: read the clips of this rank's micro-batches, decode them, make tensors.

The process that trains owns the plan; decoding processes get draws and give frames back, in order. The position counts the
steps that were *consumed*, so what was fetched ahead is simply fetched again after a resume.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from videofm.config.data import DataConfig
from videofm.data.decode import Decoder, choose
from videofm.data.plan import DataPlan, Draw, PlanState
from videofm.data.shards import ClipRecord, Manifest, read_clip
from videofm.errors import DataError
from videofm.types import Batch


@dataclass(frozen=True)
class Step:
    """The micro-batches of this rank in one optimizer step, and the position after it."""

    batches: list[Batch]
    after: PlanState


class ClipReader(Dataset[np.ndarray]):
    """Frames of a draw, uint8 `(T, H, W, 3)`. Keeps recently decoded clips up to a number of bytes."""

    def __init__(self, folder: Path, plan: DataPlan) -> None:
        self.folder, self.records, self.config = folder, plan.records, plan.config
        self._cache: OrderedDict[str, np.ndarray] = OrderedDict()
        self._cached_bytes = 0
        self._decoder: Decoder | None = None

    def __getitem__(self, draw: Draw) -> np.ndarray:
        start, stop = draw.start_frame, draw.start_frame + self.config.num_frames
        if self.config.cache_mib == 0:
            return self._decode(self.records[draw.key], range(start, stop))
        return self._whole(self.records[draw.key])[start:stop]

    def _whole(self, record: ClipRecord) -> np.ndarray:
        """All frames of a clip, from memory where they are."""
        if record.key in self._cache:
            self._cache.move_to_end(record.key)
            return self._cache[record.key]
        frames = self._decode(record, range(record.num_frames))
        self._cache[record.key] = frames
        self._cached_bytes += frames.nbytes
        while self._cached_bytes > self.config.cache_mib << 20 and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        return frames

    def _decode(self, record: ClipRecord, frames: range) -> np.ndarray:
        # The decoder is chosen in the process that uses it: it need not survive the trip to a worker.
        self._decoder = self._decoder or choose(self.config.decoder)
        try:
            return self._decoder.read(read_clip(self.folder, record), frames)
        except DataError as error:
            raise DataError(f"clip {record.key} of {record.shard}: {error}") from error


class _Share(Sampler[list[Draw]]):
    """The micro-batches of one rank from `state` on, each a list of draws; endless."""

    def __init__(self, plan: DataPlan, state: PlanState, data_rank: int, data_degree: int) -> None:
        self.plan, self.state, self.data_rank, self.data_degree = plan, state, data_rank, data_degree

    def __iter__(self) -> Iterator[list[Draw]]:
        for step in self.plan.steps(self.state):
            yield from step.share(self.data_rank, self.data_degree)


class StepLoader:
    """Iterates the steps of one data rank, from a position on."""

    def __init__(self, config: DataConfig, seed: int, data_rank: int = 0, data_degree: int = 1) -> None:
        """
        Raises:
            DataError: the shards are missing or damaged, or hold no usable clip.
        """
        self.config, self.data_rank, self.data_degree = config, data_rank, data_degree
        manifest = Manifest.load(Path(config.manifest))
        if config.verify_checksums and data_rank == 0:
            manifest.verify()
        self.plan = DataPlan(manifest.records(config.split), manifest.hash, config, seed)
        self._reader = ClipReader(Path(config.manifest), self.plan)

    def steps(self, state: PlanState | None = None) -> Iterator[Step]:
        """Steps from `state` on, without end. Call again to start elsewhere."""
        state = state or PlanState()
        loader = DataLoader(
            self._reader,
            batch_sampler=_Share(self.plan, state, self.data_rank, self.data_degree),
            num_workers=self.config.num_workers,
            collate_fn=np.stack,
            multiprocessing_context="forkserver" if self.config.num_workers else None,
        )
        frames = iter(loader)
        for step in self.plan.steps(state):
            share = step.share(self.data_rank, self.data_degree)
            yield Step([self._batch(draws, next(frames), step.after.step - 1) for draws in share], step.after)

    def first_clips(self) -> Iterator[Batch]:
        """Every micro-batch of the order from its beginning, without end, whichever rank asks; decoded in this process."""
        for step in self.plan.steps():
            for draws in step.micro_batches:
                yield self._batch(draws, np.stack([self._reader[draw] for draw in draws]), step.after.step - 1)

    def _batch(self, draws: list[Draw], frames: np.ndarray, step: int) -> Batch:
        records = [self.plan.records[draw.key] for draw in draws]
        return Batch(
            video=video_tensor(frames),
            captions=[record.caption for record in records],
            fps=torch.tensor([record.fps for record in records], dtype=torch.float32),
            sample_ids=[draw.sample_id for draw in draws],
            step=step,
            num_step_samples=self.plan.num_step_samples,
        )


def video_tensor(frames: np.ndarray) -> torch.Tensor:
    """uint8 frames `(B, T, H, W, 3)` as a float video `(B, 3, T, H, W)` in [-1, 1]."""
    video = torch.from_numpy(frames).permute(0, 4, 1, 2, 3)  # (B, T, H, W, C) -> (B, C, T, H, W)
    return video.float().div_(127.5).sub_(1.0)
