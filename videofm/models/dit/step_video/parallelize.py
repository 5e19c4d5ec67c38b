"""How the Step-Video transformer is laid out over devices: binds the attention of every block to what was configured."""

from __future__ import annotations

from typing import Any

from videofm.models.bind import bind_blocks
from videofm.models.dit.step_video.model import StepVideoDiT
from videofm.models.spec import ParallelOptions


def parallelize(model: StepVideoDiT, mesh: Any = None, options: ParallelOptions | None = None) -> StepVideoDiT:
    """`model` with `attend` of every block bound; arguments and errors are those of `bind_blocks`."""
    bind_blocks(model, mesh, options)
    return model
