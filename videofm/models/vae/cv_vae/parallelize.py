"""How a CV-VAE is laid out over devices: whole on each, with its attention bound to what was configured."""

from __future__ import annotations

from typing import Any

from videofm.models.bind import bind_single_head
from videofm.models.spec import ParallelOptions
from videofm.models.vae.blocks import FrameAttention
from videofm.models.vae.cv_vae.model import CVVAE, TemporalAttention


def parallelize(model: CVVAE, mesh: Any = None, options: ParallelOptions | None = None) -> CVVAE:
    """`model` with `attend` of every attention bound; arguments and errors are those of `bind_single_head`."""
    attentions = [module for module in model.modules() if isinstance(module, FrameAttention | TemporalAttention)]
    bind_single_head(model, attentions, mesh, options)
    return model
