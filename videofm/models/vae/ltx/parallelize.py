"""How the LTX VAE is laid out over devices: whole on each. It has no attention to bind."""

from __future__ import annotations

from typing import Any

from videofm.errors import ParallelError
from videofm.models.spec import ParallelOptions, split_degrees
from videofm.models.vae.ltx.model import LTXVideoVAE


def parallelize(model: LTXVideoVAE, mesh: Any = None, options: ParallelOptions | None = None) -> LTXVideoVAE:
    """`model`, unchanged; data parallelism is the engine's.

    Raises:
        ParallelError: `mesh` splits a sample or a model.
    """
    if degrees := split_degrees(mesh):
        raise ParallelError(f"vae/ltx runs whole on each device, but the mesh has {degrees}: set those degrees to 1.")
    return model
