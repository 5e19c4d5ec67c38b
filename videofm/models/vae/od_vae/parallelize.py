"""How the OD-VAE is laid out over devices: whole on each, with its attention bound to what was configured."""

from __future__ import annotations

from typing import Any

from videofm.attention import AttentionSpec, choose
from videofm.attention.strategies import none
from videofm.errors import ParallelError
from videofm.models.spec import ParallelOptions, split_degrees
from videofm.models.vae.od_vae.model import ODVideoVAE


def parallelize(model: ODVideoVAE, mesh: Any = None, options: ParallelOptions | None = None) -> ODVideoVAE:
    """`model` with `attend` of both middles bound; data parallelism is the engine's.

    Raises:
        ConfigError: a backend cannot serve this model; the message has the reason.
        ParallelError: `mesh` splits a sample or a model.
    """
    options = options or ParallelOptions()
    if degrees := split_degrees(mesh):
        raise ParallelError(f"vae/od_vae runs whole on each device, but the mesh has {degrees}: set those degrees to 1.")
    weight = model.last_layer
    spec = AttentionSpec(1, model.config.widths[-1], options.dtype or weight.dtype, weight.device.type)
    for part in (model.encoder, model.decoder):
        part.middle.attention.attend = none.wrap(choose(options.attention, spec))
    return model
