"""Tables of measures with rows: what is on the page, in which form, and that text in them cannot become markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from videofm.config import DemoDataConfig
from videofm.report.measured_rows import row_tables, rows_of
from videofm.report.page import build
from videofm.run_dir import RunDirectory, write_json

FEW_STEPS: dict[str, Any] = {
    "kind": "few_steps",
    "of": "unguided, <guided>",
    "num_videos": 48,
    "rows": [
        {"variant": "unguided", "num_steps": 5, "colour": 0.875, "all": 0.5, "hue_drift": 12.3456, "dit_seconds": 0.0123},
        {"variant": "<guided>", "num_steps": 30, "colour": 1.0, "all": 1, "hue_drift": None, "dit_seconds": 12345.0},
    ],
}
LONG: dict[str, Any] = {
    "kind": "long_video",
    "of": "runs/long",
    "seam_ratio": 1.25,
    "rows": [
        {"window": 0, "prompt": 'a "red" & <b>bold</b> circle', "direction": 0.96},
        {"window": 1, "prompt": "b", "shape": 1.0},
    ],
}


def cells(html: str) -> list[list[str]]:
    """The text of each row of the first table, its head first."""
    table = html.split("<table>")[1].split("</table>")[0]
    rows = [row.replace("<th", "<td").replace("</th>", "</td>") for row in table.split("<tr>")[1:]]
    return [[cell.split(">", 1)[1].split("</td>")[0] for cell in row.split("<td")[1:]] for row in rows]


def test_shares_are_percent_and_other_numbers_short() -> None:
    assert cells(row_tables([FEW_STEPS])) == [
        ["variant", "num steps", "colour", "all", "hue drift", "dit seconds"],
        ["unguided", "5", "88 %", "50 %", "12.35", "0.0123"],
        ["&lt;guided&gt;", "30", "100 %", "100 %", "-", "12.35k"],
    ]
    assert "<h3>few_steps: unguided, &lt;guided&gt;</h3>" in row_tables([FEW_STEPS])


def test_numbers_stand_on_the_right_and_text_on_the_left() -> None:
    assert '<td>unguided</td><td class="n">5</td>' in row_tables([FEW_STEPS])


def test_rows_with_other_columns_are_filled() -> None:
    """Columns are those of all rows, in the order in which they come first."""
    assert cells(row_tables([LONG]))[0] == ["window", "prompt", "direction", "shape"]
    assert cells(row_tables([LONG]))[2] == ["1", "b", "-", "100 %"]


@pytest.mark.parametrize("rows", [None, [], "text", 3, {"a": 1}, [1, "two"]])
def test_what_has_no_rows_has_no_table(rows: Any) -> None:
    metric = {"kind": "reconstruction", "rows": rows}
    assert rows_of(metric) == [] and row_tables([metric, {"kind": "other"}]) == ""


def test_what_is_no_row_is_left_out() -> None:
    assert rows_of({"rows": ["text", {"a": 1}, None]}) == [{"a": 1}]


def test_a_table_a_measure_in_their_order() -> None:
    found = row_tables([LONG, FEW_STEPS])
    assert found.count("<table>") == 2
    assert found.index("long_video: runs/long") < found.index("few_steps: ")


def test_the_page_shows_them_escaped_with_the_other_numbers(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", DemoDataConfig(kind="demo_data"))
    run.start_attempt()
    write_json(tmp_path / "run" / "evaluation.json", {"metrics": [FEW_STEPS, LONG]})
    run.set_outcome("finished", seconds=1.0)
    page = build(tmp_path / "run")
    assert "<td>a &quot;red&quot; &amp; &lt;b&gt;bold&lt;/b&gt; circle</td>" in page
    assert "<b>bold" not in page and "<guided>" not in page
    assert "seam_ratio <b>1.25</b>" in page


def test_what_a_row_is_about_comes_first() -> None:
    """Files sort their keys, so a table would begin with `all`."""
    page = row_tables([{"kind": "few_steps", "rows": [{"all": 0.5, "num_steps": 5, "shape": 1.0, "variant": "guided"}]}])
    heads = [page.index(f">{name}</th>") for name in ("variant", "num steps", "all", "shape")]
    assert heads == sorted(heads)
