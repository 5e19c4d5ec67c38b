"""How the Step-Video transformer is laid out over devices: binds the attention of every block to what was configured."""

from __future__ import annotations

from typing import Any

from videofm.attention import AttentionSpec, choose
from videofm.attention.strategies import none
from videofm.errors import ParallelError
from videofm.models.dit.step_video.model import StepVideoDiT
from videofm.models.spec import ParallelOptions, split_degrees


def parallelize(model: StepVideoDiT, mesh: Any = None, options: ParallelOptions | None = None) -> StepVideoDiT:
    """`model` with `attend` of every block bound.

    Args:
        model: untouched, on its device.
        mesh: None for one process; its degrees that split a sample or the model must be 1.
        options: backends and the dtype that they see; the defaults choose the best that works here.

    Raises:
        ConfigError: a backend cannot serve this model; the message has the reason.
        ParallelError: `mesh` splits a sample or the model.
    """
    options = options or ParallelOptions()
    if degrees := split_degrees(mesh):
        raise ParallelError(f"dit/step_video runs whole on each device, but the mesh has {degrees}: set those degrees to 1.")
    weight = model.proj_in.weight
    heads, dtype = (model.config.num_heads, model.config.head_width), options.dtype or weight.dtype
    attend = choose(options.attention, AttentionSpec(*heads, dtype, weight.device.type))
    attend_text = choose(options.cross_attention, AttentionSpec(*heads, dtype, weight.device.type, has_mask=True))
    for block in model.blocks:
        block.self_attention.attend = none.wrap(attend)
        block.cross_attention.attend = none.wrap(attend_text)
    return model
