"""The stage `train`: launch the ranks on this machine and wait for them."""

from __future__ import annotations

from typing import Any

from launch import local
from videofm.config.train import TrainConfig
from videofm.parallel.layout import layout_of
from videofm.run_dir import RunDirectory


def run(config: TrainConfig, run: RunDirectory) -> dict[str, Any]:
    """Train to the end, going on from the newest checkpoint of `run` where there is one.

    Returns:
        The last row of the metrics.

    Raises:
        Interrupted: a stop was asked for, and everything is saved.
        VideofmError: a rank failed.
    """
    local.submit(run, layout_of(config.parallel).world_size).wait()
    rows = run.metrics()
    return {"last": rows[-1]} if rows else {}
