"""How the LTX VAE is laid out over devices: the frames of a clip over the context ranks. It has no attention to bind."""

from __future__ import annotations

from typing import Any

from videofm.models.spec import ParallelOptions
from videofm.models.vae.ltx.model import LTXVideoVAE
from videofm.models.vae.parallelize import split_frames


def parallelize(model: LTXVideoVAE, mesh: Any = None, options: ParallelOptions | None = None) -> LTXVideoVAE:
    """`model`, whose clips are spread over the context ranks of `mesh`."""
    split_frames(model, mesh)
    return model
