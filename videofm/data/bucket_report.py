"""What the buckets of a configuration make of a dataset, before any training: what falls where, how long steps are, who waits.

The order of samples is a pure function, so it is played through, without decoding anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from videofm.config.data import DataConfig
from videofm.data.buckets import Bucket, BucketBatch, cropped_share
from videofm.data.manifest import Manifest
from videofm.data.plan import DataPlan, PlanState
from videofm.errors import ConfigError

_BAR = 40
"""Characters of the longest bar."""

_MAX_CLIPS, _MAX_EPOCHS = 100_000, 100
"""Epochs are played through until one of these is reached, so that what is carried weighs little."""


@dataclass(frozen=True)
class BucketRow:
    """One bucket: the clips of an epoch, the share of the steps (they add to 1), the share of pixels outside of windows."""

    bucket: Bucket
    clips: float
    step_share: float
    cropped: float


@dataclass(frozen=True)
class BucketReport:
    """Everything that is printed. Costs are modelled; that of a step is its dearest rank's, where each rank takes one
    micro-batch and the images that pad it."""

    rows: list[BucketRow]
    left_out: Counter[str]
    num_epochs: int
    num_steps: int
    num_padding_images: int
    mean_cost: float
    max_cost: float
    idle_share: float
    largest_carry: int

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
    manifest = Manifest.load(Path(config.manifest))
    plan = DataPlan(manifest.records(config.split), manifest.hash, config, seed)
    return as_text(plan, report(plan))


def report(plan: DataPlan) -> BucketReport:
    """Play the order of a plan with buckets through."""
    assert plan.buckets is not None
    state, drawn, tally = PlanState(), Counter[Bucket](), _Tally(plan.config.num_micro_batches)
    largest_carry = 0
    while state.epoch < 1 or (state.epoch < _MAX_EPOCHS and state.epoch * len(plan.records) < _MAX_CLIPS):
        drawn.update(plan.bucket_of(*clip) for clip in plan.window(state.epoch, state.window))
        packed = plan.packed(state)
        for step in packed.steps:
            tally.add(step)
        largest_carry = max(largest_carry, len(packed.rest))
        state = plan.next_window(state, packed.rest)
    return tally.report(plan, plan.buckets.all, drawn, state.epoch, largest_carry)


class _Tally:
    """Sums over steps."""

    def __init__(self, num_micro_batches: int) -> None:
        self.num_micro_batches = num_micro_batches
        self.shares: Counter[Bucket] = Counter()
        self.costs: list[float] = []
        self.means: list[float] = []
        self.num_padding_images = 0

    def add(self, step: Sequence[BucketBatch]) -> None:
        """One step."""
        count = self.num_micro_batches
        self.shares.update(batch.bucket for batch in step[:count])
        self.num_padding_images += sum(len(batch.clips) for batch in step[count:])
        ranks = [float(sum(batch.cost for batch in step[rank::count])) for rank in range(count)]
        self.costs.append(max(ranks))
        self.means.append(sum(ranks) / count)

    def report(
        self, plan: DataPlan, buckets: Sequence[Bucket], drawn: Counter[Bucket], num_epochs: int, largest_carry: int
    ) -> BucketReport:
        """The sums, as shares and means."""
        num_steps, total = len(self.costs), sum(self.costs)
        cropped = dict.fromkeys(buckets, 0.0)
        for key, place in plan.placements.items():
            cropped[place.bucket] += float(cropped_share(plan.records[key].height, plan.records[key].width, place.bucket))
        fallen = Counter(place.bucket for place in plan.placements.values())
        rows = [
            BucketRow(
                bucket,
                drawn[bucket] / num_epochs,
                self.shares[bucket] / max(1, num_steps * self.num_micro_batches),
                cropped[bucket] / max(1, fallen[bucket]),
            )
            for bucket in buckets
        ]
        return BucketReport(
            rows,
            plan.left_out,
            num_epochs,
            num_steps,
            self.num_padding_images,
            mean_cost=total / max(1, num_steps),
            max_cost=max(self.costs, default=0.0),
            idle_share=1 - sum(self.means) / total if total else 0.0,
            largest_carry=largest_carry,
        )


def as_text(plan: DataPlan, found: BucketReport) -> str:
    """The report for people."""
    assert plan.buckets is not None
    config, unit = plan.config, "s" if all(size.seconds for size in plan.buckets.section.sizes) else "tokens"
    placed, nowhere = len(plan.records), found.left_out.total()
    parts = [
        f"{config.manifest}, split {config.split}: {placed + nowhere:,} clips, {placed:,} in buckets, {nowhere:,} in none",
        f"a micro-batch costs at most {float(plan.buckets.budget):g} {unit}; a step has {config.num_micro_batches} of one cost "
        "class",
        "",
        *_table(found.rows, float(plan.buckets.budget)),
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
    if plan.buckets.section.image_padding:
        parts.append(f"images given to steps of videos: {found.num_padding_images / found.num_epochs:,.1f} an epoch")
    return "\n".join(parts)


def _table(rows: Sequence[BucketRow], budget: float) -> list[str]:
    titles = ["bucket", "clips", "tokens", "cost", "clips a micro-batch", "its cost", "of budget", "class", "steps", "cropped"]
    cells = [
        [
            str(row.bucket),
            f"{row.clips:,.0f}" if row.clips == int(row.clips) else f"{row.clips:,.1f}",
            f"{row.bucket.num_tokens:,}",
            f"{float(row.bucket.cost):g}",
            str(row.bucket.micro_batch_size),
            f"{float(row.bucket.micro_batch_cost):g}",
            f"{float(row.bucket.micro_batch_cost) / budget:.1%}",
            str(row.bucket.cost_class),
            f"{row.step_share:.1%}",
            f"{row.cropped:.1%}",
        ]
        for row in rows
    ]
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
