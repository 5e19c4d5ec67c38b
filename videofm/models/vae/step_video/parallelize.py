"""How Step-Video's VAE is laid out over devices: whole on each; binds its two attention layers."""

from __future__ import annotations

from typing import Any

from videofm.models.bind import bind_single_head
from videofm.models.spec import ParallelOptions
from videofm.models.vae.step_video.model import StepVideoVAE


def parallelize(model: StepVideoVAE, mesh: Any = None, options: ParallelOptions | None = None) -> StepVideoVAE:
    """`model` with the attention of both middles bound, by a backend that takes a mask; the rest is `bind_single_head`'s."""
    attentions = [coder.middle.attention for coder in (model.encoder, model.decoder)]
    bind_single_head(model, attentions, mesh, options, has_mask=True)
    return model
