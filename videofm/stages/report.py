"""Stage `report`: write the HTML page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipelines.thumbnails import Thumbnails
from videofm.config import ReportConfig
from videofm.progress import LOG
from videofm.report.page import build
from videofm.run_dir import RunDirectory, write_atomic


def run(config: ReportConfig, run: RunDirectory) -> dict[str, Any]:
    """Write the page.

    Returns:
        `output` (the file) and its size in bytes.

    Raises:
        DataError: `config.run` is no run directory.
    """
    page = build(Path(config.run), writing=run.path, open_pictures=Thumbnails)
    output = Path(config.output) if config.output is not None else Path(config.run) / "report.html"
    write_atomic(output, page)
    LOG.info("report: %s (%.1f MiB)", output, len(page) / 2**20)
    return {"output": str(output), "bytes": len(page.encode())}
