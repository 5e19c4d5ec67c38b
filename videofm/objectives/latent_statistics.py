"""Mean and standard deviation of each latent channel over training clips: what a diffusion model's space is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from videofm.errors import DataError
from videofm.types import Batch


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of each latent channel, both `(C,)` float64, and the clips they were measured on."""

    mean: Tensor
    std: Tensor
    num_clips: int


@torch.no_grad()
def measure_latent_statistics(vae: nn.Module, batches: Iterable[Batch]) -> ChannelStatistics:
    """Mean and (population) std of each channel of the posterior means over `batches`, accumulated in float64 (spec B.4).

    Raises:
        DataError: there is no batch, or a channel is constant or not finite, so that latents cannot be normalised.
    """
    device = next(vae.parameters()).device
    count, num_clips, total, squares = 0, 0, torch.zeros(()), torch.zeros(())
    was_training = vae.training
    vae.eval()
    try:
        for batch in batches:
            # (B, C, T, H, W) -> (C, B * T * H * W)
            means = vae.encode(batch.to(device).video).mean.double().cpu().transpose(0, 1).flatten(1)
            total, squares = total + means.sum(1), squares + means.square().sum(1)
            count, num_clips = count + means.shape[1], num_clips + batch.video.shape[0]
    finally:
        vae.train(was_training)
    if count == 0:
        raise DataError("there are no clips to measure latent statistics on: the batches are empty.")
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    broken = [channel for channel, value in enumerate(std.tolist()) if not 1e-8 < value < float("inf")]
    if broken:
        raise DataError(
            f"latent channels {broken} have no usable standard deviation over {num_clips} clips (constant or not finite): "
            "latents cannot be normalised. Train the VAE longer, or look for the step at which its loss broke."
        )
    return ChannelStatistics(mean, std, num_clips)


def first_clips(batches: Iterable[Batch], num_clips: int) -> Iterator[Batch]:
    """Whole batches until `num_clips` clips are read, so that at least as many as asked for are measured."""
    read = 0
    for batch in batches:
        yield batch
        read += batch.video.shape[0]
        if read >= num_clips:
            return
