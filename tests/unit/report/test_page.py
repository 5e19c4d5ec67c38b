"""The report: all text is escaped, nothing is loaded from elsewhere, and damaged runs still have a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from videofm.config import DemoDataConfig, ReportConfig
from videofm.errors import DataError
from videofm.report.charts import Series, binned, figure, log_ticks, number, smoothed, ticks
from videofm.report.page import build
from videofm.run_dir import RunDirectory, write_json
from videofm.stages import report as report_stage

EVIL = "<script>alert('x')</script>\"&"


def a_run(path: Path, **results: Any) -> RunDirectory:
    """A finished run directory with one of everything, whose texts all try to break out."""
    run = RunDirectory.create(path, DemoDataConfig(kind="demo_data"))
    run.start_attempt()
    rows = [{"step": step, "loss": 1.0 / step, "samples_per_second": 10.0, EVIL: float(step)} for step in range(1, 50)]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    step = {"stage": EVIL, "num_in": 5, "num_out": 3, "num_made": 3, "dropped": {EVIL: 2}}
    write_json(path / "funnel.json", {"num_sources": 5, "funnel": [step]})
    (path / "quarantine.jsonl").write_text(json.dumps({"source": EVIL, "stage": "probe", "reason": EVIL}) + "\n")
    write_json(path / "evaluation.json", {"metrics": [{"kind": EVIL, "of": EVIL, "psnr": 30.0, EVIL: EVIL}]})
    (path / "samples").mkdir()
    (path / "samples" / "000.mp4").write_bytes(b"not really a video")
    (path / "samples.jsonl").write_text(json.dumps({"file": "samples/000.mp4", "caption": EVIL}) + "\n")
    (path / "samples" / "sheet.png").write_bytes(b"\x89PNG")
    run.set_outcome("finished", seconds=61.0, note=EVIL, **results)
    return run


def test_every_text_is_escaped(tmp_path: Path) -> None:
    page = build(a_run(tmp_path / "run").path)
    assert "<script" not in page
    assert "alert(&#x27;x&#x27;)" in page
    assert page.count("&lt;script&gt;") >= 6  # metric name, funnel step and reason, evaluation, result, caption


@pytest.mark.parametrize(
    ("windows", "caption"),
    [
        ([{"prompt": "a"}, {"prompt": "a"}, {"prompt": "<b>"}, {"prompt": "a"}], "a -&gt; &lt;b&gt;"),
        ([{"prompt": "a"}, {"prompt": "a"}], "a"),
        ("damaged", "first"),
        ([{"start": 0}, 3], "first"),
    ],
)
def test_a_storyboard_is_captioned_with_all_its_prompts(tmp_path: Path, windows: Any, caption: str) -> None:
    run = a_run(tmp_path / "run")
    row = {"file": "samples/000.mp4", "caption": "first", "windows": windows}
    (run.path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    assert f"<figcaption>{caption}</figcaption>" in build(run.path)


def test_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    page = build(a_run(tmp_path / "run").path)
    assert "http://" not in page
    assert "https://" not in page
    assert "default-src 'none'" in page
    assert "data:image/png;base64," in page
    assert "data:video/mp4;base64," in page


def test_held_out_losses_are_a_table_and_constants_no_curves(tmp_path: Path) -> None:
    """A row a measured step, a column a noise level; what a later row lacks is empty, and a text in it is escaped."""
    run = a_run(tmp_path / "run")
    rows = [{"step": 1, "loss": 1.5, "skipped_by": 7.0}, {"step": 2, "loss": 1.0, "skipped_by": 7.0, "peak_memory": 2.0}]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = [
        {"step": 100, "loss": 0.75, "loss_at_sigma": {"0.1": 0.5, "0.9": 1.0}},
        {"step": 200, "loss_at_sigma": {EVIL: 1}},
    ]
    (run.path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    page = build(run.path)
    assert '<th class="n">sigma 0.1</th><th class="n">sigma 0.9</th>' in page
    assert '<td class="n">100</td><td class="n">0.75</td><td class="n">0.5</td><td class="n">1</td>' in page
    assert "skipped_by" not in page and "peak_memory" in page and "<script" not in page


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", DemoDataConfig(kind="demo_data"))
    run.start_attempt()
    run.set_outcome("failed", "the disk is full")
    assert "the disk is full" in build(run.path)


def test_damaged_files_become_notes(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (run.path / "funnel.json").write_text("{")
    run.metrics_path.write_text("{]\n")
    page = build(run.path)
    assert "funnel.json is not valid JSON" in page


def test_a_recipe_has_its_stages_in_order(tmp_path: Path) -> None:
    a_run(tmp_path / "stages" / "b")
    stages = {"b": {"kind": "demo_data"}, "a": {"kind": "report"}}
    write_json(
        tmp_path / "recipe.json",
        {"name": "chain", "config": {"name": "chain"}, "stages": stages, "order": ["b", "a"], "code": "1", "time": "now"},
    )
    page = build(tmp_path)
    assert page.index(">b<") < page.index(">a<")
    assert "not started" in page


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no run directory"):
        build(tmp_path)


def test_stage_writes_the_page_into_the_run(tmp_path: Path) -> None:
    a_run(tmp_path / "run")
    config = ReportConfig(kind="report", run=str(tmp_path / "run"))
    results = report_stage.run(config, RunDirectory.create(tmp_path / "report", config))
    assert results["output"] == str(tmp_path / "run" / "report.html")
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!doctype html>")


def test_a_sample_outside_of_the_run_is_not_embedded(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run")
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    (run.path / "samples.jsonl").write_text(json.dumps({"file": "../secret.mp4", "caption": ""}) + "\n")
    assert "data:video" not in build(run.path)


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1500, 5) == [0, 500, 1000, 1500]
    assert ticks(0.63, 1.31, 5) == [0.8, 1.0, 1.2]
    assert ticks(3, 3, 5) == [3]
    assert log_ticks(0.3, 100) == [1, 10, 100]


def test_numbers_are_short() -> None:
    assert [number(x) for x in (0, 0.12341, 3e-5, 12345, 2.5e7, 42)] == ["0", "0.1234", "3e-5", "12.35k", "2.5e7", "42"]


def test_binning_keeps_the_mean_and_the_last_step() -> None:
    points = [(float(x), float(x)) for x in range(1, 1001)]
    found = binned(points, 100)
    assert len(found) == 100
    assert found[-1][0] == 1000
    assert sum(y for _, y in found) / 100 == pytest.approx(500.5)


def test_smoothing_keeps_a_line_straight() -> None:
    """A fitted line follows a straight line exactly, at its ends too."""
    points = [(float(x), 2.0 * x) for x in range(200)]
    assert [y for _, y in smoothed(points)] == pytest.approx([y for _, y in points])


def test_a_curve_with_gaps_and_one_without_values() -> None:
    assert figure(Series("loss", [1, 2, 3], [1.0, float("nan"), 2.0])).count("<circle") >= 2
    assert figure(Series("loss", [1], [float("inf")])) == ""
    assert "<svg" in figure(Series("loss", [1], [0.5]))
