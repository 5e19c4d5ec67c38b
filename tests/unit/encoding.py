"""Tiny encoders and configs that the tests of caches share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from videofm import models
from videofm.config.encode import EncodeConfig

SIZE: dict[str, Any] = {"num_frames": 9, "height": 32, "width": 32}


def save_encoders(folder: Path, seed: int = 0) -> dict[str, str]:
    """A tiny VAE and a tiny text encoder in folders of their own; role -> folder."""
    found = {}
    for role, name in (("vae", "vae/ltx"), ("text_encoder", "text/t5")):
        torch.manual_seed(seed)
        model = models.build(name, size="tiny")
        if role == "vae":
            with torch.no_grad():  # statistics that are not zeros and ones, so that normalising shows
                model.set_latent_statistics(*(torch.rand(2, model.latent_channels) + 0.5))  # type: ignore[operator]
        found[role] = str(models.save(model, folder / role))
    return found


def encode_config(manifest: Path | str, encoders: dict[str, str], **changes: Any) -> EncodeConfig:
    """Latents and text of both encoders in fp32, of clips of 9 x 32 x 32, unless `changes` say otherwise."""
    exact = {"dtype": "fp32", "precision": "fp32"}
    values: dict[str, Any] = {
        "kind": "encode",
        "manifest": str(manifest),
        **SIZE,
        "latents": {"vae": {"path": encoders["vae"]}, "batch_size": 2, **exact},
        "text": {"encoder": {"path": encoders["text_encoder"]}, "batch_size": 3, **exact},
    }
    return EncodeConfig.model_validate(values | changes)
