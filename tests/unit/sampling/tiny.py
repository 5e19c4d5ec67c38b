"""A pipeline of tiny models whose weights are all random: fresh ones predict velocity 0, and would agree with anything."""

from __future__ import annotations

import torch

from videofm import models
from videofm.sampling import Pipeline


def pipeline(num_layers: int = 2, text_length: int = 24) -> Pipeline:
    """VAE (4x8x8, 16 channels), DiT and text encoder."""
    torch.manual_seed(0)
    vae = models.build("vae/ltx", "tiny")
    vae.set_latent_statistics(torch.randn(16) / 10, torch.rand(16) + 0.5)  # type: ignore[operator]
    dit = models.build("dit/ltx", "tiny", num_layers=num_layers)
    for parameter in dit.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return Pipeline(dit, vae, models.build("text/t5", "tiny", max_length=text_length))
