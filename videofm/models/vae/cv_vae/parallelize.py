"""How a CV-VAE is laid out over devices: whole on each, with its attention bound to what was configured."""

from __future__ import annotations

from typing import Any

from videofm.attention import AttentionSpec, choose
from videofm.attention.strategies import none
from videofm.errors import ParallelError
from videofm.models.spec import ParallelOptions, split_degrees
from videofm.models.vae.blocks import FrameAttention
from videofm.models.vae.cv_vae.model import CVVAE, TemporalAttention


def parallelize(model: CVVAE, mesh: Any = None, options: ParallelOptions | None = None) -> CVVAE:
    """`model` with `attend` of every attention bound; data parallelism is the engine's.

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
        raise ParallelError(f"{model.spec_name} runs whole on each device, but the mesh has {degrees}: set those degrees to 1.")
    weight = model.last_layer
    spec = AttentionSpec(1, model.config.widths[-1], options.dtype or weight.dtype, weight.device.type)
    attend = none.wrap(choose(options.attention, spec))
    for module in model.modules():
        if isinstance(module, FrameAttention | TemporalAttention):
            module.attend = attend
    return model
