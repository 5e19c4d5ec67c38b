"""Image compatibility on toy pairs: every number follows from two constants."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from videofm.errors import ConfigError
from videofm.evaluation.compatibility import ImageCompatibility
from videofm.types import Compression, Posterior

SINGLE_FRAMES = Compression(1, 1, 1)


@dataclass
class Toy:
    """Latents are every k-th frame, times `scale`, plus `offset`; decoding adds `error`."""

    compression: Compression = SINGLE_FRAMES
    latent_channels: int = 3
    scale: float = 1.0
    offset: float = 0.0
    error: float = 0.0
    num_dropped: int = 0

    def encode(self, video: Tensor) -> Posterior:
        frames = video[:, :, :: self.compression.time]
        mean = (frames * self.scale + self.offset)[:, :, self.num_dropped :]
        return Posterior(mean, torch.zeros_like(mean))

    def decode(self, latents: Tensor) -> Tensor:
        return latents + self.error


def clips(num_frames: int = 9) -> Tensor:
    return torch.rand(3, 3, num_frames, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5


def test_a_constant_error_has_a_known_psnr() -> None:
    """D_i(E_i(.)) is off by 0.1, D_i(E_v(.)) by 0.1 + 0.2 = 0.3 everywhere: 10 log10(4 / 0.01) = 26.02 dB and
    10 log10(4 / 0.09) = 16.48 dB, a drop of 20 log10(3) = 9.54 dB. Latents differ by 0.2 in mean and not in std.
    """
    measured = ImageCompatibility(Toy(Compression(4, 1, 1), offset=0.2), Toy(error=0.1))
    video = clips()
    frames = measured.update(video[:2])
    measured.update(video[2:])
    result = measured.result()
    assert result["num_clips"] == 3
    assert result["psnr_image_vae"] == pytest.approx(10 * math.log10(400), abs=1e-4)
    assert result["psnr_video_latents"] == pytest.approx(10 * math.log10(4 / 0.09), abs=1e-4)
    assert result["psnr_drop"] == pytest.approx(20 * math.log10(3), abs=1e-4)
    assert result["per_frame"]["psnr_video_latents"] == pytest.approx([10 * math.log10(4 / 0.09)] * 3, abs=1e-4)
    assert result["mean_difference"] == pytest.approx([0.2] * 3, abs=1e-6)
    assert result["std_difference"] == pytest.approx([0.0] * 3, abs=1e-6)
    assert torch.equal(frames.original, video[:2, :, [0, 4, 8]])
    torch.testing.assert_close(frames.from_video_latents, frames.original + 0.3)


def test_scaled_latents_have_another_std() -> None:
    """Video latents 1.5 X against image latents X: the std differs by 0.5 std(X), which was taken over frames 0, 4, 8."""
    measured = ImageCompatibility(Toy(Compression(4, 1, 1), scale=1.5), Toy())
    video = clips()
    measured.update(video)
    result = measured.result()
    std = video[:, :, ::4].double().std(dim=(0, 2, 3, 4), correction=0)
    assert result["latent_std"] == pytest.approx(std.tolist(), rel=1e-6)
    assert result["std_difference"] == pytest.approx((0.5 * std).tolist(), rel=1e-6)


def test_decoded_frames_are_clipped() -> None:
    """An error of 3 takes every pixel to 1, whatever it was: the PSNR is that of white frames."""
    measured = ImageCompatibility(Toy(error=3.0), Toy(error=3.0))
    video = clips()
    measured.update(video)
    white = [10 * math.log10(4 / float((1 - clip).square().mean())) for clip in video]
    assert measured.result()["psnr_video_latents"] == pytest.approx(sum(white) / 3, abs=1e-4)


@pytest.mark.parametrize(
    ("video_vae", "image_vae", "match"),
    [
        (Toy(), Toy(Compression(4, 1, 1)), "the image VAE compresses time by 4"),
        (Toy(latent_channels=16), Toy(), "of the video VAE have 16 channels at 1/1 x 1/1, those of the image VAE 3 channels"),
        (
            Toy(Compression(4, 8, 8)),
            Toy(Compression(1, 16, 16)),
            "3 channels at 1/8 x 1/8, those of the image VAE 3 channels at",
        ),
    ],
)
def test_latents_that_no_decoder_shares(video_vae: Toy, image_vae: Toy, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ImageCompatibility(video_vae, image_vae)


def test_latent_frames_without_a_frame() -> None:
    measured = ImageCompatibility(Toy(Compression(4, 1, 1), num_dropped=1), Toy())
    with pytest.raises(ConfigError, match="9 frames have 2 latent frames, but every 4-th of them are 3 frames"):
        measured.update(clips())
