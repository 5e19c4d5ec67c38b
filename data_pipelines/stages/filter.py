"""Filter: drop clips whose scores break a rule."""

from __future__ import annotations

from data_pipelines.rows import Rejected, Row
from data_pipelines.workspace import Workspace
from videofm.config.curation_stages import FilterConfig
from videofm.errors import DataError


class FilterStage:
    """See `FilterConfig`."""

    name, requires, placement = "filter", (), "child"

    def __init__(self, config: FilterConfig) -> None:
        self.config = config

    def process(self, row: Row, work: Workspace) -> list[Row]:
        for rule in self.config.rules:
            value = row.scores.get(rule.score)
            if value is None or value != value:
                there = ", ".join(sorted(row.scores)) or "none"
                raise DataError(f"{row.name} has no score {rule.score!r}, on which the filter has a rule. It has: {there}")
            if rule.min is not None and value < rule.min:
                raise Rejected(rule.reason, f"{rule.score} {value:.5g}, at least {rule.min:g}")
            if rule.max is not None and value > rule.max:
                raise Rejected(rule.reason, f"{rule.score} {value:.5g}, at most {rule.max:g}")
        return [row]
