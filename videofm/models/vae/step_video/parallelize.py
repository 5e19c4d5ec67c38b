"""How Step-Video's VAE is laid out over devices: whole on each; binds its two attention layers."""

from __future__ import annotations

from typing import Any

from videofm.attention import AttentionSpec, choose
from videofm.attention.strategies import none
from videofm.errors import ParallelError
from videofm.models.spec import ParallelOptions, split_degrees
from videofm.models.vae.step_video.model import StepVideoVAE


def parallelize(model: StepVideoVAE, mesh: Any = None, options: ParallelOptions | None = None) -> StepVideoVAE:
    """`model` with the attention of encoder and decoder bound; data parallelism is the engine's.

    Args:
        model: untouched, on its device.
        mesh: None for one process; its degrees that split a sample or the model must be 1.
        options: `attention` names the backend, which must take a mask; the default chooses the best that works here.

    Raises:
        ConfigError: the backend cannot serve this model; the message has the reason.
        ParallelError: `mesh` splits a sample or the model.
    """
    options = options or ParallelOptions()
    if degrees := split_degrees(mesh):
        raise ParallelError(f"vae/step_video runs whole on each device, but the mesh has {degrees}: set those degrees to 1.")
    weight = model.last_layer
    spec = AttentionSpec(1, model.config.widths[-1], options.dtype or weight.dtype, weight.device.type, has_mask=True)
    for coder in (model.encoder, model.decoder):
        coder.middle.attention.attend = none.wrap(choose(options.attention, spec))
    return model
