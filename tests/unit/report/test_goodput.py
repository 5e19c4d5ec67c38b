"""The table of where a run's time went: the largest part first, every text escaped, and nothing where there is nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.unit.report.test_page import EVIL, a_run
from videofm.report.goodput import time_table
from videofm.report.page import build
from videofm.run_dir import write_json

GOODPUT = {
    "wall_seconds": 200.0,
    "num_attempts": 3,
    "num_redone_steps": 7,
    "seconds": {"useful": 120.0, "startup": 60.0, "down": 19.9, EVIL: 0.1, "other": 0.0},
    "about": {"useful": "steps that count", "startup": EVIL},
}


def test_parts_come_by_their_share() -> None:
    """120 + 60 + 19.9 + 0.1 s of 200: what has no name is called as it is, and less than a thousandth is left out."""
    page = time_table(GOODPUT)
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert cells[:3] == ["steps that count", "2 min 00 s", "60.0 %"]
    assert cells[4:8] == ["1 min 00 s", "30.0 %", "down", "20 s"] and len(cells) == 9
    assert "60.0 % of 3 min 20 s since the first launch; attempts: 3, steps done again: 7" in page


@pytest.mark.parametrize(
    "goodput", [{}, {"wall_seconds": 0.0, "seconds": {}}, {"wall_seconds": 2.0, "seconds": 3}, {"seconds": {}}]
)
def test_without_time_there_is_no_table(goodput: dict[str, Any]) -> None:
    assert time_table(goodput) == ""


def test_the_page_of_a_run_has_it(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    assert "effective training time" not in build(run.path)
    write_json(run.path / "goodput.json", GOODPUT)
    page = build(run.path)
    assert "effective training time" in page and "<script" not in page
    (run.path / "goodput.json").write_text("{")
    assert "could not be read: " in build(run.path)
