"""Buckets: the size that each clip is brought to, how many clips of a size make a micro-batch, and how micro-batches of equal
cost are grouped into steps (spec step-video-arlon-dpo.md A7, data-pipelines.md 2.3).

With `data.packing` a micro-batch is a pack: clips of any buckets, first-fit in their order, up to a number of tokens.

All of it is exact arithmetic on the configuration and the clips' facts: no rank, no clock, no state. What a group of clips
leaves over is told, so that the order of samples can carry it.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Generic, TypeVar

from videofm.config.buckets import BucketsConfig, BucketSizeConfig
from videofm.config.data import DataConfig
from videofm.data.draws import Shape
from videofm.errors import ConfigError

Item = TypeVar("Item", bound=Hashable)
"""What is packed: a clip, or whatever stands for one."""

Other = TypeVar("Other", bound=Hashable)

_MAX_PLACES = 100_000
"""Shapes whose place is remembered."""

_OPEN_PACKS = 8
"""Packs that are being filled at a time: more fill a little better, and more clips wait where a window ends."""


@dataclass(frozen=True, eq=False)
class Bucket:
    """A size of clips. `cost` is that of one clip, in the unit of the budget; buckets of one `cost_class` share steps.

    A bucket equals itself alone: it is the key of every clip's tables.
    """

    num_frames: int
    height: int
    width: int
    num_tokens: int
    cost: Fraction
    micro_batch_size: int
    cost_class: int = 0

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"

    @property
    def micro_batch_cost(self) -> Fraction:
        """Cost of a full micro-batch."""
        return self.micro_batch_size * self.cost


@dataclass(frozen=True)
class Placement:
    """Where a clip falls: its bucket, and the one of its images where a share of the videos is drawn as images."""

    bucket: Bucket
    image: Bucket | None


@dataclass(frozen=True, slots=True)
class BucketBatch(Generic[Item]):
    """A micro-batch before anything is drawn for its clips."""

    bucket: Bucket
    clips: list[Item]

    @property
    def cost(self) -> Fraction:
        """Modelled cost."""
        return len(self.clips) * self.bucket.cost

    @property
    def pairs(self) -> list[tuple[Bucket, Item]]:
        """Each clip with its bucket."""
        return [(self.bucket, clip) for clip in self.clips]

    def of(self, clip_of: Callable[[Item], Other]) -> BucketBatch[Other]:
        """The same with what `clip_of` gives for each clip."""
        return BucketBatch(self.bucket, list(map(clip_of, self.clips)))


@dataclass(slots=True)
class Pack(Generic[Item]):
    """A micro-batch of clips of any buckets, of `num_tokens` tokens together."""

    pairs: list[tuple[Bucket, Item]]
    num_tokens: int = 0

    def add(self, bucket: Bucket, clip: Item) -> None:
        """One clip more."""
        self.pairs.append((bucket, clip))
        self.num_tokens += bucket.num_tokens

    @property
    def cost(self) -> Fraction:
        """What it costs in tokens."""
        return Fraction(self.num_tokens)

    def of(self, clip_of: Callable[[Item], Other]) -> Pack[Other]:
        """The same with what `clip_of` gives for each clip."""
        return Pack([(bucket, clip_of(clip)) for bucket, clip in self.pairs], self.num_tokens)


@dataclass(frozen=True)
class Packed(Generic[Item]):
    """The steps that a sequence of clips fills, each a list of micro-batches, and the clips that fill none, in order."""

    steps: Sequence[Sequence[BucketBatch[Item] | Pack[Item]]]
    rest: list[Item]


class Buckets:
    """The buckets of a configuration, `all` of them, and the rule that puts clips into them."""

    def __init__(self, config: DataConfig) -> None:
        """
        Raises:
            ConfigError: the budget, or a pack, holds no clip of a size, or another number of the main size than
                `micro_batch_size`.
        """
        assert config.buckets is not None
        self.config, self.section = config, config.buckets
        costs = {size: cost_of(self.section, size) for size in self.section.sizes}
        main = next(size for size in costs if str(size) == f"{config.num_frames}x{config.height}x{config.width}")
        self.budget = config.micro_batch_size * costs[main]
        if self.section.budget is not None:
            self.budget = Fraction(str(self.section.budget))
        if config.packing is not None:
            self.budget = Fraction(config.packing.num_tokens)
            _check_packs(config.micro_batch_size, config.packing.num_tokens, costs, main)
        if too_dear := [f"{size} (a clip costs {float(cost):g})" for size, cost in costs.items() if cost > self.budget]:
            raise ConfigError(
                f"data.buckets: the budget {float(self.budget):g} of a micro-batch holds no clip of {', '.join(too_dear)}; "
                "raise data.buckets.budget (or data.micro_batch_size where it is null), or leave these sizes out"
            )
        if (fits := self.budget // costs[main]) != config.micro_batch_size:
            raise ConfigError(
                f"data.buckets.budget {float(self.budget):g} holds {fits} clips of the main size {main}, which cost "
                f"{float(costs[main]):g} each, and data.micro_batch_size says {config.micro_batch_size}; leave the budget out, "
                f"or set data.micro_batch_size={fits}"
            )
        self.all = _classes(
            [
                Bucket(s.num_frames, s.height, s.width, num_tokens(self.section, s), cost, int(self.budget // cost))
                for s, cost in sorted(costs.items(), key=lambda item: (-item[1], str(item[0])))
            ],
            1 + Fraction(str(self.section.tolerance)),
        )
        self._places: dict[Shape, Placement | str] = {}

    def place(self, facts: Shape) -> Placement | str:
        """Where clips of a shape fall, or why they fall nowhere."""
        if facts not in self._places:
            if len(self._places) >= _MAX_PLACES:
                self._places.clear()
            bucket = self._nearest(self.all, *facts)
            if isinstance(bucket, Bucket) and bucket.num_frames > 1 and self.section.image_share:
                image = self._nearest([bucket for bucket in self.all if bucket.num_frames == 1], *facts)
                self._places[facts] = Placement(bucket, image if isinstance(image, Bucket) else None)
            else:
                self._places[facts] = bucket if isinstance(bucket, str) else Placement(bucket, None)
        return self._places[facts]

    def pack(self, clips: Sequence[Item], bucket_of: Callable[[Item], Bucket]) -> Packed[Item]:
        """Fill micro-batches, and steps of `num_micro_batches` of them, with clips in their order.

        With `image_padding` a step may be followed by as many micro-batches of images. However many ranks share a step out,
        each gets micro-batches of the same cost, to `tolerance`.
        """
        # A window may have 250,000 clips: what is made for each of them does not live longer than it must.
        sorted_out = ((bucket_of(clip), clip) for clip in clips)
        steps: Sequence[Sequence[BucketBatch[Item] | Pack[Item]]]
        if self.config.packing is not None:
            packing = _Packing[Item](self.config, min(bucket.num_tokens for bucket in self.all))
            steps = list(packing.take(sorted_out))
            left = packing.left()
            return Packed(steps, [clip for clip in clips if clip in left])
        filling = _Filling[Item](self.config.num_micro_batches)
        if not self.section.image_padding:
            steps = list(filling.take(sorted_out))
        else:
            pairs = list(sorted_out)
            videos = list(filling.take(pair for pair in pairs if pair[0].num_frames > 1))
            padded, images = self._pad(videos, [pair for pair in pairs if pair[0].num_frames == 1])
            steps = [*padded, *filling.take(images)]
        left = filling.left()
        return Packed(steps, [clip for clip in clips if clip in left])

    def _nearest(self, buckets: Sequence[Bucket], num_frames: int, height: int, width: int) -> Bucket | str:
        """The bucket of a stored clip among `buckets`, or the first rule that leaves none of them."""
        stride = min(self.config.frame_strides)
        fewest = min((bucket.num_frames - 1) * stride + 1 for bucket in buckets)
        found = [bucket for bucket in buckets if (bucket.num_frames - 1) * stride < num_frames]
        if not found:
            return f"fewer than {fewest} frames"
        found = [bucket for bucket in found if bucket.height <= height and bucket.width <= width]
        if not found:
            return "smaller than every size that the length allows"
        limit = 1 / (1 - Fraction(str(self.section.max_crop)))
        ratios = {bucket: _aspect_ratio(height, width, bucket) for bucket in found}
        found = [bucket for bucket in found if ratios[bucket] <= limit]
        if not found:
            return f"more than {self.section.max_crop:.0%} of the frame outside of every window (data.buckets.max_crop)"
        if self.config.crop == "none":
            found = [bucket for bucket in found if covering(height, width, bucket) == (bucket.height, bucket.width)]
        if not found:
            return "another aspect than every size, and data.crop is none"
        found = [bucket for bucket in found if bucket.num_frames > 1] or found
        near = min(ratios[bucket] for bucket in found) * (1 + Fraction(str(self.section.aspect_tolerance)))
        found = [bucket for bucket in found if ratios[bucket] <= near]
        return max(found, key=lambda b: (b.num_frames, b.height * b.width, -ratios[b], b.width))

    def _pad(
        self, steps: Sequence[list[BucketBatch[Item]]], images: Sequence[tuple[Bucket, Item]]
    ) -> tuple[list[list[BucketBatch[Item]]], list[tuple[Bucket, Item]]]:
        """Steps with images given to the cheapest, one a micro-batch at a time (Step-Video, section 6.2.4 of its report), and
        the images left.

        The images of a step are of one bucket, the fullest when it gets its first.
        """
        pools: dict[Bucket, deque[Item]] = {}
        for bucket, clip in images:
            pools.setdefault(bucket, deque()).append(clip)
        target = max(bucket.micro_batch_cost for bucket in self.all)
        count = self.config.num_micro_batches
        given: dict[int, list[BucketBatch[Item]]] = {}
        open_steps = [(max(batch.cost for batch in step), index) for index, step in enumerate(steps)]
        heapq.heapify(open_steps)
        while open_steps and pools:
            cost, index = heapq.heappop(open_steps)
            bucket = given[index][0].bucket if index in given else max(pools, key=lambda b: (len(pools[b]), str(b)))
            if cost + bucket.cost > target or len(pools[bucket]) < count:
                continue  # this step takes no more
            for batch in given.setdefault(index, [BucketBatch(bucket, []) for _ in range(count)]):
                batch.clips.append(pools[bucket].popleft())
            heapq.heappush(open_steps, (cost + bucket.cost, index))
        left = {clip for pool in pools.values() for clip in pool}
        return [step + given.get(index, []) for index, step in enumerate(steps)], [p for p in images if p[1] in left]


class _Filling(Generic[Item]):
    """Micro-batches that fill up, and steps of one cost class that fill up with them."""

    def __init__(self, num_micro_batches: int) -> None:
        self.num_micro_batches = num_micro_batches
        self._batches: dict[Bucket, BucketBatch[Item]] = {}
        self._steps: dict[int, list[BucketBatch[Item]]] = {}

    def take(self, clips: Iterable[tuple[Bucket, Item]]) -> Iterable[list[BucketBatch[Item]]]:
        """The steps that become full."""
        for bucket, clip in clips:
            batch = self._batches.setdefault(bucket, BucketBatch(bucket, []))
            batch.clips.append(clip)
            if len(batch.clips) < bucket.micro_batch_size:
                continue
            step = self._steps.setdefault(bucket.cost_class, [])
            step.append(self._batches.pop(bucket))
            if len(step) == self.num_micro_batches:
                yield self._steps.pop(bucket.cost_class)

    def left(self) -> set[Item]:
        """The clips that wait in micro-batches and steps that are not full."""
        waiting = [*self._batches.values(), *(batch for step in self._steps.values() for batch in step)]
        return {clip for batch in waiting for clip in batch.clips}


class _Packing(Generic[Item]):
    """Packs that fill up, and steps that fill up with them.

    A clip goes into the first open pack that has room. A pack is closed when no clip of any size fits any more, or as the
    oldest of `_OPEN_PACKS` when one more is opened, so that none waits for long.
    """

    def __init__(self, config: DataConfig, smallest: int) -> None:
        assert config.packing is not None
        self.num_tokens, self.num_packs, self.smallest = config.packing.num_tokens, config.num_micro_batches, smallest
        self._open: list[Pack[Item]] = []
        self._step: list[Pack[Item]] = []

    def take(self, clips: Iterable[tuple[Bucket, Item]]) -> Iterable[list[Pack[Item]]]:
        """The steps that become full."""
        for bucket, clip in clips:
            room = self.num_tokens - bucket.num_tokens
            pack = next((pack for pack in self._open if pack.num_tokens <= room), None)
            if pack is None:
                pack = Pack([])
                self._open.append(pack)
            pack.add(bucket, clip)
            if pack.num_tokens > self.num_tokens - self.smallest:
                yield from self._close(pack)
            elif len(self._open) > _OPEN_PACKS:
                yield from self._close(self._open[0])

    def left(self) -> set[Item]:
        """The clips that wait in packs and steps that are not full."""
        return {clip for pack in (*self._step, *self._open) for _, clip in pack.pairs}

    def _close(self, pack: Pack[Item]) -> Iterable[list[Pack[Item]]]:
        self._open = [other for other in self._open if other is not pack]
        self._step.append(pack)
        if len(self._step) == self.num_packs:
            yield self._step
            self._step = []


def fill_of(step: Sequence[BucketBatch[Item] | Pack[Item]], config: DataConfig) -> float | None:
    """The share of the tokens of a step's packs that is used; None without packs."""
    if config.packing is None:
        return None
    return sum(batch.num_tokens for batch in step if isinstance(batch, Pack)) / (len(step) * config.packing.num_tokens)


def _check_packs(micro_batch_size: int, limit: int, costs: dict[BucketSizeConfig, Fraction], main: BucketSizeConfig) -> None:
    """Refuse packs that are too small for a size, or that hold another number of the main size."""
    if large := [f"{size} ({int(tokens):,} tokens)" for size, tokens in costs.items() if tokens > limit]:
        raise ConfigError(
            f"data.packing.num_tokens {limit:,} holds no clip of {', '.join(large)}; raise it, or leave these sizes out"
        )
    if (fits := int(limit // costs[main])) != micro_batch_size:
        raise ConfigError(
            f"data.packing.num_tokens {limit:,} holds {fits} clips of the main size {main}, of {int(costs[main]):,} tokens "
            f"each, and data.micro_batch_size says {micro_batch_size}; set data.micro_batch_size={fits}"
        )


def describe_steps(config: DataConfig) -> str:
    """What an optimizer step holds, in words."""
    if config.packing is not None:
        sizes = ", ".join(str(bucket) for bucket in Buckets(config).all)
        return f"{config.num_micro_batches} packs of up to {config.packing.num_tokens:,} tokens, of clips of {sizes},"
    if config.buckets is None:
        samples = "clips" if config.pairs is None else "pairs"
        return f"{config.mean_step_samples:g} {samples} of {config.num_frames}x{config.height}x{config.width}"
    batches = [f"{bucket.micro_batch_size} clips of {bucket}" for bucket in Buckets(config).all]
    return f"{config.num_micro_batches} micro-batches of one cost, each of {' or '.join(batches)},"


def num_tokens(section: BucketsConfig, size: BucketSizeConfig) -> int:
    """Tokens of a clip."""
    token = section.token
    return math.ceil(size.num_frames / token.num_frames) * (size.height // token.height) * (size.width // token.width)


def cost_of(section: BucketsConfig, size: BucketSizeConfig) -> Fraction:
    """Cost of a clip: its measured seconds, or `L + quadratic * L^2` of its tokens; exact in the decimals that were written."""
    if size.seconds is not None:
        return Fraction(str(size.seconds))
    tokens = num_tokens(section, size)
    return tokens + Fraction(str(section.quadratic)) * tokens**2


def covering(height: int, width: int, bucket: Bucket) -> tuple[int, int]:
    """Height and width of frames that are shrunk until they just cover those of `bucket`; sides are rounded half up."""
    if height * bucket.width >= width * bucket.height:
        return max(bucket.height, (2 * height * bucket.width + width) // (2 * width)), bucket.width
    return bucket.height, max(bucket.width, (2 * width * bucket.height + height) // (2 * height))


def cropped_share(height: int, width: int, bucket: Bucket) -> Fraction:
    """Share of a frame that lies outside of the window."""
    return 1 - 1 / _aspect_ratio(height, width, bucket)


def _aspect_ratio(height: int, width: int, bucket: Bucket) -> Fraction:
    """How far the aspects are apart: the larger over the smaller, at least 1; its logarithm is their distance."""
    ratio = Fraction(height * bucket.width, width * bucket.height)
    return max(ratio, 1 / ratio)


def _classes(buckets: Sequence[Bucket], tolerance: Fraction) -> tuple[Bucket, ...]:
    """Buckets with their classes: of ascending costs each class takes what is within `tolerance` of its cheapest."""
    cheapest: list[Fraction] = []
    for cost in sorted(bucket.micro_batch_cost for bucket in buckets):
        if not cheapest or cost > cheapest[-1] * tolerance:
            cheapest.append(cost)
    return tuple(replace(b, cost_class=sum(b.micro_batch_cost >= cost for cost in cheapest) - 1) for b in buckets)
