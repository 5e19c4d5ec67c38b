"""A trained video VAE by itself, as the software that knows it expects it.

```
config.json  diffusion_pytorch_model.safetensors  latent_statistics.json (where they were measured)
vae.safetensors (the authors' single file, config in its metadata; for the models that have one)
```
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from videofm import models
from videofm.errors import ConfigError
from videofm.export.diffusers_folder import Dtype, write_model, write_tensors
from videofm.export.replace import replacing
from videofm.models.vae.base import VideoVAE
from videofm.models.vae.statistics import STATISTICS_FILE, write_statistics

ORIGINAL_FILE = "vae.safetensors"


def write_vae_folder(
    output: str | Path, vae: VideoVAE, num_statistics_clips: int = 0, dtype: Dtype = "fp32", original: bool = False
) -> Path:
    """Write `vae` to `output`, replacing an older export there as a whole.

    Args:
        output: the folder.
        vae: of any kind.
        num_statistics_clips: clips that its latent statistics were measured on; 0 writes no statistics.
        dtype: of the stored weights.
        original: write the authors' single file beside the folder's own.

    Raises:
        ConfigError: `original` for a model whose authors have no single file; `output` is something else than an older export.
    """
    adapter: Any = models.adapter(vae.spec_name)
    if original and not hasattr(adapter, "to_original"):
        able = [name for name in models.names() if getattr(models.adapter(name), "original_component", None) == "vae"]
        raise ConfigError(f"{vae.spec_name} has no original single file; these have one: {', '.join(able)}.")
    with replacing(output, "config.json") as folder:
        write_model(folder, vae, dtype)
        if num_statistics_clips:
            write_statistics(vae, folder / STATISTICS_FILE, num_statistics_clips)
        if original:
            tensors: dict[str, torch.Tensor] = adapter.to_original(models.weights(vae), vae.config)
            config = json.dumps({"vae": adapter.original_config(vae.config)})
            write_tensors(folder / ORIGINAL_FILE, tensors, dtype, {"config": config})
    return Path(output)
