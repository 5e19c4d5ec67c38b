"""How the LTX VAE is laid out over devices: whole on each. It has no attention to bind."""

from __future__ import annotations

from typing import Any

from videofm.models.bind import refuse_split
from videofm.models.spec import ParallelOptions
from videofm.models.vae.ltx.model import LTXVideoVAE


def parallelize(model: LTXVideoVAE, mesh: Any = None, options: ParallelOptions | None = None) -> LTXVideoVAE:
    """`model`, unchanged; data parallelism is the engine's.

    Raises:
        ParallelError: `mesh` splits a sample or a model.
    """
    refuse_split(model.spec_name, mesh)
    return model
