"""How the image VAE is laid out over devices: whole on each, with the attention of diffusers."""

from __future__ import annotations

from typing import Any

from videofm.errors import ConfigError
from videofm.models.bind import count_once
from videofm.models.spec import ParallelOptions
from videofm.models.vae.image_kl.model import ImageKL


def parallelize(model: ImageKL, mesh: Any = None, options: ParallelOptions | None = None) -> ImageKL:
    """`model`, which sees whole images on each rank, with gradients that context ranks share.

    Raises:
        ConfigError: an attention backend other than torch's, which is what diffusers calls.
    """
    count_once(model, mesh)
    if options is not None and options.attention not in ("auto", "sdpa"):
        raise ConfigError(f"vae/image_kl runs the attention of diffusers, which is sdpa, not {options.attention!r}: set auto.")
    return model
