"""What the buckets of a configuration make of a dataset, before any training: what falls where, how long steps are, who waits.

The order of samples is a pure function, so it is played through, without decoding anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from videofm.config.data import DataConfig
from videofm.data.buckets import Bucket, BucketBatch, Buckets, Pack, Placement, cropped_share
from videofm.data.draws import Clip, PlanState
from videofm.data.plan import DataPlan
from videofm.data.source import ClipSource, Survey
from videofm.errors import ConfigError

_BAR = 40
"""Characters of the longest bar."""

_MAX_CLIPS, _MAX_EPOCHS = 100_000, 100
"""Epochs are played through until one of these is reached, so that what is carried weighs little."""


@dataclass(frozen=True)
class BucketRow:
    """One bucket: the clips of an epoch, the share of the steps, or with packs of their tokens (they add to 1), the share of
    pixels outside of windows."""

    bucket: Bucket
    clips: float
    step_share: float
    cropped: float


@dataclass(frozen=True)
class BucketReport:
    """Everything that is printed. Costs are modelled; that of a step is its dearest rank's, where each rank takes one
    micro-batch and the images that pad it. `fills` are the shares of packs that are full, rising."""

    rows: list[BucketRow]
    num_placed: int
    left_out: Counter[str]
    num_epochs: int
    num_steps: int
    num_padding_images: int
    mean_cost: float
    max_cost: float
    idle_share: float
    largest_carry: int
    fills: list[float]

    @property
    def spread(self) -> float:
        """Cost of the dearest step over the mean."""
        return self.max_cost / self.mean_cost if self.num_steps else 1.0


def report_of(config: DataConfig, seed: int) -> str:
    """The report on the shards of `config` as text.

    Raises:
        ConfigError: there are no buckets, or their budget does not fit.
        DataError: the shards are missing or damaged, or no clip falls into a bucket.
    """
    if config.buckets is None:
        raise ConfigError(
            "the config has no section data.buckets; every clip is brought to the one size of `data`. Add sizes, for example "
            "'data.buckets={sizes: [{num_frames: 17, height: 256, width: 256}, ...], "
            "token: {num_frames: 8, height: 32, width: 32}}'"
        )
    plan = DataPlan.open(config, seed)
    return "\n\n".join(as_text(source, report(source)) for source in plan.sources.values())


def report(source: ClipSource) -> BucketReport:
    """Play the order of one dataset of a plan with buckets through."""
    assert source.buckets is not None
    state, drawn, tally = PlanState(), Counter[Bucket](), _Tally(source.config.num_micro_batches)
    survey, largest_carry = source.survey(), 0
    num_used = survey.used.total()
    while state.epoch < 1 or (state.epoch < _MAX_EPOCHS and state.epoch * num_used < _MAX_CLIPS):
        drawn.update(map(source.bucket_of, source.window(state.epoch, state.window).clips()))
        packed = source.packed(state)
        for step in packed.steps:
            tally.add(step)
        largest_carry = max(largest_carry, len(packed.rest))
        state = source.next_window(state, packed.rest)
    return tally.report(survey, source.buckets, drawn, state.epoch, largest_carry)


class _Tally:
    """Sums over steps."""

    def __init__(self, num_micro_batches: int) -> None:
        self.num_micro_batches = num_micro_batches
        self.shares: Counter[Bucket] = Counter()
        self.costs: list[float] = []
        self.means: list[float] = []
        self.num_padding_images = 0
        self.packs: list[int] = []
        self.tokens = Counter[Bucket]()

    def add(self, step: Sequence[BucketBatch[Clip] | Pack[Clip]]) -> None:
        """One step."""
        count = self.num_micro_batches
        self.shares.update(batch.bucket for batch in step[:count] if isinstance(batch, BucketBatch))
        self.num_padding_images += sum(len(batch.pairs) for batch in step[count:])
        for pack in step:
            if isinstance(pack, Pack):
                self.packs.append(pack.num_tokens)
                for bucket, _ in pack.pairs:
                    self.tokens[bucket] += bucket.num_tokens
        ranks = [float(sum(batch.cost for batch in step[rank::count])) for rank in range(count)]
        self.costs.append(max(ranks))
        self.means.append(sum(ranks) / count)

    def report(
        self, survey: Survey, buckets: Buckets, drawn: Counter[Bucket], num_epochs: int, largest_carry: int
    ) -> BucketReport:
        """The sums, as shares and means."""
        num_steps, total = len(self.costs), sum(self.costs)
        shares, whole = (self.tokens, sum(self.packs)) if self.packs else (self.shares, num_steps * self.num_micro_batches)
        cropped, fallen = dict.fromkeys(buckets.all, 0.0), Counter[Bucket]()
        for shape, count in survey.used.items():
            place = buckets.place(shape)
            assert isinstance(place, Placement)
            fallen[place.bucket] += count
            cropped[place.bucket] += count * float(cropped_share(shape.height, shape.width, place.bucket))
        rows = [
            BucketRow(
                bucket,
                drawn[bucket] / num_epochs,
                shares[bucket] / max(1, whole),
                cropped[bucket] / max(1, fallen[bucket]),
            )
            for bucket in buckets.all
        ]
        return BucketReport(
            rows,
            survey.used.total(),
            survey.left_out,
            num_epochs,
            num_steps,
            self.num_padding_images,
            mean_cost=total / max(1, num_steps),
            max_cost=max(self.costs, default=0.0),
            idle_share=1 - sum(self.means) / total if total else 0.0,
            largest_carry=largest_carry,
            fills=sorted(num_tokens / float(buckets.budget) for num_tokens in self.packs),
        )


def as_text(source: ClipSource, found: BucketReport) -> str:
    """The report for people."""
    assert source.buckets is not None
    config, unit = source.config, "s" if all(size.seconds for size in source.buckets.section.sizes) else "tokens"
    placed, nowhere = found.num_placed, found.left_out.total()
    budget, count = float(source.buckets.budget), config.num_micro_batches
    holds = f"a micro-batch costs at most {budget:g} {unit}; a step has {count} of one cost class"
    if config.packing is not None:
        holds = f"a pack holds at most {config.packing.num_tokens:,} tokens; a step has {count} packs"
    parts = [
        f"{source.dataset.place}, split {source.split}: {placed + nowhere:,} clips, {placed:,} in buckets, {nowhere:,} in none",
        holds,
        "",
        *_table(found.rows, budget, config.packing is not None),
    ]
    if nowhere:
        parts += ["", "in no bucket:", *[f"  {count:>9,}  {reason}" for reason, count in found.left_out.most_common()]]
    parts += ["", "tokens of a clip:", *_histogram(found.rows), ""]
    parts += [
        f"over {found.num_epochs} epoch{'s' if found.num_epochs > 1 else ''}: {found.num_steps:,} steps; at most "
        f"{found.largest_carry:,} clips wait for clips of their size, and none is left out",
        f"modelled step time: max/mean {found.spread:.3f}",
        f"ranks wait for each other {found.idle_share:.1%} of it (if each takes one micro-batch of a step)",
    ]
    if found.fills:
        mean, middle = sum(found.fills) / len(found.fills), found.fills[len(found.fills) // 2]
        parts.append(f"packs: {len(found.fills):,}; full to {mean:.1%} (least {found.fills[0]:.1%}, median {middle:.1%})")
    if source.buckets.section.image_padding:
        parts.append(f"images given to steps of videos: {found.num_padding_images / found.num_epochs:,.1f} an epoch")
    return "\n".join(parts)


_TITLES = ["bucket", "clips", "tokens", "cost", "clips a micro-batch", "its cost", "of budget", "class", "steps", "cropped"]
_PACK_TITLES = ["bucket", "clips", "tokens", "of a pack", "of all tokens", "cropped"]


def _table(rows: Sequence[BucketRow], budget: float, packs: bool) -> list[str]:
    titles, cells = (_PACK_TITLES if packs else _TITLES), []
    for row in rows:
        bucket, share = row.bucket, [f"{row.step_share:.1%}", f"{row.cropped:.1%}"]
        clips = f"{row.clips:,.0f}" if row.clips == int(row.clips) else f"{row.clips:,.1f}"
        middle = [f"{bucket.num_tokens / budget:.1%}"]
        if not packs:
            cost = bucket.micro_batch_cost
            middle = [f"{float(bucket.cost):g}", str(bucket.micro_batch_size), f"{float(cost):g}"]
            middle += [f"{float(cost) / budget:.1%}", str(bucket.cost_class)]
        cells.append([str(bucket), clips, f"{bucket.num_tokens:,}", *middle, *share])
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    lines = [[row[0].ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]] for row in
             [titles, *cells]]  # fmt: skip
    return ["  ".join(line) for line in lines]


def _histogram(rows: Sequence[BucketRow]) -> list[str]:
    clips: dict[int, float] = {}
    for row in rows:
        clips[row.bucket.num_tokens] = clips.get(row.bucket.num_tokens, 0) + row.clips
    total, longest = sum(clips.values()), max(clips.values())
    return [
        f"  {tokens:>9,}  {'#' * round(_BAR * count / longest):<{_BAR}}  {count / total:6.1%}"
        for tokens, count in sorted(clips.items())
    ]
