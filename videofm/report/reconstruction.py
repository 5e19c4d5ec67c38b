"""The table of papers on video VAEs, out of the results of `reconstruction` metrics: one row each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLUMNS = ("model", "run", "params", "compression", "channels", "PSNR", "SSIM", "LPIPS", "rFVD", "clips")
FIELDS = ("model", "mode", "num_parameters", "latent_channels", "psnr", "ssim", "lpips", "rfvd", "num_clips")
"""Numbers and words of a result that the table shows, apart from lists."""
NUMERIC = tuple(range(2, len(COLUMNS)))
"""Columns that are aligned to the right."""
ABSENT = "-"


def table_cells(metrics: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows of `COLUMNS` for those of `metrics` (as in evaluation.json) that are reconstructions; `-` where not measured."""
    return [_row(metric) for metric in metrics if metric.get("kind") == "reconstruction"]


def as_text(metrics: Sequence[dict[str, Any]]) -> str:
    """The table as text, empty without reconstructions."""
    rows = [list(COLUMNS), *table_cells(metrics)]
    if len(rows) == 1:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]

    def line(row: list[str]) -> str:
        cells = (
            cell.rjust(width) if column in NUMERIC else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))


def _row(metric: dict[str, Any]) -> list[str]:
    mode = metric.get("mode", "whole")
    return [
        str(metric.get("model", ABSENT)),
        str(metric.get("of", ABSENT)) + ("" if mode == "whole" else f" ({mode})"),
        _number(metric, "num_parameters", "{:.1f}M", 1e-6),
        _sizes(metric, "compression"),
        _number(metric, "latent_channels", "{:.0f}"),
        _number(metric, "psnr", "{:.2f}"),
        _number(metric, "ssim", "{:.4f}"),
        _number(metric, "lpips", "{:.4f}"),
        _number(metric, "rfvd", "{:.1f}"),
        f"{_number(metric, 'num_clips', '{:.0f}')} of {_sizes(metric, 'clip')}",
    ]


def _sizes(metric: dict[str, Any], key: str) -> str:
    """`8x32x32`: time, height, width."""
    sizes = metric.get(key)
    return "x".join(map(str, sizes)) if isinstance(sizes, list) else ABSENT


def _number(metric: dict[str, Any], key: str, form: str, scale: float = 1.0) -> str:
    value = metric.get(key)
    return form.format(value * scale) if isinstance(value, int | float) else ABSENT
