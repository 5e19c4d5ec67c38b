"""How the image VAE is laid out over devices: whole on each, with the attention of diffusers."""

from __future__ import annotations

from typing import Any

from videofm.errors import ConfigError
from videofm.models.bind import refuse_split
from videofm.models.spec import ParallelOptions
from videofm.models.vae.image_kl.model import ImageKL


def parallelize(model: ImageKL, mesh: Any = None, options: ParallelOptions | None = None) -> ImageKL:
    """`model`, unchanged; data parallelism is the engine's.

    Raises:
        ConfigError: an attention backend other than torch's, which is what diffusers calls.
        ParallelError: `mesh` splits a sample or a model.
    """
    refuse_split(model.spec_name, mesh)
    if options is not None and options.attention not in ("auto", "sdpa"):
        raise ConfigError(f"vae/image_kl runs the attention of diffusers, which is sdpa, not {options.attention!r}: set auto.")
    return model
