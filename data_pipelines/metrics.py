"""The funnel: what went into each stage, what came out, and why the rest did not."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from data_pipelines.rows import Loss

KINDS = ("dropped", "errors", "quarantined")


@dataclass
class StageMetrics:
    """Counts of a stage over all groups. `num_in`, `num_out` and the losses count rows that came in; `num_made` rows that left,
    which is more where `split` cuts a source into clips. `num_in = num_out + dropped + errors + quarantined`."""

    stage: str
    num_in: int = 0
    num_out: int = 0
    num_made: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    cpu_seconds: float = 0.0

    def lose(self, loss: Loss) -> None:
        """Count a loss."""
        getattr(self, loss.kind)[loss.reason] += loss.num_rows

    def add(self, other: StageMetrics) -> None:
        """Count the rows of `other`, of the same stage, too."""
        assert self.stage == other.stage
        for name in ("num_in", "num_out", "num_made", "cpu_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in (*KINDS, "notes"):
            getattr(self, name).update(getattr(other, name))

    def check(self) -> None:
        """No row was lost without a reason."""
        lost = sum(sum(getattr(self, kind).values()) for kind in KINDS)
        assert self.num_in == self.num_out + lost, f"{self.stage}: {self.num_in} in, {self.num_out} out, {lost} lost"

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**vars(self), **{name: dict(sorted(getattr(self, name).items())) for name in (*KINDS, "notes")}}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StageMetrics:
        """The inverse of `to_json`."""
        return cls(**{**value, **{name: Counter(value[name]) for name in (*KINDS, "notes")}})


class Funnel:
    """The metrics of all stages, in order, and the list of losses."""

    def __init__(self, stages: Iterable[str]) -> None:
        self.stages = {name: StageMetrics(name) for name in stages}
        self.losses: list[Loss] = []

    def add_group(self, metrics: Iterable[dict[str, Any]], losses: Iterable[dict[str, Any]]) -> None:
        """Count what one group reports."""
        for value in metrics:
            self.stages[value["stage"]].add(StageMetrics.from_json(value))
        self.losses += [Loss(**value) for value in losses]

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
        for loss in self.losses:
            counts[f"{loss.stage}: {loss.reason}"] += loss.num_rows
        return ", ".join(f"{reason} ({count})" for reason, count in counts.most_common()) or "nothing was refused"

    def to_json(self) -> list[dict[str, Any]]:
        """The stages as plain values."""
        return [stage.to_json() for stage in self.stages.values()]

    def rows(self) -> list[tuple[str, ...]]:
        """The funnel as a table: stage, in, out, made, lost, and why."""
        table = []
        for stage in self.stages.values():
            why = [f"{reason} {count}" for kind in KINDS for reason, count in sorted(getattr(stage, kind).items())]
            numbers = (stage.num_in, stage.num_out, stage.num_made, stage.num_in - stage.num_out)
            table.append((stage.stage, *map(str, numbers), ", ".join(why), f"{stage.cpu_seconds:.1f}"))
        return table


HEADINGS = ("stage", "in", "out", "made", "lost", "why", "CPU s")


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
