"""Runs as a training leaves them, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from videofm import models


def write_run(path: Path, trained: dict[str, nn.Module], frozen: dict[str, nn.Module], config: dict[str, Any]) -> Path:
    """A training run with one checkpoint, as the trainer leaves it."""
    checkpoint = path / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    for role, model in trained.items():
        models.save(model, checkpoint / "models" / role)
    for role, model in frozen.items():
        models.save(model, path / "frozen" / role)
    (checkpoint / "COMMITTED.json").write_text("{}")
    (path / "lineage.json").write_text(json.dumps({"fingerprint": "x"}))
    (path / "config.yaml").write_text(json.dumps({"kind": "train", **config}))
    return path
