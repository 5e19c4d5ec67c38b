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
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Sampler

from videofm.config.data import DataConfig
from videofm.data.decode import Decoder, choose
from videofm.data.index import ClipRecord
from videofm.data.manifest import Manifest
from videofm.data.plan import DataPlan, Draw, PlanState, StepPlan
from videofm.data.shards import read_clip
from videofm.errors import DataError
from videofm.types import Batch


@dataclass(frozen=True)
class Step:
    """The micro-batches of this rank in one optimizer step, the samples of the step over all ranks, the position after it."""

    batches: list[Batch]
    num_samples: int
    after: PlanState


class ClipReader(Dataset[np.ndarray]):
    """Frames of a draw, resized and cropped, uint8 `(T, H, W, 3)`. Keeps recently decoded clips up to a number of bytes."""

    def __init__(self, folder: Path, plan: DataPlan) -> None:
        self.folder, self.records, self.config = folder, plan.records, plan.config
        self._cache: OrderedDict[tuple[str, tuple[int, int]], np.ndarray] = OrderedDict()
        self._cached_bytes = 0
        self._decoder: Decoder | None = None

    def __getitem__(self, draw: Draw) -> np.ndarray:
        record, wanted = self.records[draw.key], draw.frames
        if self.config.cache_mib == 0:
            frames = self._decode(record, wanted, draw.resized)
        else:
            frames = self._whole(record, draw.resized)[wanted.start : wanted.stop : wanted.step]
        return frames[:, draw.top : draw.top + draw.height, draw.left : draw.left + draw.width]

    def _whole(self, record: ClipRecord, size: tuple[int, int]) -> np.ndarray:
        """All frames of a clip at a size, from memory where they are."""
        if (record.key, size) in self._cache:
            self._cache.move_to_end((record.key, size))
            return self._cache[record.key, size]
        frames = self._decode(record, range(record.num_frames), size)
        self._cache[record.key, size] = frames
        self._cached_bytes += frames.nbytes
        while self._cached_bytes > self.config.cache_mib << 20 and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes
        return frames

    def _decode(self, record: ClipRecord, frames: range, size: tuple[int, int]) -> np.ndarray:
        # The decoder is chosen in the process that uses it: it need not survive the trip to a worker.
        self._decoder = self._decoder or choose(self.config.decoder)
        try:
            images = self._decoder.read(read_clip(self.folder, record), frames)
        except DataError as error:
            raise DataError(f"clip {record.key} of {record.shard}: {error}") from error
        return resize(images, *size)


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
            yield Step([self._batch(draws, next(frames), step) for draws in share], step.num_samples, step.after)

    def first_clips(self) -> Iterator[Batch]:
        """Every micro-batch of the order from its beginning, without end, whichever rank asks; decoded in this process."""
        for step in self.plan.steps():
            for draws in step.micro_batches:
                yield self._batch(draws, np.stack([self._reader[draw] for draw in draws]), step)

    def _batch(self, draws: list[Draw], frames: np.ndarray, step: StepPlan) -> Batch:
        records = [self.plan.records[draw.key] for draw in draws]
        return Batch(
            video=video_tensor(frames),
            captions=[record.caption for record in records],
            fps=torch.tensor([self.plan.records[draw.key].fps / draw.stride for draw in draws], dtype=torch.float32),
            sample_ids=[draw.sample_id for draw in draws],
            step=step.after.step - 1,
            num_step_samples=step.num_samples,
        )


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 frames `(T, H, W, 3)` at another size, bilinear and antialiased; each frame by itself."""
    if frames.shape[1:3] == (height, width):
        return frames
    images = torch.from_numpy(frames).permute(0, 3, 1, 2)  # (T, H, W, C) -> (T, C, H, W)
    images = interpolate(images, (height, width), mode="bilinear", antialias=True)
    return images.permute(0, 2, 3, 1).contiguous().numpy()  # (T, C, H, W) -> (T, H, W, C)


def video_tensor(frames: np.ndarray) -> torch.Tensor:
    """uint8 frames `(B, T, H, W, 3)` as a float video `(B, 3, T, H, W)` in [-1, 1]."""
    video = torch.from_numpy(frames).permute(0, 4, 1, 2, 3)  # (B, T, H, W, C) -> (B, C, T, H, W)
    # Contiguous: convolutions on a CPU are slower on the strides of frames as they were decoded.
    return video.float().contiguous().div_(127.5).sub_(1.0)
