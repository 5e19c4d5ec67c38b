"""Stage `curate`: the page is written at the end, and also where nothing was left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipelines import curate as pipeline
from videofm.config import ReportConfig
from videofm.config.curate import CurateConfig
from videofm.errors import DataError
from videofm.run_dir import RunDirectory, write_json
from videofm.stages import curate, report

STEP = {"stage": "filter", "num_in": 9, "num_out": 0, "num_made": 0, "dropped": {"static": 9}}


@pytest.fixture
def config(tmp_path: Path) -> CurateConfig:
    stages = [{"kind": "probe"}, {"kind": "transcode", "height": 32, "width": 32, "fps": 8}]
    return CurateConfig.model_validate({"kind": "curate", "source": str(tmp_path / "raw"), "stages": stages})


def test_the_page_is_written_at_the_end(tmp_path: Path, config: CurateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the page that `videofm report` writes, apart from the state of the run and the time of writing."""

    def run(config: CurateConfig, run: RunDirectory) -> dict[str, Any]:
        write_json(run.path / "funnel.json", {"funnel": [STEP]})
        return {"num_sources": 9}

    monkeypatch.setattr(pipeline, "run", run)
    folder = RunDirectory.create(tmp_path / "run", config)
    assert curate.run(config, folder) == {"num_sources": 9}
    page = (folder.path / "report.html").read_text()
    assert "dropped by filter, 9 of 9 (100 %)" in page and '<span class="tag finished">' in page
    again = ReportConfig(kind="report", run=str(folder.path), output=str(tmp_path / "again.html"))
    report.run(again, RunDirectory.create(tmp_path / "report", again))
    section = page[page.index("<h3>funnel") : page.index("<h2>Lineage")]
    assert section in (tmp_path / "again.html").read_text()


def test_a_curation_that_leaves_nothing_has_a_page(
    tmp_path: Path, config: CurateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: CurateConfig, run: RunDirectory) -> dict[str, Any]:
        write_json(run.path / "funnel.json", {"funnel": [STEP]})
        raise DataError("holds no usable clip")

    monkeypatch.setattr(pipeline, "run", run)
    folder = RunDirectory.create(tmp_path / "run", config)
    with pytest.raises(DataError, match="holds no usable clip"):
        curate.run(config, folder)
    page = (folder.path / "report.html").read_text()
    assert "9 static" in page and '<span class="tag finished">' not in page


def test_a_curation_without_a_funnel_has_none(tmp_path: Path, config: CurateConfig) -> None:
    folder = RunDirectory.create(tmp_path / "run", config)
    with pytest.raises(DataError, match="raw does not exist"):
        curate.run(config, folder)
    assert not (folder.path / "report.html").exists()
