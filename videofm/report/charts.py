"""Line charts as inline SVG: round ticks, a faint raw line under a smoothed one, values on hover, a logarithmic twin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 34
MAX_POINTS = 240
"""Points drawn of a series: longer ones are averaged in equal bins of steps."""

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A named curve: `xs` ascending, `ys` as many; points that are not finite are left out."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]

    @property
    def points(self) -> Points:
        """The finite points."""
        return [(x, y) for x, y in zip(self.xs, self.ys, strict=True) if math.isfinite(x) and math.isfinite(y)]


def figure(series: Series, about: str = "", x_name: str = "step") -> str:
    """A chart with its title, its last value and, where all values are positive, a switch to a logarithmic axis."""
    points = series.points
    if not points:
        return ""
    last = f'<span class="last">{escape(number(_tail_mean(points)))}</span>'
    title = f'<figcaption><b>{escape(series.name)}</b> {last}<span class="about">{escape(about)}</span></figcaption>'
    linear = chart(points, series.name, x_name, log=False)
    if min(y for _, y in points) <= 0 or not _spans(points):
        return f"<figure>{title}{linear}</figure>"
    logarithmic = chart(points, series.name, x_name, log=True)
    checked = " checked" if _wants_log(points) else ""
    switch = f'<label class="log"><input type="checkbox"{checked}> log</label>'
    return f'<figure>{switch}{title}<div class="linear">{linear}</div><div class="logarithmic">{logarithmic}</div></figure>'


def chart(points: Points, name: str, x_name: str = "step", log: bool = False) -> str:
    """The SVG of one curve; `points` is not empty, and all y are positive when `log`."""
    drawn = binned(points)
    smooth = smoothed(drawn, log)
    xs, ys = [x for x, _ in drawn], [y for _, y in drawn]
    x_ticks = ticks(min(xs), max(xs), 5)
    y_ticks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys), 5)
    x_range = (min(xs), max(max(xs), min(xs) + 1e-9))
    low, high = min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])
    y_range = (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (x - x_range[0]) / (x_range[1] - x_range[0])
        bottom, top = (math.log(y_range[0]), math.log(y_range[1])) if log else y_range
        rise = ((math.log(y) if log else y) - bottom) / ((top - bottom) or 1)
        return LEFT + share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - rise * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(name)} by {escape(x_name)}">']
    for tick in y_ticks:
        _, y = place(x_range[0], tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_range[1])
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{number(tick)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="base" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_name)}</text>'
    )
    parts.append(f'<polyline class="raw" points="{_path([place(*point) for point in drawn])}"/>')
    parts.append(f'<polyline class="smooth" points="{_path([place(*point) for point in smooth])}"/>')
    parts += _hover(drawn, [place(*point) for point in drawn], name, x_name)
    return "".join(parts) + "</svg>"


def binned(points: Points, most: int = MAX_POINTS) -> Points:
    """At most `most` points: means of equal runs of neighbours; the last point stands at the last x."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / most)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(run[-1][0], math.fsum(y for _, y in run) / len(run)) for run in runs]


def smoothed(points: Points, log: bool = False) -> Points:
    """At each point the value of a straight line fitted to its neighbours, a twentieth of all points (in log y, if `log`).

    A moving average would bend off at both ends, where a window has neighbours on one side only.
    """
    reach = len(points) // 40
    ys = [math.log(y) if log else y for _, y in points]
    result = []
    for index, (x, _) in enumerate(points):
        window = range(max(0, index - reach), min(len(points), index + reach + 1))
        middle = (window[0] + window[-1]) / 2
        mean = math.fsum(ys[near] for near in window) / len(window)
        spread = math.fsum((near - middle) ** 2 for near in window)
        slope = math.fsum((near - middle) * ys[near] for near in window) / spread if spread else 0.0
        value = mean + slope * (index - middle)
        result.append((x, math.exp(value) if log else value))
    return result


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers inside [low, high], 1, 2 or 5 times a power of ten apart: at most `count` + 1, and at least three."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    for step in (unit * scale for scale in (10 * power, power, power / 10) for unit in (5, 2, 1)):
        inside = [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        if len(inside) >= min(3, count):
            return [float(f"{tick:.12g}") for tick in inside]
    return [low, high]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], with 2 and 5 times them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for units in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [float(f"{unit * 10.0**power:.6g}") for power in powers for unit in units]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 6)]
    return ticks(low, high, 4)


def number(value: float) -> str:
    """A number as short as it stays readable: `0.123`, `12.5k`, `3e-05`."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6 or size < 1e-3:
        return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-")
    if size >= 1e4:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"


def _path(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)


def _hover(points: Points, places: Sequence[tuple[float, float]], name: str, x_name: str) -> list[str]:
    """A dot and a value for each point, which show while the pointer is in its column."""
    parts = []
    for index, ((x, y), (left, top)) in enumerate(zip(points, places, strict=True)):
        before = places[index - 1][0] if index else left
        after = places[index + 1][0] if index + 1 < len(places) else left
        start, end = (before + left) / 2, max((left + after) / 2, (before + left) / 2 + 0.5)
        text = f"{x_name} {number(x)}: {name} {number(y)}"
        parts.append(
            f'<g class="point"><rect x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" height="{HEIGHT - TOP - BOTTOM}"/>'
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3"/><title>{escape(text)}</title></g>'
        )
    return parts


def _tail_mean(points: Points) -> float:
    tail = points[-max(1, len(points) // 20) :]
    return math.fsum(y for _, y in tail) / len(tail)


def _spans(points: Points) -> bool:
    ys = [y for _, y in points]
    return max(ys) > 1.5 * min(ys)


def _wants_log(points: Points) -> bool:
    """Whether values span so much that a linear axis shows only a corner."""
    ys = [y for _, y in binned(points, 40)]
    return max(ys) > 20 * min(ys)
