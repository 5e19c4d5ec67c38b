"""Tables of measures that have many numbers of one kind: a row for each model, count of steps, or window of a long video."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from videofm.report.charts import number
from videofm.report.pieces import table

SHARES = ("colour", "direction", "shape", "both", "all", "accuracy")
"""Columns that are shares, shown in percent."""
NAMES = ("variant", "num_steps", "window", "first_frame", "axis")
"""Columns that say what a row is about: they come first, and the rest as it was written (files sort their keys)."""


def row_tables(metrics: Sequence[dict[str, Any]]) -> str:
    """A table for each of `metrics` (as in evaluation.json) that has `rows`, under the name of its kind."""
    return "".join(_table(metric) for metric in metrics if rows_of(metric))


def rows_of(metric: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a measure, or none; what is no row is left out."""
    rows = metric.get("rows")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _table(metric: dict[str, Any]) -> str:
    rows = rows_of(metric)
    there = dict.fromkeys(name for row in rows for name in row)
    columns = [*(name for name in NAMES if name in there), *(name for name in there if name not in NAMES)]
    numeric = [index for index, name in enumerate(columns) if any(_is_number(row.get(name)) for row in rows)]
    cells = [[escape(_say(name, row.get(name))) for name in columns] for row in rows]
    title = f"{metric.get('kind', '?')}: {metric.get('of', '')}".rstrip(": ")
    return f"<h3>{escape(title)}</h3>" + table([name.replace("_", " ") for name in columns], cells, numeric=numeric)


def _say(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if not _is_number(value):
        return str(value)
    return f"{100 * value:.0f} %" if name in SHARES else number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
