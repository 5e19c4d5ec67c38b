"""How the OD-VAE is laid out over devices: the frames of a clip over the context ranks, its attention as configured."""

from __future__ import annotations

from typing import Any

from videofm.models.bind import bind_single_head
from videofm.models.spec import ParallelOptions
from videofm.models.vae.od_vae.model import ODVideoVAE
from videofm.models.vae.parallelize import split_frames


def parallelize(model: ODVideoVAE, mesh: Any = None, options: ParallelOptions | None = None) -> ODVideoVAE:
    """`model`, whose clips are spread over the context ranks of `mesh`, with the attention of both middles bound.

    Raises:
        ConfigError: the attention backend cannot serve this model; the message has the reason.
    """
    split_frames(model, mesh)
    attentions = [coder.middle.attention for coder in (model.encoder, model.decoder)]
    bind_single_head(model, attentions, options)
    return model
