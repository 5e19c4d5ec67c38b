"""PSNR and SSIM of reconstructed clips, pixels in [-1, 1] (range 2)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import conv2d

from videofm.errors import DataError

DATA_RANGE = 2.0
WINDOW = 11
_SIGMA = 1.5
_C1, _C2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
_MIN_MSE = 1e-10


def psnr(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip in dB, `10 log10(4 / mse)` over all its elements.

    Args:
        reconstruction, original: `(B, C, T, H, W)` in [-1, 1].

    Returns:
        `(B,)` float32. Equal clips show 106 dB, where the mean squared error is cut off at 1e-10.
    """
    return _decibels(_frame_mse(reconstruction, original).mean(dim=1))


def psnr_per_frame(reconstruction: Tensor, original: Tensor) -> Tensor:
    """PSNR of each frame in dB, `(B, T)` float32, from the error of that frame alone.

    Its mean over frames is not `psnr` of the clip, which takes the logarithm of the mean error: by convexity it is at least
    as large. Arguments as in `psnr`.
    """
    return _decibels(_frame_mse(reconstruction, original))


def ssim(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Structural similarity of each clip (Wang et al. 2004): the mean over frames, channels and positions.

    An 11x11 Gaussian window of standard deviation 1.5 slides over each frame and channel where it fits wholly inside;
    variances are of the window's weights; constants are (0.01 * 2)^2 and (0.03 * 2)^2. Computed in float64.

    Args:
        reconstruction, original: `(B, C, T, H, W)` in [-1, 1], frames of at least 11x11 pixels.

    Returns:
        `(B,)` float32, at most 1.

    Raises:
        DataError: shapes differ, or frames are smaller than the window.
    """
    return _frame_ssim(reconstruction, original).mean(dim=1).float()


def ssim_per_frame(reconstruction: Tensor, original: Tensor) -> Tensor:
    """Structural similarity of each frame, `(B, T)` float32, whose mean over frames is `ssim`. Arguments as in `ssim`."""
    return _frame_ssim(reconstruction, original).float()


def _frame_mse(reconstruction: Tensor, original: Tensor) -> Tensor:
    _check(reconstruction, original)
    return (reconstruction.float() - original.float()).square().mean(dim=(1, 3, 4))  # (B, C, T, H, W) -> (B, T)


def _decibels(mse: Tensor) -> Tensor:
    return 10 * torch.log10(DATA_RANGE**2 / mse.clamp_min(_MIN_MSE))


def _frame_ssim(reconstruction: Tensor, original: Tensor) -> Tensor:
    # (B, T) float64.
    _check(reconstruction, original)
    num_clips, num_frames, height, width = (original.shape[dim] for dim in (0, 2, 3, 4))
    if min(height, width) < WINDOW:
        raise DataError(f"SSIM needs frames of at least {WINDOW}x{WINDOW} pixels, not {height}x{width}.")
    x, y = (rearrange(video.double(), "b c t h w -> (b t c) 1 h w") for video in (reconstruction, original))
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    contrast_structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    similarity = luminance * contrast_structure
    return similarity.reshape(num_clips, num_frames, -1).mean(dim=2)  # (B T C, 1, h, w) -> (B, T)


def _blur(images: Tensor) -> Tensor:
    # (N, 1, H, W) -> (N, 1, H - 10, W - 10): a separable Gaussian, no padding.
    positions = torch.arange(WINDOW, dtype=images.dtype, device=images.device) - WINDOW // 2
    weights = torch.exp(-positions.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    return conv2d(conv2d(images, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))


def _check(reconstruction: Tensor, original: Tensor) -> None:
    if reconstruction.shape != original.shape or original.ndim != 5:
        raise DataError(
            f"clips to compare must both be (B, C, T, H, W): got {tuple(reconstruction.shape)} and {tuple(original.shape)}."
        )
