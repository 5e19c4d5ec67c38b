"""What an order of samples is made of: clips as the plan knows them, draws of them, positions, and numbers drawn by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from videofm.errors import CheckpointError


class Shape(NamedTuple):
    """A stored clip's frames, and their height and width in pixels."""

    num_frames: int
    height: int
    width: int


class Clip(NamedTuple):
    """A clip in an order: its key, the epoch in which it is drawn, the row of its shard in the manifest, its shape.

    It says all that the plan needs, so that clips which wait in a checkpoint are taken up without opening their shards.
    """

    key: str
    epoch: int
    shard: int
    shape: Shape


@dataclass(frozen=True)
class Draw:
    """One clip in the order: the record's key, the epoch in which it is drawn, and which of its pixels are read.

    `stride` is in stored frames. Frames are resized to `resized` (height, width); `top` and `left` are the corner of the
    window of `height` x `width` in them. `shard` is the row of its shard in the manifest, `source` the name of its dataset in a
    mix, `step` the number of its step in the order (from 0), `instead_of` the sample that cannot be read, for a spare.
    `pair` is the id of the pair that the clip is one side of, in an order of pairs.
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
    shard: int = 0
    source: str = ""
    step: int = 0
    instead_of: str = ""
    pair: str = ""

    @property
    def frames(self) -> range:
        """The stored frames to read."""
        return range(self.start_frame, self.start_frame + (self.num_frames - 1) * self.stride + 1, self.stride)

    @property
    def sample_id(self) -> str:
        """Names this draw; every random number about the sample is keyed by it. Both sides of a pair have that of the pair."""
        drawn = self.pair or self.key
        name = f"{self.source}/{drawn}@{self.epoch}" if self.source else f"{drawn}@{self.epoch}"
        return f"{name}~{self.instead_of}" if self.instead_of else name


def by_size(draws: Sequence[Draw]) -> list[list[Draw]]:
    """The draws of a micro-batch by frames, height and width; sizes in the order in which they come first."""
    groups: dict[tuple[int, int, int], list[Draw]] = {}
    for draw in draws:
        groups.setdefault((draw.num_frames, draw.height, draw.width), []).append(draw)
    return list(groups.values())


def units(draws: Sequence[Draw]) -> list[list[int]]:
    """What counts as one sample of a micro-batch, and is replaced as one, as numbers of its draws: a clip or, where winners
    stand before losers, a pair."""
    if draws and draws[0].pair:
        half = len(draws) // 2
        return [[index, half + index] for index in range(half)]
    return [[index] for index in range(len(draws))]


@dataclass(frozen=True)
class PlanState:
    """Where training stands: before optimizer step `step`, at step `step_in_window` of window `window` of epoch `epoch`.

    In a mix the other numbers are those of `sources`, the position in each dataset: its `step` counts the clips taken from it,
    or with buckets the steps. `passed_over` counts the steps of the order that were not read, because training had left its
    course there (`DataPlan.pass_over`).
    """

    step: int = 0
    epoch: int = 0
    window: int = 0
    step_in_window: int = 0
    carry: tuple[Clip, ...] = ()
    sources: Mapping[str, PlanState] = field(default_factory=dict)
    passed_over: int = 0

    @property
    def data_step(self) -> int:
        """The number in the order of the next step: those that were read before it, and those that were passed over."""
        return self.step + self.passed_over

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        values = asdict(self)
        values["sources"] = {name: source.to_json() for name, source in self.sources.items()}
        if not self.sources:
            del values["sources"]
        if not self.passed_over:
            del values["passed_over"]
        return values

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PlanState:
        """The inverse of `to_json`.

        Raises:
            CheckpointError: it was written before positions said which shard a carried clip is in.
        """
        if any(len(clip) != len(Clip._fields) for clip in value["carry"]):
            raise CheckpointError(
                "the checkpoint's position in the data names clips that wait without their shards, as earlier versions wrote "
                "it; start a new run from the weights alone"
            )
        carry = tuple(Clip(key, epoch, shard, Shape(*shape)) for key, epoch, shard, shape in value["carry"])
        sources = {name: cls.from_json(source) for name, source in value.get("sources", {}).items()}
        return cls(**{**value, "carry": carry, "sources": sources})


def generator(*key: int | str) -> np.random.Generator:
    """Random numbers named by a key."""
    # Counter-based, keyed by a hash: any window of any epoch is as cheap as the first.
    return np.random.Generator(np.random.Philox(key=_hash(16, *key)))


def uniform(*key: int | str) -> float:
    """A number in [0, 1), a hash of its key; cheaper than a generator for a single one."""
    return _hash(8, *key) / 2**64


def _hash(size: int, *key: int | str) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(key).encode(), digest_size=size).digest(), "big")
