"""The LTX VAE of this package and that of diffusers with the same weights, and what the benchmark does with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLLTXVideo
from torch import Tensor

from videofm import models
from videofm.models.vae.base import VideoVAE
from videofm.models.vae.ltx import ADAPTER

QUARTER: dict[str, dict[str, Any]] = {
    "0.9.0": {"encoder_widths": (32, 64, 128, 128), "decoder_widths": (128, 128, 64, 32)},
    "0.9.1": {"encoder_widths": (32, 64, 128, 128), "decoder_widths": (256, 128, 64)},
}
"""A quarter of each release's width."""


class Shape(NamedTuple):
    """A batch of clips."""

    num_clips: int
    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_clips} x {self.num_frames}x{self.height}x{self.width}"


def build_ours(release: str, full_width: bool = False, **overrides: Any) -> VideoVAE:
    """Ours, with seeded weights and no zeros among them; for speed no better than any other."""
    torch.manual_seed(0)
    vae = models.build("vae/ltx", release, **({} if full_width else QUARTER[release]), **overrides).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim and parameter.abs().max() < 0.1:
                parameter.normal_(std=0.02)
    return vae


def build_theirs(ours: VideoVAE) -> AutoencoderKLLTXVideo:
    """That of diffusers with the weights of `ours`."""
    theirs = AutoencoderKLLTXVideo.from_config(ADAPTER.public_config(ours.config)).eval()
    theirs.load_state_dict(ADAPTER.to_public(ours.state_dict()), strict=True)
    return theirs


class Inputs(NamedTuple):
    """A video, latents, and the noise level of the latents for a decoder that is told it."""

    video: Tensor
    latents: Tensor
    sigma: Tensor | None


def inputs(vae: VideoVAE, shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
    """Random inputs of `shape`."""
    generator = torch.Generator().manual_seed(1)
    video = torch.rand(shape.num_clips, 3, *shape[1:], generator=generator) * 2 - 1
    cells = (vae.latent_frames(shape.num_frames), shape.height // 32, shape.width // 32)
    latents = torch.randn(shape.num_clips, vae.latent_channels, *cells, generator=generator)
    sigma = torch.full((shape.num_clips,), 0.05).to(device, dtype) if vae.timestep_conditioning else None
    return Inputs(video.to(device, dtype), latents.to(device, dtype), sigma)


def operations_of(ours: VideoVAE, theirs: Any, given: Inputs) -> dict[str, dict[str, Callable[[], Any]]]:
    """`encode`, `decode` and `training step` for each of `ours` and `theirs`.

    A training step is encode, decode the mode, a squared error, and the gradients of all weights.
    """
    video, latents, sigma = given

    def our_decode(z: Tensor) -> Tensor:
        return ours.decode(z, sigma, torch.Generator(z.device).manual_seed(0))

    def our_reconstruction() -> Tensor:
        return our_decode(ours.encode(video).mean)

    def their_decode(z: Tensor) -> Tensor:
        return theirs.decode(z, sigma).sample

    def their_reconstruction() -> Tensor:
        return their_decode(theirs.encode(video).latent_dist.mean)

    def step(model: torch.nn.Module, reconstruct: Callable[[], Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        (reconstruct() - video).square().mean().backward()

    no_grad = torch.no_grad()
    return {
        "ours": {
            "encode": no_grad(lambda: ours.encode(video).mean),
            "decode": no_grad(lambda: our_decode(latents)),
            "training step": lambda: step(ours, our_reconstruction),
        },
        "theirs": {
            "encode": no_grad(lambda: theirs.encode(video).latent_dist.mean),
            "decode": no_grad(lambda: their_decode(latents)),
            "training step": lambda: step(theirs, their_reconstruction),
        },
    }


def operations(release: str, shape: Shape) -> dict[str, dict[str, Callable[[], Any]]]:
    """`operations_of` a quarter-width pair, on CPU."""
    ours = build_ours(release)
    return operations_of(ours, build_theirs(ours), inputs(ours, shape))
