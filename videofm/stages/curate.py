"""Stage `curate`: raw video to shards, and the page about what was kept and what was not."""

from __future__ import annotations

from typing import Any

from data_pipelines import curate
from data_pipelines.thumbnails import Thumbnails
from videofm.config.curate import CurateConfig
from videofm.errors import DataError
from videofm.progress import LOG
from videofm.report.page import build
from videofm.run_dir import RunDirectory, write_atomic


def run(config: CurateConfig, run: RunDirectory) -> dict[str, Any]:
    """Curate, then write `report.html`; also where no clip was left, since then the page is wanted most.

    Returns:
        What `data_pipelines.curate.run` returns.

    Raises:
        VideofmError: see there.
    """
    try:
        result = curate.run(config, run)
    except DataError:
        if (run.path / "funnel.json").exists():
            _write_page(run, finished=False)
        raise
    _write_page(run, finished=True)
    return result


def _write_page(run: RunDirectory, finished: bool) -> None:
    page = build(run.path, writing=run.path if finished else None, open_pictures=Thumbnails)
    write_atomic(run.path / "report.html", page)
    LOG.info("report: %s (%.1f MiB)", run.path / "report.html", len(page) / 2**20)
