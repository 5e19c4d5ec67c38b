"""The section of the objective that trains a latent tokenizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from videofm.config.base import Section


class LatentTokensConfig(Section):
    """Train a latent tokenizer (role `tokenizer`) to give back the normalised latents of a frozen `vae` from discrete tokens.

    The loss of a clip is the mean squared error of its latents plus what the tokenizer's quantizer adds, whose weights are in
    `models.tokenizer.overrides.quantizer`. A moving average of the weights (`optimizer.ema_decay`) is stored beside the
    codebook of the last step, which kinds vq_ema and rvq move without gradients: `optimizer.ema_decay` is 0 or short, at most
    0.99; its default is refused (kind fsq has no codebook, and takes any).
    """

    kind: Literal["latent_tokens"]
    latent_statistics_hash: str | None = Field(
        None, description="SHA-256 of the latent statistics that the VAE must have; null takes those that it has."
    )
