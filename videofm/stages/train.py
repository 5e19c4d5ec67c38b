"""The stage `train`: start the ranks, here or where the environment says, and see them through to the end."""

from __future__ import annotations

import os
from typing import Any

from launch.supervise import supervise
from videofm.config.train import TrainConfig
from videofm.registry import LAUNCHERS, lookup
from videofm.run_dir import RunDirectory


def run(config: TrainConfig, run: RunDirectory) -> dict[str, Any]:
    """Train to the end, going on from the newest checkpoint of `run` where there is one.

    `VIDEOFM_RANKS` names who starts the ranks, one of `registry.LAUNCHERS`; without it they are processes of this machine. A
    launch into a cluster sets it where the stage runs.

    Returns:
        The last row of the metrics, and where the time went (see `train.goodput`).

    Raises:
        Interrupted: a stop was asked for, and everything is saved.
        ConfigError: there is no such launcher.
        VideofmError: a rank failed, and `faults.max_restarts` allows no other attempt or it would not help.
    """
    start = lookup(LAUNCHERS, os.environ.get("VIDEOFM_RANKS", "local"), "launcher (VIDEOFM_RANKS)")
    goodput = supervise(run, config, start)
    rows = run.metrics()
    found = {"last": rows[-1]} if rows else {}
    return found | ({"goodput": goodput.as_json()} if goodput is not None else {})
