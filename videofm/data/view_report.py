"""What each rule of a view removes, and what stays: one pass over the index."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow

from videofm.data.manifest import Manifest
from videofm.data.view import ResolvedRule, ResolvedView, in_splits, missing_message, number, tables
from videofm.errors import DataError

_COLUMNS = ["split", "num_frames", "fps"]


@dataclass
class RuleCount:
    """Clips that a rule drops: by itself, after the rules before it, and that no other rule drops."""

    rule: ResolvedRule
    alone: int = 0
    in_order: int = 0
    uniquely: int = 0
    missing: int = 0


@dataclass
class ViewReport:
    """The counts of a view over a dataset; `clips` and `hours` by split are of those that stay."""

    view: ResolvedView
    rules: list[RuleCount]
    num_clips: int = 0
    other_splits: int = 0
    clips: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)

    @property
    def num_kept(self) -> int:
        """Clips that stay."""
        return self.clips.total()


def report(view: ResolvedView, manifest: Manifest) -> ViewReport:
    """Play a view through a dataset.

    Raises:
        DataError: clips lack a score that a rule says must not be missing; the message has their number in the whole dataset.
    """
    found = ViewReport(view, [RuleCount(rule) for rule in view.rules])
    for table in tables(manifest, sorted({*_COLUMNS, *view.columns})):
        found.num_clips += len(table)
        inside = in_splits(table, view.splits)
        found.other_splits += int((~inside).sum())
        _count(found, table.filter(pyarrow.array(inside)))
    for count in found.rules:
        if count.missing and count.rule.missing == "error":
            num_clips = found.num_clips - found.other_splits
            raise DataError(missing_message(count.rule.name, str(count.rule.score), count.missing, num_clips))
    return found


def _count(found: ViewReport, table: pyarrow.Table) -> None:
    kept: list[np.ndarray[Any, Any]] = []
    for count in found.rules:
        absent = np.isnan(number(table, count.rule.score, count.rule.field))
        count.missing += int(absent.sum())
        # A row whose score must not be missing is told of at the end, with the count of the whole dataset.
        kept.append(np.ones(len(table), bool) if count.rule.missing == "error" and absent.any() else count.rule.keep(table))
    num_dropping = np.sum([~mask for mask in kept], axis=0)
    left = np.ones(len(table), bool)
    for count, mask in zip(found.rules, kept, strict=True):
        count.alone += int((~mask).sum())
        count.uniquely += int((~mask & (num_dropping == 1)).sum())
        count.in_order += int((left & ~mask).sum())
        left &= mask
    seconds = number(table, None, "duration")
    for split in view_splits(table, left):
        mask = left & in_splits(table, [split])
        found.clips[split] += int(mask.sum())
        found.seconds[split] += float(seconds[mask].sum())  # type: ignore[assignment]


def view_splits(table: pyarrow.Table, rows: np.ndarray[Any, Any]) -> list[str]:
    """The splits of some rows."""
    return sorted(set(table["split"].filter(pyarrow.array(rows)).to_pylist()))


def as_text(found: ViewReport) -> str:
    """The report for people."""
    view, total = found.view, found.num_clips - found.other_splits
    titles = ["rule", "keeps", "alone", "in order", "uniquely", "without it"]
    cells = [
        [c.rule.name, _bounds(c.rule), f"{c.alone:,}", f"{c.in_order:,}", f"{c.uniquely:,}", f"{c.missing:,}"]
        for c in found.rules
    ]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    lines = [
        "  ".join([c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]).rstrip()
        for row in [titles, *cells]
    ]
    parts = [
        f"view {view.name} (hash {view.hash[:12]}): {total:,} clips in {', '.join(view.splits)}; it drops:",
        "",
        *lines,
        "",
    ]
    share = found.num_kept / total if total else 0.0
    parts.append(f"{found.num_kept:,} clips stay ({share:.1%})")
    parts += [f"  {s:<9} {found.clips[s]:>12,} clips {found.seconds[s] / 3600:>12,.2f} h" for s in view.splits]
    if found.other_splits:
        parts.append(f"{found.other_splits:,} clips are in other splits")
    if view.rank_error:
        parts.append(
            f"quantiles are from a sample: with a probability of 99% each is off by at most {view.rank_error:.2%} of the clips"
        )
    return "\n".join(parts)


def _bounds(rule: ResolvedRule) -> str:
    about = rule.score if rule.score is not None else rule.field
    low = f"{rule.min:.6g} <= " if rule.min is not None else ""
    high = f" <= {rule.max:.6g}" if rule.max is not None else ""
    return f"{low}{about}{high}"
