"""Flow matching in the latent space of a frozen VAE (LTX-Video, arXiv 2501.00103; spec C.4)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from videofm.config.train import FlowMatchingConfig
from videofm.objectives.noise_levels import NoiseLevelLaw
from videofm.ops import flow
from videofm.ops.patchify import tokens_from_latents
from videofm.ops.rope import video_coordinates
from videofm.types import Batch, Conditioning, Loss, SampleRng

_TEXT_MULTIPLE = 32
"""Text is cut to a multiple of this many tokens, so that few different shapes occur."""


class FlowMatchingObjective:
    """Mean squared error of the velocity that `dit` predicts for noisy latents of `vae`, given text of `text_encoder`."""

    roles: tuple[str, ...] = ("dit", "vae", "text_encoder")

    def __init__(self, config: FlowMatchingConfig) -> None:
        self.config = config
        self.noise_levels = NoiseLevelLaw(config.noise_levels)
        trained = ("dit", "text_encoder") if config.train_text_encoder else ("dit",)
        self.phases: Mapping[str, tuple[str, ...]] = {"train": trained}

    def loss(self, models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng, phase: str) -> Loss:
        """Sums over the local samples of the loss, `mse` (the same) and `sigma`.

        Draws, each keyed by sample: `posterior` (latents are sampled), `sigma`, `noise`, `caption` (dropout).
        """
        clean = self.encode(models["vae"], batch.video, rng)
        num_tokens = clean.shape[2] * clean.shape[3] * clean.shape[4]
        sigma = self.noise_levels.sample(rng.uniform("sigma"), num_tokens)
        noise = rng.normal("noise", tuple(clean.shape[1:]))
        captions = self.drop_captions(batch.captions, rng.uniform("caption"))
        mse = self.velocity_errors(models, clean, captions, batch.fps, sigma, noise)
        total = mse.sum()
        return Loss(total, {"loss": total.detach(), "mse": total.detach(), "sigma": sigma.sum()})

    @torch.no_grad()
    def encode(self, vae: nn.Module, video: Tensor, rng: SampleRng | None = None) -> Tensor:
        """Normalised latents `(B, C, T, H, W)` float32 of `video`: sampled with draws of `rng`, or the most likely without."""
        posterior = vae.encode(video)
        if rng is None:
            latents = posterior.mode().float()
        else:
            latents = posterior.sample(rng.normal("posterior", tuple(posterior.mean.shape[1:]))).float()
        return vae.normalize(latents)

    def velocity_errors(
        self,
        models: Mapping[str, nn.Module],
        clean: Tensor,
        captions: list[str],
        fps: Tensor,
        sigma: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Each sample's mean squared error of the predicted velocity.

        Args:
            models: roles `dit`, `vae` (for its compression) and `text_encoder`.
            clean: normalised latents `(B, C, T, H, W)`.
            captions: B texts.
            fps: `(B,)` frames a second.
            sigma: `(B,)` noise levels.
            noise: unit Gaussian, shape of `clean`.

        Returns:
            `(B,)` float32, also under autocast.
        """
        conditioning = self._conditioning(models["text_encoder"], captions)
        coordinates = video_coordinates(tuple(clean.shape[2:]), fps, models["vae"].compression)
        clean_tokens, noise_tokens = tokens_from_latents(clean), tokens_from_latents(noise)
        noisy = flow.add_noise(clean_tokens, noise_tokens, sigma)
        predicted = models["dit"](noisy, sigma, conditioning, coordinates)
        error = predicted.float() - flow.velocity(clean_tokens, noise_tokens).float()
        return error.square().flatten(1).mean(dim=1)

    def drop_captions(self, captions: list[str], uniform: Tensor) -> list[str]:
        """Captions with those whose draw lies below `caption_dropout` made empty."""
        dropped = (uniform < self.config.caption_dropout).tolist()
        return ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]

    def _conditioning(self, text_encoder: nn.Module, captions: list[str]) -> Conditioning:
        """The captions' text: each distinct one is encoded once, and columns that only hold padding are cut off.

        The model masks padding, so the cut changes no number; it spares a quarter of the step for short captions.
        """
        distinct = sorted(set(captions))
        with nullcontext() if self.config.train_text_encoder else torch.no_grad():
            text: Conditioning = text_encoder.encode(distinct)
        longest = int(text.mask.sum(dim=1).max()) if _padded_at_the_end(text.mask) else text.mask.shape[1]
        kept = -(-longest // _TEXT_MULTIPLE) * _TEXT_MULTIPLE
        rows = torch.tensor([distinct.index(caption) for caption in captions], device=text.mask.device)
        return Conditioning(text.embeddings[:, :kept][rows], text.mask[:, :kept][rows])


def _padded_at_the_end(mask: Tensor) -> bool:
    return bool((mask[:, 1:] <= mask[:, :-1]).all())
