"""How the OD-VAE is laid out over devices: whole on each, with its attention bound to what was configured."""

from __future__ import annotations

from typing import Any

from videofm.models.bind import bind_single_head
from videofm.models.spec import ParallelOptions
from videofm.models.vae.od_vae.model import ODVideoVAE


def parallelize(model: ODVideoVAE, mesh: Any = None, options: ParallelOptions | None = None) -> ODVideoVAE:
    """`model` with the attention of both middles bound. Arguments and errors are those of `bind_single_head`."""
    attentions = [coder.middle.attention for coder in (model.encoder, model.decoder)]
    bind_single_head(model, attentions, mesh, options)
    return model
