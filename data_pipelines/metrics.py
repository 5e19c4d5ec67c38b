"""The funnel: what went into each stage, what came out, why the rest did not, and what it cost."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipelines.rows import Loss

KINDS = ("dropped", "errors", "quarantined")
_NUMBERS = ("num_in", "num_out", "num_made", "retries", "bytes_in", "bytes_out", "cpu_seconds", "wall_seconds")
_COUNTERS = (*KINDS, "notes", "latency")
_BINS_A_DOUBLING = 4


def latency_bin(seconds: float) -> str:
    """The bin of a latency in a histogram with four bins a doubling, from a microsecond; bins of two histograms add up."""
    return str(max(0, math.floor(math.log2(max(seconds, 1e-6) / 1e-6) * _BINS_A_DOUBLING)))


def quantile(histogram: Mapping[str, int], share: float) -> float | None:
    """The latency in seconds below which `share` of the rows were done: the upper edge of its bin, at most 19% too large."""
    total, seen = sum(histogram.values()), 0
    for name in sorted(histogram, key=int):
        seen += histogram[name]
        if seen >= share * total:
            return 1e-6 * 2.0 ** ((int(name) + 1) / _BINS_A_DOUBLING)
    return None


@dataclass
class StageMetrics:
    """Counts of a stage over all groups. `num_in`, `num_out` and the losses count rows that came in; `num_made` rows that left,
    which is more where `split` cuts a source into clips. `num_in = num_out + dropped + errors + quarantined`.

    `retries` counts attempts after the first one. `bytes_in` are those of sources that were opened for the stage, `bytes_out`
    those of clips that it wrote. `latency` counts rows by the bin of the wall time that each took.
    """

    stage: str
    num_in: int = 0
    num_out: int = 0
    num_made: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    latency: Counter[str] = field(default_factory=Counter)

    def lose(self, loss: Loss) -> None:
        """Count a loss."""
        getattr(self, loss.kind)[loss.reason] += loss.num_rows

    def take(self, event: Mapping[str, Any]) -> None:
        """Count what a child reports of one pass through the stage (see `child.run_stages`), without its losses."""
        self.num_in += event["in"]
        self.num_out += event["out"]
        self.num_made += event["made"]
        self.bytes_out += event["bytes_out"]
        self.cpu_seconds += event["cpu_seconds"]
        self.wall_seconds += sum(event["seconds"])
        self.latency.update(map(latency_bin, event["seconds"]))
        self.notes.update({name: count for name, count in event["notes"].items() if count})

    def add(self, other: StageMetrics) -> None:
        """Count the rows of `other`, of the same stage, too."""
        assert self.stage == other.stage
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _COUNTERS:
            getattr(self, name).update(getattr(other, name))

    def check(self) -> None:
        """No row was lost without a reason."""
        lost = sum(sum(getattr(self, kind).values()) for kind in KINDS)
        assert self.num_in == self.num_out + lost, f"{self.stage}: {self.num_in} in, {self.num_out} out, {lost} lost"

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), **{name: dict(sorted(getattr(self, name).items())) for name in _COUNTERS}}

    def summary(self) -> dict[str, Any]:
        """As plain values for people and reports: quantiles of the latency in seconds instead of its histogram."""
        value = self.to_json()
        histogram = value.pop("latency")
        return {**value, "latency_p50": quantile(histogram, 0.5), "latency_p95": quantile(histogram, 0.95)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StageMetrics:
        """The inverse of `to_json`."""
        return cls(**{**value, **{name: Counter(value[name]) for name in _COUNTERS}})


class Funnel:
    """The metrics of all stages, in order; it grows with the number of stages and of reasons, not with that of rows."""

    def __init__(self, stages: Iterable[str]) -> None:
        self.stages = {name: StageMetrics(name) for name in stages}

    def add_group(self, metrics: Iterable[dict[str, Any]]) -> None:
        """Count what one group reports."""
        for value in metrics:
            self.stages[value["stage"]].add(StageMetrics.from_json(value))

    def check(self) -> None:
        """Every row is accounted for, within each stage and from each stage to the next."""
        before: StageMetrics | None = None
        for stage in self.stages.values():
            stage.check()
            assert before is None or before.num_made == stage.num_in, f"{before} made what {stage} did not get"
            before = stage

    def reasons(self) -> str:
        """All reasons with their counts, most frequent first, for a message."""
        counts: Counter[str] = Counter()
        for stage in self.stages.values():
            for kind in KINDS:
                counts.update({f"{stage.stage}: {reason}": count for reason, count in getattr(stage, kind).items()})
        return ", ".join(f"{reason} ({count})" for reason, count in counts.most_common()) or "nothing was refused"

    def to_json(self) -> list[dict[str, Any]]:
        """The stages as plain values."""
        return [stage.summary() for stage in self.stages.values()]

    def rows(self) -> list[tuple[str, ...]]:
        """The funnel as a table: stage, in, out, made, lost, why, seconds of CPU, and the median and 95% latency."""
        table = []
        for stage in self.stages.values():
            why = [f"{reason} {count}" for kind in KINDS for reason, count in sorted(getattr(stage, kind).items())]
            numbers = (stage.num_in, stage.num_out, stage.num_made, stage.num_in - stage.num_out)
            times = (quantile(stage.latency, 0.5), quantile(stage.latency, 0.95))
            shown = "" if None in times else " / ".join(f"{time:.2g}" for time in times if time is not None)
            table.append((stage.stage, *map(str, numbers), ", ".join(why), f"{stage.cpu_seconds:.1f}", shown))
        return table


HEADINGS = ("stage", "in", "out", "made", "lost", "why", "CPU s", "p50/p95 s")


def render(funnel: Funnel, title: str, terminal: bool) -> str:
    """The funnel as text; with lines and colours on a terminal."""
    # rich is imported here so that the child and the workers do not pay for it.
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE if terminal else box.ASCII2, title_style="bold")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("stage", "why") else "right", overflow="fold")
    for row in funnel.rows():
        table.add_row(*row)
    buffer = io.StringIO()
    Console(file=buffer, force_terminal=terminal, width=None if terminal else 120).print(table)
    return buffer.getvalue().rstrip("\n")
