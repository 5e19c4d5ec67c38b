"""Histograms of kept and lost clips as inline SVG, with the thresholds of rules; filled a shard at a time in fixed bins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

import numpy as np

from videofm.report.charts import log_ticks, number, ticks

NUM_BINS = 48
WIDTH, HEIGHT = 320, 170
LEFT, RIGHT, BOTTOM = 34, 10, 24
TOP, TOP_WITH_LIMITS = 8, 30
_LOG_SPAN, _CROWDED = 100.0, 0.12
"""Values that differ by more than this factor, with a mean below this share of the largest, are binned by their logarithm."""
_LOG_DECADES = 6
"""A logarithmic axis begins at most this many powers of ten below the largest value."""
_STRETCH = 3.0
"""A threshold outside of the values is on the axis if that makes it at most this much longer."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Threshold:
    """A limit of a rule on a score: `side` says which limit of the values that pass `value` is."""

    side: Literal["min", "max"]
    value: float
    stage: str

    def count_refused(self, values: Array) -> int:
        """How many of `values` it refuses."""
        return int(np.count_nonzero(values < self.value if self.side == "min" else values > self.value))


@dataclass
class Spread:
    """What a first pass over values learns; `low_positive` is the smallest value above zero."""

    low: float = math.inf
    high: float = -math.inf
    low_positive: float = math.inf
    count: int = 0
    total: float = 0.0

    def add(self, values: Array) -> None:
        """Take some finite values."""
        if values.size:
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
            self.low_positive = min(self.low_positive, float(values[values > 0].min(initial=math.inf)))
            self.count, self.total = self.count + len(values), self.total + float(values.sum())

    @property
    def log(self) -> bool:
        """Whether bins are to be of equal width in the logarithm: values span much, and most of them crowd near zero."""
        if self.low < 0 or not math.isfinite(self.low_positive) or self.high < _LOG_SPAN * self.low_positive:
            return False
        return self.total / self.count < _CROWDED * self.high


@dataclass
class Histogram:
    """Counts of kept and of lost clips in bins of equal width (in the logarithm, if `log`). Values beyond the ends of the axis,
    zero on a logarithmic one, count in the outermost bin. `passed` and `refused` count, for each threshold, all values."""

    name: str
    edges: Array
    log: bool
    thresholds: Sequence[Threshold] = ()
    kept: Array = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))
    lost: Array = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))
    refused: list[int] = field(default_factory=list)
    total: float = 0.0

    @classmethod
    def over(cls, name: str, spread: Spread, thresholds: Sequence[Threshold] = ()) -> Histogram:
        """An empty histogram whose axis shows all values, and thresholds that are not far off.

        A spread without values gives one from 0 to 1.
        """
        low, high = (spread.low, spread.high) if spread.low <= spread.high else (0.0, 1.0)
        log = spread.log
        if log:
            low = max(spread.low_positive, high / 10.0**_LOG_DECADES)
        reach = _STRETCH * max(high - low, abs(high) * 1e-3, 1e-9)
        for limit in (threshold.value for threshold in thresholds):
            near = max(high, limit) - min(low, limit) <= reach if not log else high / 1e8 <= limit <= high * 10 and limit > 0
            low, high = (min(low, limit), max(high, limit)) if near else (low, high)
        if not high > low:
            low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
        edges = np.geomspace(low, high, NUM_BINS + 1) if log else np.linspace(low, high, NUM_BINS + 1)
        return cls(name, edges, log, tuple(thresholds), refused=[0] * len(thresholds))

    def add(self, values: Array, kept: bool) -> None:
        """Count finite values."""
        bins = np.clip(np.searchsorted(self.edges, values, side="right") - 1, 0, NUM_BINS - 1)
        counts = np.bincount(bins, minlength=NUM_BINS)
        if kept:
            self.kept += counts
        else:
            self.lost += counts
        self.total += float(values.sum())
        for index, threshold in enumerate(self.thresholds):
            self.refused[index] += threshold.count_refused(values)

    @property
    def num_kept(self) -> int:
        """Values of kept clips."""
        return int(self.kept.sum())

    @property
    def num_lost(self) -> int:
        """Values of lost clips."""
        return int(self.lost.sum())

    def share(self, value: float) -> float:
        """Where `value` stands on the axis: 0 at its start, 1 at its end; outside of [0, 1] beyond."""
        low, high = float(self.edges[0]), float(self.edges[-1])
        if not self.log:
            return (value - low) / (high - low)
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low)) if value > 0 else -1.0


def figure(histogram: Histogram, about: str = "") -> str:
    """The histogram with its title, the numbers of clips and, for each threshold, how many lie on which side."""
    kept, lost = histogram.num_kept, histogram.num_lost
    mean = f'mean <span class="last">{number(histogram.total / max(1, kept + lost))}</span>'
    counts = f"{kept:,} kept" + (f", {lost:,} lost" if lost else "")
    axis = ", log axis" if histogram.log else ""
    title = f'<b>{escape(histogram.name)}</b> <span class="about">{escape(about)}</span>'
    rules = "".join(_rule(histogram, index) for index in range(len(histogram.thresholds)))
    caption = f'<figcaption>{title}<div class="why">{counts}, {mean}{axis}{rules}</div></figcaption>'
    return f'<figure class="histogram">{caption}{_svg(histogram)}</figure>'


def _rule(histogram: Histogram, index: int) -> str:
    threshold, refused = histogram.thresholds[index], histogram.refused[index]
    passed = histogram.num_kept + histogram.num_lost - refused
    word = "below" if threshold.side == "min" else "above"
    sides = f"{refused:,} {word}, {passed:,} pass"
    far = "" if 0 <= histogram.share(threshold.value) <= 1 else ", off the axis"
    return f'<br><span class="rule">{escape(threshold.stage)}: {threshold.side} {number(threshold.value)}</span> {sides}{far}'


def _svg(histogram: Histogram) -> str:
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="histogram of {escape(histogram.name)}">']
    limits = [threshold for threshold in histogram.thresholds if 0 <= histogram.share(threshold.value) <= 1]
    top, base, width = TOP_WITH_LIMITS if limits else TOP, HEIGHT - BOTTOM, WIDTH - LEFT - RIGHT
    highest = max(1, int((histogram.kept + histogram.lost).max()))
    for tick in (tick for tick in ticks(0, highest, 3) if tick == int(tick)):
        y = base - tick / highest * (base - top)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    parts += _bars(histogram, (base - top) / highest)
    low, high = float(histogram.edges[0]), float(histogram.edges[-1])
    for tick in log_ticks(low, high) if histogram.log else ticks(low, high, 5):
        x = LEFT + histogram.share(tick) * width
        parts.append(f'<text x="{x:.1f}" y="{base + 15}" text-anchor="middle">{number(tick)}</text>')
    parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    for row, threshold in enumerate(limits):
        x, y = LEFT + histogram.share(threshold.value) * width, 12 + 12 * (row % 2)
        anchor, shift = ("end", -4) if x > LEFT + width / 2 else ("start", 4)
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 6}" y2="{base}"/>')
        text = f"{threshold.side} {number(threshold.value)}"
        parts.append(f'<text class="limit" x="{x + shift:.1f}" y="{y + 3}" text-anchor="{anchor}">{text}</text>')
    return "".join(parts) + "</svg>"


def _bars(histogram: Histogram, rise_of_one: float) -> Iterable[str]:
    """A stacked bar for each bin that is not empty, kept below and lost above; its numbers show under the pointer."""
    step, base = (WIDTH - LEFT - RIGHT) / NUM_BINS, HEIGHT - BOTTOM
    for index in np.flatnonzero(histogram.kept + histogram.lost):
        kept, lost = int(histogram.kept[index]), int(histogram.lost[index])
        low, high = (number(float(edge)) for edge in histogram.edges[index : index + 2])
        x, y, rects = LEFT + step * index, float(base), ""
        for name, count in (("kept", kept), ("lost", lost)):
            rise = count * rise_of_one
            y -= rise
            if count:
                rects += f'<rect class="{name}" x="{x + 0.5:.1f}" y="{y:.1f}" width="{step - 1:.1f}" height="{rise:.1f}"/>'
        yield f"<g>{rects}<title>{low} to {high}: {kept} kept, {lost} lost</title></g>"
