"""How the kill matrix draws its moments, and what its table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import MOMENTS, Fault
from tests.kill_matrix import ORDER, Disturbed, draw
from tools.kill_matrix import BEGIN, DOCS, END, Row, put, table

COUNTS = [{"forward": 40, "commit": 3, "decode": 12, "collective": 7}, {"forward": 40, "decode": 12}]


def test_moments_are_drawn_within_what_each_rank_passes() -> None:
    found = draw("dit", COUNTS, 40, 0)
    assert found == draw("dit", COUNTS, 40, 0) != draw("dit", COUNTS, 40, 1) != draw("vae", COUNTS, 40, 1)
    assert {fault.moment for fault in found} == {"forward", "commit", "decode", "collective", "data_worker"}
    assert {fault.rank for fault in found if fault.moment in ("commit", "collective")} == {0}, "the other never comes there"
    assert {fault.rank for fault in found if fault.moment == "forward"} == {0, 1}
    for fault in found:
        assert fault.number <= COUNTS[fault.rank]["decode" if fault.moment == "data_worker" else fault.moment]
        assert fault.moment != "collective" or fault.number <= 6, "the last ones may not come again"
    assert len({fault.number for fault in found if fault.moment == "forward"}) > 3


def test_kinds_that_no_rank_passes_are_left_out() -> None:
    assert {fault.moment for fault in draw("ar", COUNTS, 9, 0, ["data_worker", "sampling", "commit"])} == {"commit"}
    with pytest.raises(AssertionError, match="no rank of ar passes data_worker"):
        draw("ar", COUNTS, 1, 0, ["data_worker"])


def test_all_kinds_are_drawn() -> None:
    assert set(ORDER) == MOMENTS.keys()


def test_the_table_tells_good_from_bad(tmp_path: Path) -> None:
    mark = {"what": "allreduce of group gradient"}
    good = Row("dit", Fault(1, "collective", 7), "supervisor", Disturbed([mark], 1, 2, [], 1))
    missed = Row("dit", Fault(0, "open", 9), "command", Disturbed([], 1, 1, [], 0))
    differs = Row("vae", Fault(0, "commit", 2), "command", Disturbed([mark], 2, 2, ["loss of step 3"], 0))
    assert [row.is_good for row in (good, missed, differs)] == [True, False, False]
    text = table([good, missed, differs], seed=3, seconds=90, started=False)
    assert text.startswith("1 of 3 runs end bitwise as the undisturbed one (seed 3, forked ranks, 1.5 minutes on ")
    assert "| dit | collective | 1 | 7 (`allreduce of group gradient`) | yes | supervisor | 2 | 1 | yes |" in text
    assert "| dit | open | 0 | 9 | **no** | command | 1 | 0 | yes |" in text
    assert "**no**: loss of step 3 |" in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    put(page, text)
    assert page.read_text() == f"before\n{BEGIN}\n{text}\n{END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines"):
        put(page, text)


def test_the_page_has_a_place_for_the_table() -> None:
    page = DOCS.read_text(encoding="utf-8")
    assert page.index(BEGIN) < page.index(END)
