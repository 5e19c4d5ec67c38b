"""Train a video VAE on reconstruction and KL, then measure the statistics of its latent channels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from videofm.config.train import AutoencoderConfig
from videofm.errors import DataError
from videofm.types import Batch, Loss, Posterior, SampleRng

_MIN_MSE = 1e-10
"""Floor of the mean squared error in PSNR: identical clips show 106 dB, not infinity."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of each latent channel, both `(C,)` float64, and the clips they were measured on."""

    mean: Tensor
    std: Tensor
    num_clips: int


class AutoencoderObjective:
    """Pixel loss + `kl_weight` * KL of role `vae`; one phase.

    The reconstruction is decoded from a sample of the posterior. Both terms are means over a clip's elements, in float32.
    """

    roles: tuple[str, ...] = ("vae",)
    phases: Mapping[str, tuple[str, ...]] = {"train": ("vae",)}

    def __init__(self, config: AutoencoderConfig) -> None:
        self.config = config

    def loss(self, models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng, phase: str) -> Loss:
        """Sums over the local samples of the loss, `reconstruction`, `mse`, `psnr` (dB, pixels in [-1, 1]) and `kl` (nats)."""
        vae = models["vae"]
        posterior: Posterior = vae.encode(batch.video)
        posterior = Posterior(posterior.mean.float(), posterior.logvar.float())
        noise = rng.normal("posterior", tuple(posterior.mean.shape[1:]))
        error = vae.decode(posterior.sample(noise)).float() - batch.video.float()
        mse = _sample_means(error.square())  # (B,)
        reconstruction = mse if self.config.reconstruction == "mse" else _sample_means(error.abs())
        kl = _sample_means(posterior.kl())
        total = (reconstruction + self.config.kl_weight * kl).sum()
        psnr = 10 * torch.log10(4.0 / mse.clamp_min(_MIN_MSE))  # the range of pixels is 2
        sums = {"loss": total, "reconstruction": reconstruction.sum(), "mse": mse.sum(), "psnr": psnr.sum(), "kl": kl.sum()}
        return Loss(total, {name: value.detach() for name, value in sums.items()})

    def after_training(self, models: Mapping[str, nn.Module], batches: Iterable[Batch]) -> dict[str, float]:
        """Measure the latents of `num_statistics_clips` clips and store mean and std in the buffers of the VAE.

        The trainer calls this once, after the last step, with training batches (they may be endless: no more is read than
        needed). From then on normalised training latents have mean 0 and std 1 in each channel.

        Returns:
            Numbers for the log: clips read, smallest and largest std.
        """
        vae = models["vae"]
        statistics = measure_latent_statistics(vae, _first_clips(batches, self.config.num_statistics_clips))
        vae.set_latent_statistics(statistics.mean, statistics.std)
        return {
            "num_clips": float(statistics.num_clips),
            "latent_std_min": float(statistics.std.min()),
            "latent_std_max": float(statistics.std.max()),
        }


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
            means = vae.encode(batch.video.to(device)).mean.double().cpu().transpose(0, 1).flatten(1)
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


def _sample_means(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1)  # (B, ...) -> (B,)


def _first_clips(batches: Iterable[Batch], num_clips: int) -> Iterator[Batch]:
    # Whole batches until num_clips are read, so that at least as many as asked for are measured.
    read = 0
    for batch in batches:
        yield batch
        read += batch.video.shape[0]
        if read >= num_clips:
            return
