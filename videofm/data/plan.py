"""The order of samples, as a pure function of a seed, a manifest and a few numbers.

Shards are permuted by (seed, epoch) and cut into windows; the clips of a window are permuted; consecutive runs of clips are
the optimizer steps, and what is left over is carried into the next window. A data rank r of W takes the micro-batches
`r, W + r, 2W + r, ...` of each step. World size, workers and prefetch do not enter, so the position is a few integers and the
carried clips, the same on every rank.

A micro-batch holds videos or images. Of the first n micro-batches of a run, floor(n * image_share) hold images, so the number
of clips that a step takes is a function of its index alone. Within a step videos come first: of the rounds in which ranks work
side by side, at most one mixes the kinds, whatever W is. Gradients are sums, so a mixed round is right too, but its ranks wait
for the slowest, and a model must run the same parameters for both kinds where ZeRO gathers or reduces them as they are used.

With `data.buckets` the clips of a window, and those carried into it, are sorted into buckets; those of a bucket fill its
micro-batches, micro-batches of one cost class fill steps, and the steps of the window are permuted. Each clip still comes once
an epoch, and each bucket takes its share of the steps; what fills no step is carried, at most a step of every cost class and
a micro-batch of every bucket.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np

from videofm.config.data import DataConfig
from videofm.data.buckets import Bucket, Buckets, Clip, Packed, Placement, covering
from videofm.data.index import ClipRecord
from videofm.errors import CheckpointError, DataError

_DEFAULTS: dict[str, Any] = {
    name: DataConfig.model_fields[name].default
    for name in ("frame_strides", "resize_short_side", "crop", "image_share", "image_micro_batch_size", "buckets")
}
"""Fields that stand in an order's identity only where they differ from these values."""


@dataclass(frozen=True)
class Draw:
    """One clip in the order: the record's key, the epoch in which it is drawn, and which of its pixels are read.

    `stride` is in stored frames. Frames are resized to `resized` (height, width); `top` and `left` are the corner of the
    window of `height` x `width` in them.
    """

    key: str
    epoch: int
    start_frame: int
    num_frames: int
    stride: int
    resized: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    @property
    def frames(self) -> range:
        """The stored frames to read."""
        return range(self.start_frame, self.start_frame + (self.num_frames - 1) * self.stride + 1, self.stride)

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
    carry: tuple[Clip, ...] = ()

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

    @property
    def num_samples(self) -> int:
        """Samples of the step over all ranks, videos and images."""
        return sum(map(len, self.micro_batches))

    def share(self, data_rank: int, data_degree: int) -> list[list[Draw]]:
        """The micro-batches of one data rank, in order."""
        return self.micro_batches[data_rank::data_degree]


class DataPlan:
    """The endless order of one dataset under one configuration."""

    def __init__(self, records: Sequence[ClipRecord], manifest_hash: str, config: DataConfig, seed: int) -> None:
        """
        Raises:
            DataError: no clip is long enough, or stored at a size that the configured one can be taken from.
            ConfigError: the budget of `data.buckets` does not fit its sizes.
        """
        self.config, self.seed = config, seed
        self._image_share = Fraction(str(config.image_share))  # the decimal that was written, so that counts are exact
        self.buckets = Buckets(config) if config.buckets is not None else None
        self._drawn_as_images = config.buckets.image_share if config.buckets is not None else 0.0
        self.placements: dict[str, Placement] = {}
        self.left_out: Counter[str] = Counter()
        if self.buckets is not None:
            records = self._place(records, self.buckets)
        else:
            records = _eligible(records, config)
        self.records = {record.key: record for record in records}
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
        values = config.model_dump(include=set(_DEFAULTS)) | {"frame_strides": sorted(config.frame_strides)}
        if self.buckets is not None:
            values["buckets"]["sizes"].sort(key=lambda size: (size["num_frames"], size["height"], size["width"]))
        self.identity |= {name: values[name] for name in _DEFAULTS if values[name] != _DEFAULTS[name]}

    def steps(self, state: PlanState | None = None) -> Iterator[StepPlan]:
        """The steps from `state` on, without end."""
        state = state or PlanState()
        if self.buckets is not None:
            yield from self._bucketed_steps(state)
            return
        while True:
            order = list(state.carry) + self.window(state.epoch, state.window)
            first = self._clips_before(state.step - state.step_in_window)
            while (end := self._clips_before(state.step + 1) - first) <= len(order):
                clips = order[self._clips_before(state.step) - first : end]
                state = replace(state, step=state.step + 1, step_in_window=state.step_in_window + 1)
                yield StepPlan(self._micro_batches(clips, state.step - 1), state)
            state = self.next_window(state, order[self._clips_before(state.step) - first :])

    def packed(self, state: PlanState) -> Packed:
        """What the clips of the window of `state`, and those carried into it, fill; steps are not permuted. Needs buckets."""
        assert self.buckets is not None
        return self.buckets.pack([*state.carry, *self.window(state.epoch, state.window)], self.bucket_of)

    def _bucketed_steps(self, state: PlanState) -> Iterator[StepPlan]:
        while True:
            packed = self.packed(state)
            order = _rng(self.seed, "steps", state.epoch, state.window).permutation(len(packed.steps))
            for index in order[state.step_in_window :]:
                state = replace(state, step=state.step + 1, step_in_window=state.step_in_window + 1)
                batches = [
                    [self._bucket_draw(key, epoch, batch.bucket) for key, epoch in batch.clips] for batch in packed.steps[index]
                ]
                yield StepPlan(batches, state)
            state = self.next_window(state, packed.rest)

    def next_window(self, state: PlanState, carry: Sequence[Clip]) -> PlanState:
        """The position at the start of the window after that of `state`."""
        last = state.window + 1 >= self._num_windows
        return PlanState(state.step, state.epoch + last, 0 if last else state.window + 1, carry=tuple(carry))

    def check(self, identity: dict[str, Any]) -> None:
        """Refuse a position that belongs to another order.

        Raises:
            CheckpointError: a field differs; the message names each with both values.
        """
        before, after = _flat(_DEFAULTS | identity), _flat(_DEFAULTS | self.identity)
        changed = [
            f"{name} was {before.get(name)!r}, now {after.get(name)!r}"
            for name in after | before
            if before.get(name) != after.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"the data order of the checkpoint is not the one asked for: {'; '.join(changed)}. "
                "Restore these values, or start a new run from the weights alone."
            )

    @property
    def _num_windows(self) -> int:
        return -(-len(self._shards) // self.config.window_shards)

    def window(self, epoch: int, window: int) -> list[Clip]:
        """Keys with their epoch, in the order of the window."""
        shards = sorted(self._shards)
        order = _rng(self.seed, "shards", epoch).permutation(len(shards))
        size = self.config.window_shards
        keys = [key for index in order[window * size : (window + 1) * size] for key in self._shards[shards[index]]]
        shuffled = _rng(self.seed, "clips", epoch, window).permutation(len(keys))
        return [(keys[index], epoch) for index in shuffled]

    def _image_batches_before(self, step: int) -> int:
        """Micro-batches of images in the steps before `step`."""
        return int(step * self.config.num_micro_batches * self._image_share)

    def _clips_before(self, step: int) -> int:
        """Clips that the steps before `step` take."""
        images = self._image_batches_before(step)
        videos = step * self.config.num_micro_batches - images
        return videos * self.config.micro_batch_size + images * self._num_images

    @property
    def _num_images(self) -> int:
        return self.config.image_micro_batch_size or self.config.micro_batch_size

    def _micro_batches(self, clips: Sequence[Clip], step: int) -> list[list[Draw]]:
        num_images = self._image_batches_before(step + 1) - self._image_batches_before(step)
        num_videos = self.config.num_micro_batches - num_images
        video, image = (self.config.micro_batch_size, self.config.num_frames), (self._num_images, 1)
        rest = iter(clips)
        return [
            [self._draw(key, epoch, num_frames) for key, epoch in islice(rest, size)]
            for size, num_frames in [video] * num_videos + [image] * num_images
        ]

    def _place(self, records: Sequence[ClipRecord], buckets: Buckets) -> list[ClipRecord]:
        """The records that fall into a bucket; the others are counted by reason in `left_out`."""
        placed = []
        for record in records:
            place = buckets.place(record)
            if isinstance(place, str):
                self.left_out[place] += 1
                continue
            self.placements[record.key] = place
            placed.append(record)
        if not placed:
            reasons = "; ".join(f"{count}: {reason}" for reason, count in self.left_out.most_common()) or "there is none"
            raise DataError(
                f"no clip of split {self.config.split!r} falls into a bucket ({reasons}). "
                "Add smaller or shorter sizes to data.buckets.sizes, or curate other clips."
            )
        return placed

    def bucket_of(self, key: str, epoch: int) -> Bucket:
        """The bucket of a clip in an epoch: a share of the videos, others in each epoch, are images."""
        place = self.placements[key]
        if place.image is not None and _uniform(self.seed, "image", epoch, key) < self._drawn_as_images:
            return place.image
        return place.bucket

    def _bucket_draw(self, key: str, epoch: int, bucket: Bucket) -> Draw:
        record = self.records[key]
        resized = covering(record.height, record.width, bucket)
        return self._cut(key, epoch, bucket.num_frames, resized, (bucket.height, bucket.width))

    def _draw(self, key: str, epoch: int, num_frames: int) -> Draw:
        return self._cut(
            key, epoch, num_frames, frame_size(self.records[key], self.config), (self.config.height, self.config.width)
        )

    def _cut(self, key: str, epoch: int, num_frames: int, resized: tuple[int, int], window: tuple[int, int]) -> Draw:
        """Stride, first frame and window of one clip, each from a generator of its own, keyed by (seed, epoch, key)."""
        record, strides = self.records[key], [1]
        if num_frames > 1:
            strides = [stride for stride in sorted(self.config.frame_strides) if (num_frames - 1) * stride < record.num_frames]
        stride = strides[int(_rng(self.seed, "stride", epoch, key).integers(len(strides)))] if len(strides) > 1 else strides[0]
        num_starts = record.num_frames - (num_frames - 1) * stride
        start_frame = int(_rng(self.seed, "start", epoch, key).integers(num_starts))
        spare = resized[0] - window[0], resized[1] - window[1]
        top, left = spare[0] // 2, spare[1] // 2
        if self.config.crop == "random":
            top, left = map(int, _rng(self.seed, "crop", epoch, key).integers([spare[0] + 1, spare[1] + 1]))
        return Draw(key, epoch, start_frame, num_frames, stride, resized, top, left, *window)


def frame_size(record: ClipRecord, config: DataConfig) -> tuple[int, int]:
    """Height and width of a clip's frames before the crop, in pixels."""
    side, short = config.resize_short_side, min(record.height, record.width)
    if side is None:
        return record.height, record.width
    return round(record.height * side / short), round(record.width * side / short)


def _eligible(records: Sequence[ClipRecord], config: DataConfig) -> list[ClipRecord]:
    right = [record for record in records if _right_size(record, config)]
    if not right:
        raise DataError(_no_size(records, config))
    num_stored = (config.num_frames - 1) * min(config.frame_strides) + 1
    long_enough = [record for record in right if record.num_frames >= num_stored]
    if not long_enough:
        at = f" (data.num_frames {config.num_frames} at stride {min(config.frame_strides)})"
        raise DataError(
            f"no clip of split {config.split!r} has {num_stored} frames{at if num_stored > config.num_frames else ''}; the "
            f"longest has {max(record.num_frames for record in right)}. "
            f"Lower data.num_frames{' or data.frame_strides' if min(config.frame_strides) > 1 else ''}, or curate longer clips."
        )
    return long_enough


def _right_size(record: ClipRecord, config: DataConfig) -> bool:
    if min(record.height, record.width) < (config.resize_short_side or 0):
        return False
    height, width = frame_size(record, config)
    if config.crop == "none":
        return (height, width) == (config.height, config.width)
    return height >= config.height and width >= config.width


def _no_size(records: Sequence[ClipRecord], config: DataConfig) -> str:
    sizes = sorted({(record.height, record.width) for record in records})
    stored = ", ".join(f"{height}x{width}" for height, width in sizes) or "none"
    wanted = f"at {config.height}x{config.width}{'' if config.crop == 'none' else ' or larger'}"
    if config.resize_short_side is not None:
        wanted = f"so that a shorter side of {config.resize_short_side} (data.resize_short_side) makes it {wanted[3:]}"
    fix = "to one of them, set data.crop" if config.crop == "none" else "smaller"
    return (
        f"no clip of split {config.split!r} is stored {wanted}; stored are {stored}. "
        f"Set data.height and data.width {fix}, or transcode to this size in the curate stage."
    )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an identity; those of `buckets` by themselves."""
    buckets = identity.get("buckets")
    if not isinstance(buckets, Mapping):
        return dict(identity)
    rest = {name: value for name, value in identity.items() if name != "buckets"}
    return rest | {f"buckets.{name}": value for name, value in buckets.items()}


def _rng(*key: int | str) -> np.random.Generator:
    # Counter-based, keyed by a hash: any window of any epoch is as cheap as the first.
    return np.random.Generator(np.random.Philox(key=_hash(16, *key)))


def _uniform(*key: int | str) -> float:
    """A number in [0, 1), a hash of its key; cheaper than a generator for a single one."""
    return _hash(8, *key) / 2**64


def _hash(size: int, *key: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(key).encode(), digest_size=size).digest(), "big")
