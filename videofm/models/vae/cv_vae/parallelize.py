"""How a CV-VAE is laid out over devices: the frames of a clip over the context ranks, its attention as configured."""

from __future__ import annotations

from typing import Any

from videofm.models.bind import bind_single_head
from videofm.models.spec import ParallelOptions
from videofm.models.vae.blocks import FrameAttention
from videofm.models.vae.cv_vae.model import CVVAE, TemporalAttention
from videofm.models.vae.parallelize import split_frames


def parallelize(model: CVVAE, mesh: Any = None, options: ParallelOptions | None = None) -> CVVAE:
    """`model`, whose clips are spread over the context ranks of `mesh`, with `attend` of every attention bound.

    Raises:
        ConfigError: the attention backend cannot serve this model; the message has the reason.
    """
    split_frames(model, mesh)
    attentions = [module for module in model.modules() if isinstance(module, FrameAttention | TemporalAttention)]
    bind_single_head(model, attentions, options)
    return model
