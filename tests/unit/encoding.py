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


def save_tokenizer(folder: Path, seed: int = 0, **changes: Any) -> str:
    """A tiny latent tokenizer for the latents of `save_encoders`' VAE, with 64 codes near what its encoder gives."""
    torch.manual_seed(seed)
    codes = {"kind": "vq", "codebook_size": 64, "dim": 8}
    model: Any = models.build("arlon/tokenizer", size="tiny", **{"latent_channels": 16, "quantizer": codes} | changes)
    return str(models.save(model.eval(), folder / "tokenizer"))


def save_ar_run(folder: Path, tokenizer: str, text_encoder: str, seed: int = 0) -> str:
    """What a run of objective next_token leaves of a tiny AR model that has learned nothing: checkpoint and frozen roles."""
    torch.manual_seed(seed)
    held: Any = models.load(tokenizer)
    width: int = models.load(text_encoder).config.width  # type: ignore[union-attr, assignment]
    checkpoint = folder / "ar_run" / "checkpoints" / "step_00000001"
    ar = models.build("ar/transformer", size="tiny", vocab_size=held.vocab_size, caption_channels=width)
    models.save(ar, checkpoint / "models" / "ar")
    (checkpoint / "COMMITTED.json").write_text("{}")
    models.save(held, folder / "ar_run" / "frozen" / "tokenizer")
    models.save(models.load(text_encoder), folder / "ar_run" / "frozen" / "text_encoder")
    return str(folder / "ar_run")


def tokens_section(encoders: dict[str, str], path: str, **changes: Any) -> dict[str, Any]:
    """The section `tokens` of `encode_config`, in fp32."""
    frozen = {"tokenizer": {"path": path}, "vae": {"path": encoders["vae"]}}
    return {**frozen, "precision": "fp32", "batch_size": 2, **changes}


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
