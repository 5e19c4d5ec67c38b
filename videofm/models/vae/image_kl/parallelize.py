"""How the image VAE is laid out over devices: whole on each, with the attention of diffusers."""

from __future__ import annotations

from typing import Any

from videofm.errors import ConfigError, ParallelError
from videofm.models.spec import ParallelOptions, split_degrees
from videofm.models.vae.image_kl.model import ImageKL


def parallelize(model: ImageKL, mesh: Any = None, options: ParallelOptions | None = None) -> ImageKL:
    """`model`, unchanged; data parallelism is the engine's.

    Raises:
        ConfigError: an attention backend other than torch's, which is what diffusers calls.
        ParallelError: `mesh` splits a sample or a model.
    """
    if degrees := split_degrees(mesh):
        raise ParallelError(f"vae/image_kl runs whole on each device, but the mesh has {degrees}: set those degrees to 1.")
    if options is not None and options.attention not in ("auto", "sdpa"):
        raise ConfigError(f"vae/image_kl runs the attention of diffusers, which is sdpa, not {options.attention!r}: set auto.")
    return model
