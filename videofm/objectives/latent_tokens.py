"""The latent tokenizer of ARLON (arXiv 2410.20502; spec B3): latents of a frozen VAE through discrete tokens and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from videofm.config.latent_tokens import LatentTokensConfig
from videofm.errors import ConfigError
from videofm.objectives.latents import check_statistics, clean_latents
from videofm.objectives.roles import check_kinds
from videofm.types import Batch, Loss, Ranks, SampleRng


class LatentTokensObjective:
    """Mean squared error between normalised latents and what `tokenizer` makes of their tokens, plus its quantizer's loss."""

    roles: tuple[str, ...] = ("tokenizer", "vae")
    phases: Mapping[str, tuple[str, ...]] = {"train": ("tokenizer",)}

    def __init__(self, config: LatentTokensConfig) -> None:
        self.config = config

    def check(self, models: Mapping[str, nn.Module]) -> None:
        """Refuse models of another kind, a VAE with other statistics than the config names, or another number of channels than
        the tokenizer takes.

        Raises:
            ConfigError: any of these.
        """
        check_kinds(models)
        check_statistics(models["vae"], self.config.latent_statistics_hash)
        check_channels(models["tokenizer"], models["vae"])

    def loss(self, models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng, phase: str) -> Loss:
        """Sums over the local samples of the loss and of the metrics.

        `mse` is that of the latents. `relative_mse` is the same over the variance of the micro-batch's latents around their
        mean in each channel, so that 1 is what a constant would give. `quantizer/NAME` are the parts of the quantizer's loss,
        `tokens` what the tokenizer makes of a clip.

        One draw, keyed by sample: `posterior` (latents are sampled).
        """
        clean = clean_latents(models["vae"], batch, rng)
        made = models["tokenizer"](clean)
        mse = (made.features.float() - clean).square().mean(dim=(1, 2, 3, 4))
        total = (mse + made.quantized.loss).sum()
        metrics = {"mse": mse.detach().sum(), "relative_mse": (mse.detach() / variance(clean)).sum()}
        metrics |= {f"quantizer/{name}": value.detach().sum() for name, value in made.quantized.losses.items()}
        num_tokens = math.prod(made.quantized.indices.shape[1:4])
        return Loss(total, metrics | {"tokens": mse.new_full((), float(len(mse) * num_tokens))})

    def after_step(self, models: Mapping[str, nn.Module], phase: str, skipped: bool, ranks: Ranks) -> dict[str, float]:
        """Let the codebook follow what was seen in the step, or forget it where the step was skipped; `codebook/NAME` are the
        quantizer's own measures."""
        quantizer: Any = models["tokenizer"].quantizer
        if skipped:
            quantizer.discard()
        else:
            quantizer.update(ranks)
        return {f"codebook/{name}": value for name, value in quantizer.metrics(ranks).items()}


def variance(latents: Tensor) -> Tensor:
    """Variance of latents `(B, C, T, H, W)` around the mean of each channel, mean over channels; a scalar."""
    return latents.var(dim=(0, 2, 3, 4), correction=0).mean().clamp_min(1e-6)


def check_started(role: str, tokenizer: Any) -> None:
    """Refuse a frozen tokenizer whose codebook never started from data: its tokens say nothing about a clip.

    Raises:
        ConfigError: it has not.
    """
    if not getattr(getattr(tokenizer, "quantizer", None), "is_ready", True):
        raise ConfigError(
            f"the codebook of role {role} has not started: it was still collecting vectors when its training ended, and its "
            "tokens mean nothing. Train it longer, or lower start_vectors of its quantizer."
        )


def check_channels(tokenizer: nn.Module, vae: nn.Module) -> None:
    """Refuse a latent tokenizer for latents of another number of channels.

    Raises:
        ConfigError: they differ.
    """
    wanted, found = tokenizer.config.latent_channels, vae.latent_channels  # type: ignore[union-attr]
    if wanted != found:
        raise ConfigError(
            f"the tokenizer is for {wanted} latent channels, and the VAE has {found}: it is nested in another VAE's latents. "
            f"Set models.tokenizer.overrides.latent_channels to {found} for a new one, or load the VAE that it was trained on."
        )
