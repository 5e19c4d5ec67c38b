"""CV-VAE's latent regularisation (arXiv 2405.20279, section 3.2; spec A.4): video latents that a frozen image VAE understands.

A clip of `1 + k * n` frames has `1 + n` latent frames; the image VAE knows one frame a latent. A mapping says which frame (or
mean of frames) stands for each latent frame. Frame 0 is always kept; group j holds frames `k(j-1)+1 .. kj`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from videofm.config.autoencoder import LatentRegularisation
from videofm.errors import ConfigError
from videofm.types import Batch, SampleRng


@dataclass(frozen=True)
class FrameMapping:
    """What stands for each latent frame: `frames` `(B, C, 1 + n, H, W)`, and how many of them are compared."""

    frames: Tensor
    num_compared: int


def map_frames(video: Tensor, group: int, mapping: str, uniform: Tensor) -> FrameMapping:
    """The frames of `video` `(B, C, 1 + group * n, H, W)` that stand for its latent frames.

    Args:
        mapping: `first` compares frame 0 alone; `slice` takes the last frame of each group, `average` its mean, `random`
            one of its frames.
        uniform: `(B, N)` in [0, 1), N at least n; the choice of `random`.
    """
    first, rest = video[:, :, :1], video[:, :, 1:].unflatten(2, (-1, group))  # (B, C, n, group, H, W)
    num_groups = rest.shape[2]
    if mapping == "average":
        chosen = rest.mean(dim=3)
    elif mapping == "random":
        index = (uniform[:, :num_groups] * group).long().clamp_max(group - 1)  # (B, n)
        index = index[:, None, :, None, None, None].expand(-1, rest.shape[1], -1, 1, *rest.shape[4:])
        chosen = rest.gather(3, index).squeeze(3)
    else:
        chosen = rest[:, :, :, -1]
    frames = torch.cat([first, chosen], dim=2)
    return FrameMapping(frames, 1 if mapping == "first" else frames.shape[2])


def decoder_error(image_vae: nn.Module, latents: Tensor, mapped: FrameMapping) -> Tensor:
    """`|psi(X) - D_i(E_v(X))|`, the mean of each sample, `(B,)`: video latents through the frozen image decoder.

    The gradient flows through the image decoder into `latents` `(B, C, 1 + n, h, w)`.
    """
    decoded = image_vae.decode(latents[:, :, : mapped.num_compared]).float()
    return (decoded - mapped.frames[:, :, : mapped.num_compared]).abs().flatten(1).mean(dim=1)


def encoder_error(vae: nn.Module, image_vae: nn.Module, batch: Batch, mapped: FrameMapping, rng: SampleRng) -> Tensor:
    """`|X - D_v(E_i(psi(X)))|`, the mean of each sample, `(B,)`: image latents through the video decoder.

    Nothing reaches either encoder. With mapping `first` the clip is compared in its first frame.
    """
    with torch.no_grad():
        posterior = image_vae.encode(mapped.frames)
        latents = posterior.sample(rng.normal("image_posterior", tuple(posterior.mean.shape[1:])))
    num_frames = 1 if mapped.num_compared == 1 else batch.video.shape[2]
    sigma = batch.video.new_zeros(len(latents)) if vae.timestep_conditioning else None
    decoded = vae.decode(latents, sigma, rng.generator("decoder_maps")).float()
    return (decoded - batch.video)[:, :, :num_frames].abs().flatten(1).mean(dim=1)


def check_image_vae(config: LatentRegularisation, vae: nn.Module, image_vae: nn.Module) -> None:
    """Refuse an image VAE whose latents are not of the shape of the video VAE's.

    Raises:
        ConfigError: other channels or compression; or a mapping that has no groups to choose from.
    """
    own, other = vae.compression, image_vae.compression
    if image_vae.latent_channels != vae.latent_channels or (own.height, own.width) != (other.height, other.width):
        raise ConfigError(
            f"objective.latent_regularisation: the image VAE has {image_vae.latent_channels} channels at 1/{other.height}, the "
            f"video VAE {vae.latent_channels} at 1/{own.height}: they must agree."
        )
    if other.time != 1:
        raise ConfigError(
            f"objective.latent_regularisation: role image_vae compresses time by {other.time}; it must encode frame by frame "
            "(vae/image_kl)."
        )
