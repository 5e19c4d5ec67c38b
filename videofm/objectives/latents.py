"""Clean latents of a micro-batch, as every objective that trains in the latent space of a frozen VAE takes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from videofm.errors import ConfigError
from videofm.types import Batch, SampleRng


@torch.no_grad()
def clean_latents(vae: nn.Module, batch: Batch, rng: SampleRng) -> Tensor:
    """Normalised latents `(B, C, T, H, W)` float32 of a micro-batch: those that came with it, or of its pixels.

    Where a posterior is known they are sampled from it, with the draw `posterior` of each sample.
    """
    if batch.latents is None:
        return encoded_latents(vae, batch.video, rng)
    latents, posterior = batch.latents, batch.posterior
    if posterior is not None:
        latents = posterior.sample(rng.normal("posterior", tuple(latents.shape[1:])))
    return vae.normalize(latents.float())  # type: ignore[operator]


@torch.no_grad()
def encoded_latents(vae: nn.Module, video: Tensor, rng: SampleRng | None = None) -> Tensor:
    """Normalised latents `(B, C, T, H, W)` float32 of `video`: sampled with draws of `rng`, or the most likely without."""
    posterior = vae.encode(video)  # type: ignore[operator]
    if rng is None:
        latents = posterior.mode().float()
    else:
        latents = posterior.sample(rng.normal("posterior", tuple(posterior.mean.shape[1:]))).float()
    return vae.normalize(latents)  # type: ignore[operator]


def check_statistics(vae: nn.Module, wanted: str | None) -> None:
    """Refuse a VAE whose latent statistics are not the ones that `objective.latent_statistics_hash` names, where it names any.

    Raises:
        ConfigError: another hash.
    """
    found = vae.latent_statistics.hash  # type: ignore[union-attr]
    if wanted not in (None, found):
        raise ConfigError(
            f"objective.latent_statistics_hash is {wanted}, but the statistics of role vae have {found}: they were "
            "measured again, or are another VAE's. A model trained on one normalisation does not fit the other: load the "
            "VAE that was meant, or set the hash to null."
        )
