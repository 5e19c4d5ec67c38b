"""The order of samples, as a pure function of a seed, a manifest and a few numbers.

Shards are permuted by (seed, epoch) and cut into windows; the clips of a window are permuted; consecutive runs of
`micro_batch_size * num_micro_batches` clips are the optimizer steps, and what is left over is carried into the next window.
A data rank r of W takes the micro-batches `r, W + r, 2W + r, ...` of each step. World size, workers and prefetch do not enter,
so the position is a few integers and the carried clips, the same on every rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from videofm.config.data import DataConfig
from videofm.data.shards import ClipRecord
from videofm.errors import CheckpointError, DataError


@dataclass(frozen=True)
class Draw:
    """One clip in the order: the record's key, the epoch in which it is drawn, and the first frame to read."""

    key: str
    epoch: int
    start_frame: int

    @property
    def sample_id(self) -> str:
        """Names this draw; every random number about the sample is keyed by it."""
        return f"{self.key}@{self.epoch}"


@dataclass(frozen=True)
class PlanState:
    """Where the order stands: before step `step`, which is `step_in_window` of window `window` of epoch `epoch`."""

    step: int = 0
    epoch: int = 0
    window: int = 0
    step_in_window: int = 0
    carry: tuple[tuple[str, int], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PlanState:
        """The inverse of `to_json`."""
        return cls(**{**value, "carry": tuple((key, epoch) for key, epoch in value["carry"])})


@dataclass(frozen=True)
class StepPlan:
    """The micro-batches of one optimizer step, and the state after it."""

    micro_batches: list[list[Draw]]
    after: PlanState

    def share(self, data_rank: int, data_degree: int) -> list[list[Draw]]:
        """The micro-batches of one data rank, in order."""
        return self.micro_batches[data_rank::data_degree]


class DataPlan:
    """The endless order of one dataset under one configuration."""

    def __init__(self, records: Sequence[ClipRecord], manifest_hash: str, config: DataConfig, seed: int) -> None:
        """
        Raises:
            DataError: no clip is long enough, or stored at the configured size.
        """
        self.config, self.seed = config, seed
        self.records = {record.key: record for record in _eligible(records, config)}
        self._shards: dict[str, list[str]] = {}
        for key, record in sorted(self.records.items()):
            self._shards.setdefault(record.shard, []).append(key)
        self.identity: dict[str, Any] = {
            "seed": seed,
            "manifest": manifest_hash,
            "split": config.split,
            "num_frames": config.num_frames,
            "height": config.height,
            "width": config.width,
            "micro_batch_size": config.micro_batch_size,
            "num_micro_batches": config.num_micro_batches,
            "window_shards": config.window_shards,
        }

    @property
    def num_step_samples(self) -> int:
        """Samples of an optimizer step over all ranks."""
        return self.config.micro_batch_size * self.config.num_micro_batches

    def steps(self, state: PlanState | None = None) -> Iterator[StepPlan]:
        """The steps from `state` on, without end."""
        state = state or PlanState()
        while True:
            order = list(state.carry) + self._window(state.epoch, state.window)
            num_steps = len(order) // self.num_step_samples
            for index in range(state.step_in_window, num_steps):
                state = replace(state, step=state.step + 1, step_in_window=index + 1)
                yield StepPlan(self._micro_batches(order, index), state)
            last = state.window + 1 >= self._num_windows
            state = PlanState(
                step=state.step,
                epoch=state.epoch + last,
                window=0 if last else state.window + 1,
                carry=tuple(order[num_steps * self.num_step_samples :]),
            )

    def check(self, identity: dict[str, Any]) -> None:
        """Refuse a position that belongs to another order.

        Raises:
            CheckpointError: a field differs; the message names each with both values.
        """
        changed = [
            f"{name} was {identity.get(name)!r}, now {value!r}"
            for name, value in self.identity.items()
            if identity.get(name) != value
        ]
        if changed:
            raise CheckpointError(
                f"the data order of the checkpoint is not the one asked for: {'; '.join(changed)}. "
                "Restore these values, or start a new run from the weights alone."
            )

    @property
    def _num_windows(self) -> int:
        return -(-len(self._shards) // self.config.window_shards)

    def _window(self, epoch: int, window: int) -> list[tuple[str, int]]:
        """Keys with their epoch, in the order of the window."""
        shards = sorted(self._shards)
        order = _rng(self.seed, "shards", epoch).permutation(len(shards))
        size = self.config.window_shards
        keys = [key for index in order[window * size : (window + 1) * size] for key in self._shards[shards[index]]]
        shuffled = _rng(self.seed, "clips", epoch, window).permutation(len(keys))
        return [(keys[index], epoch) for index in shuffled]

    def _micro_batches(self, order: Sequence[tuple[str, int]], step: int) -> list[list[Draw]]:
        size, first = self.config.micro_batch_size, step * self.num_step_samples
        starts = range(first, first + self.num_step_samples, size)
        return [[self._draw(key, epoch) for key, epoch in order[start : start + size]] for start in starts]

    def _draw(self, key: str, epoch: int) -> Draw:
        spare = self.records[key].num_frames - self.config.num_frames
        return Draw(key, epoch, int(_rng(self.seed, "start", epoch, key).integers(spare + 1)))


def _eligible(records: Sequence[ClipRecord], config: DataConfig) -> list[ClipRecord]:
    sizes = sorted({(record.height, record.width) for record in records})
    right = [record for record in records if (record.height, record.width) == (config.height, config.width)]
    if not right:
        raise DataError(
            f"no clip of split {config.split!r} is stored at {config.height}x{config.width}; stored are "
            f"{', '.join(f'{height}x{width}' for height, width in sizes) or 'none'}. "
            "Set data.height and data.width to one of them, or transcode to this size in the curate stage."
        )
    long_enough = [record for record in right if record.num_frames >= config.num_frames]
    if not long_enough:
        raise DataError(
            f"no clip of split {config.split!r} has {config.num_frames} frames; the longest has "
            f"{max(record.num_frames for record in right)}. Lower data.num_frames, or curate longer clips."
        )
    return long_enough


def _rng(*key: int | str) -> np.random.Generator:
    # Counter-based, keyed by a hash: any window of any epoch is as cheap as the first.
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))
