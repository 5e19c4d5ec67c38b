"""The table of where a run's time went, from the file that the supervisor of a training leaves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any, TypeGuard

from videofm.progress import duration
from videofm.report.pieces import table


def time_table(goodput: Mapping[str, Any]) -> str:
    """The parts of `goodput.json` (see `train.goodput`), the largest first; nothing where there is none, or no time."""
    seconds, wall, about = goodput.get("seconds"), goodput.get("wall_seconds"), goodput.get("about", {})
    if not isinstance(seconds, dict) or not isinstance(about, dict) or not _is_number(wall) or wall <= 0:
        return ""
    parts = sorted(((name, value) for name, value in seconds.items() if _is_number(value)), key=lambda part: -part[1])
    rows = [
        [escape(str(about.get(name, name))), escape(duration(value)), f"{100 * value / wall:.1f} %"]
        for name, value in parts
        if value >= 0.001 * wall
    ]
    attempts, redone = goodput.get("num_attempts", "?"), goodput.get("num_redone_steps", "?")
    share = 100 * seconds["useful"] / wall if _is_number(seconds.get("useful")) else math.nan
    told = f"{share:.1f} % of {duration(wall)} since the first launch; attempts: {attempts}, steps done again: {redone}"
    head = f'<h3>effective training time</h3><div class="why">{escape(told)}</div>'
    return head + table(["where the time went", "time", "share"], rows, numeric=(1, 2))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
