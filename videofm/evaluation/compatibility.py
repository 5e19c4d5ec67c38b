"""Does an image VAE decode the latents of a video VAE? CV-VAE is trained so that it does (Zhao et al. 2024, arXiv 2405.20279).

A video VAE that compresses time k-fold has one latent frame for frame 0 and one for each k frames after it. Latent frame j is
compared with frame `j * k`, so frames are `X[:, :, ::k]`. Both VAEs come as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from videofm.errors import ConfigError
from videofm.evaluation.reconstruction import psnr, psnr_per_frame
from videofm.types import Compression, Posterior


class VAE(Protocol):
    """What is asked of both VAEs."""

    @property
    def compression(self) -> Compression:
        """Pixels for one latent cell."""
        ...

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        ...

    def encode(self, video: Tensor) -> Posterior:
        """The posterior of `(B, 3, T, H, W)`, in raw latent space."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """The video of raw latents."""
        ...


@dataclass(frozen=True)
class DecodedFrames:
    """Frames that stand for latent frames, all `(B, 3, T', H, W)` in [-1, 1].

    Attributes:
        original: `X[:, :, ::k]`.
        by_image_vae: `D_i(E_i(original))`, the best that the image decoder does.
        from_video_latents: `D_i(E_v(X))`.
    """

    original: Tensor
    by_image_vae: Tensor
    from_video_latents: Tensor


@dataclass
class _Moments:
    """Sums over the positions of latents, for each channel, in float64."""

    count: int = 0
    total: Tensor | float = 0.0
    square: Tensor | float = 0.0

    def add(self, latents: Tensor) -> None:
        values = latents.double().transpose(0, 1).flatten(1).cpu()  # (B, C, T, H, W) -> (C, B * T * H * W)
        self.count += values.shape[1]
        self.total = self.total + values.sum(dim=1)
        self.square = self.square + values.square().sum(dim=1)

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        mean = torch.as_tensor(self.total) / self.count
        return mean, (torch.as_tensor(self.square) / self.count - mean.square()).clamp_min(0).sqrt()


@dataclass
class ImageCompatibility:
    """A pass over clips: `update` with each batch, then `result`.

    Args:
        video_vae: E_v.
        image_vae: E_i and D_i, which take frames one by one.

    Raises:
        ConfigError: their latents have other channels or another size, so that no decoder takes both.
    """

    video_vae: VAE
    image_vae: VAE
    _image_psnr: list[Tensor] = field(default_factory=list)
    _video_psnr: list[Tensor] = field(default_factory=list)
    _image_frames: list[Tensor] = field(default_factory=list)
    _video_frames: list[Tensor] = field(default_factory=list)
    _image_latents: _Moments = field(default_factory=_Moments)
    _video_latents: _Moments = field(default_factory=_Moments)

    def __post_init__(self) -> None:
        ours, theirs = self.video_vae.compression, self.image_vae.compression
        if theirs.time != 1:
            raise ConfigError(
                f"the image VAE compresses time by {theirs.time}; one that takes single frames compresses it by 1."
            )
        shapes = [
            (vae.latent_channels, vae.compression.height, vae.compression.width) for vae in (self.video_vae, self.image_vae)
        ]
        if shapes[0] != shapes[1]:
            told = [f"{channels} channels at 1/{height} x 1/{width}" for channels, height, width in shapes]
            raise ConfigError(
                f"the latents of the video VAE have {told[0]}, those of the image VAE {told[1]}: no decoder takes both. "
                "Give the image VAE that the video VAE was made to fit."
            )
        self._stride = ours.time

    @torch.no_grad()
    def update(self, video: Tensor) -> DecodedFrames:
        """Add a batch of clips `(B, 3, T, H, W)` in [-1, 1]; returns what was decoded.

        Raises:
            ConfigError: there are not as many latent frames as frames `X[:, :, ::k]`.
            DataError: the video VAE takes no clips of this shape.
        """
        original = video[:, :, :: self._stride]
        video_latents = self.video_vae.encode(video).mode()
        if video_latents.shape[2] != original.shape[2]:
            raise ConfigError(
                f"{video.shape[2]} frames have {video_latents.shape[2]} latent frames, but every {self._stride}-th of them are "
                f"{original.shape[2]} frames: which frame a latent frame stands for is defined for 1 + {self._stride} * n "
                "frames with 1 + n latent frames. Choose num_frames so."
            )
        image_latents = self.image_vae.encode(original).mode()
        by_image_vae = self.image_vae.decode(image_latents).clamp(-1, 1)
        from_video_latents = self.image_vae.decode(video_latents).clamp(-1, 1)
        self._image_latents.add(image_latents)
        self._video_latents.add(video_latents)
        for decoded, clips, frames in (
            (by_image_vae, self._image_psnr, self._image_frames),
            (from_video_latents, self._video_psnr, self._video_frames),
        ):
            clips.append(psnr(decoded, original).cpu())
            frames.append(psnr_per_frame(decoded, original).cpu())
        return DecodedFrames(original, by_image_vae, from_video_latents)

    def result(self) -> dict[str, Any]:
        """The numbers, as JSON holds them, over at least one batch.

        - `num_clips`;
        - `psnr_image_vae` of `D_i(E_i(frames))` and `psnr_video_latents` of `D_i(E_v(X))`, dB, means over clips, and
          `psnr_drop`, the first minus the second;
        - `per_frame`: both, the mean over clips for each latent frame;
        - `mean_difference` and `std_difference`: those of the video latents minus those of the image latents, one a channel,
          and `latent_std` of the image latents, against which they are large or small.
        """
        image, video = torch.cat(self._image_psnr), torch.cat(self._video_psnr)
        image_mean, image_std = self._image_latents.mean_and_std()
        video_mean, video_std = self._video_latents.mean_and_std()
        return {
            "num_clips": len(image),
            "psnr_image_vae": float(image.mean()),
            "psnr_video_latents": float(video.mean()),
            "psnr_drop": float(image.mean() - video.mean()),
            "per_frame": {
                "psnr_image_vae": torch.cat(self._image_frames).mean(dim=0).tolist(),
                "psnr_video_latents": torch.cat(self._video_frames).mean(dim=0).tolist(),
            },
            "mean_difference": (video_mean - image_mean).tolist(),
            "std_difference": (video_std - image_std).tolist(),
            "latent_std": image_std.tolist(),
        }
