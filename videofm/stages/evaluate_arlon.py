"""What stage `evaluate` measures of ARLON's parts: the latent tokenizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from videofm import models
from videofm.config.recipe import TokenizerMetric
from videofm.errors import ConfigError
from videofm.evaluation.reconstruction import psnr
from videofm.evaluation.tokens import TokenScores
from videofm.models.quantizers.kmeans import kmeans
from videofm.models.quantizers.search import nearest
from videofm.objectives.latent_tokens import check_channels
from videofm.objectives.latents import encoded_latents
from videofm.parallel.rng import keyed_generator
from videofm.run_dir import RunDirectory
from videofm.sampling.pipeline import evaluating
from videofm.stages.evaluate_vae import load_vae, no_noise
from videofm.stages.stored_clips import clip_batches, device, existing

NUM_ITERATIONS = 20
"""Of k-means for the baseline."""


def measure_tokenizer(metric: TokenizerMetric, run: RunDirectory, seed: int) -> dict[str, Any]:
    """What tokens keep of clips, from the most likely latents; noise that a decoder injects is drawn with `seed`.

    Returns:
        - all of `TokenScores.result`, and `relative_mse_nearest_mean`: what as many codes would keep without a network,
          means of boxes found by k-means on these very clips, each box replaced by the nearest;
        - `psnr` of the video that the VAE decodes from the features, and `psnr_of_latents` of the one from the latents
          themselves, in dB, means over clips;
        - `bits_per_token`, `rate` (time, height, width, in latent cells), `clip` (frames, height, width, in pixels),
          `num_parameters`.

    Raises:
        ConfigError: the run holds no latent tokenizer, or a VAE of other channels.
    """
    tokenizer = models.load(existing(metric.run), role="tokenizer", device=device())
    if not hasattr(tokenizer, "token_shape"):
        raise ConfigError(
            f"run = {metric.run!r} holds {tokenizer.spec_name}, which is no latent tokenizer: give the run of one."
        )
    vae = load_vae(metric.run)
    check_channels(tokenizer, vae)
    sizes = tokenizer.quantizer.vocab_sizes
    scores = TokenScores(tokenizer.config.rate, sizes)
    decibels: dict[str, list[torch.Tensor]] = {"psnr": [], "psnr_of_latents": []}
    with evaluating(vae, tokenizer), torch.no_grad():
        for batch in clip_batches(metric, run, seed):
            video = batch.video.to(device())
            latents = encoded_latents(vae, video)
            indices = tokenizer.encode(latents)
            features = tokenizer.decode(indices, latents.shape[2])
            scores.update(latents, features, indices)
            for name, decoded in (("psnr", features), ("psnr_of_latents", latents)):
                noise = keyed_generator(seed, "decoder_noise")
                output = vae.decode(vae.denormalize(decoded), no_noise(vae, video), noise)
                decibels[name].append(psnr(output.clamp(-1, 1), video).cpu())
    return {
        **scores.result(),
        "relative_mse_nearest_mean": scores.error_of(nearest_means(scores.box_vectors(), math.prod(sizes), seed)),
        **{name: float(torch.cat(values).mean()) for name, values in decibels.items()},
        "bits_per_token": float(tokenizer.quantizer.bits_per_token),
        "rate": list(tokenizer.config.rate),
        "clip": [metric.num_frames, metric.height, metric.width],
        "num_parameters": sum(parameter.numel() for parameter in tokenizer.parameters()),
    }


def nearest_means(vectors: Tensor, num_codes: int, seed: int) -> Tensor:
    """`vectors` `(N, C)`, each replaced by the nearest of `num_codes` k-means centres of them all; by itself, where they are no
    more than the codes."""
    if len(vectors) <= num_codes:
        return vectors
    centres = kmeans(vectors, num_codes, NUM_ITERATIONS, keyed_generator(seed, "nearest_means")).centres
    return centres[nearest(vectors, centres)]
