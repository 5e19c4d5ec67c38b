"""The one-level orthonormal Haar transform of frames and videos, and the L1 loss in its sub-bands (spec B.5).

Pairs of neighbours become `(a + b) / sqrt(2)` (low) and `(a - b) / sqrt(2)` (high) along each axis, so energy is preserved
exactly: the sum of squares of all bands is that of the pixels. A clip of `1 + 2 n` frames, as causal VAEs have them, cannot
be paired in time: its frame 0 is transformed by itself in space only, and frames 1.. in pairs (1, 2), (3, 4), ...
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from videofm.errors import DataError


@dataclass(frozen=True)
class VideoBands:
    """The sub-bands of clips; together they have as many numbers as the clips.

    Attributes:
        first: `(B, 4, C, 1, H / 2, W / 2)` of frame 0, for an odd number of frames; otherwise None.
        pairs: `(B, 8, C, n, H / 2, W / 2)` of the n pairs of frames; None for a single frame.
    """

    first: Tensor | None
    pairs: Tensor | None

    def flatten(self) -> Tensor:
        """All coefficients, `(B, C * T * H * W)`."""
        return torch.cat([bands.flatten(1) for bands in (self.first, self.pairs) if bands is not None], dim=1)


def haar2d(frames: Tensor) -> Tensor:
    """The 4 sub-bands of each frame: index `2 h + w`, 0 for low and 1 for high along height and width.

    Args:
        frames: `(B, C, T, H, W)`, H and W even.

    Returns:
        `(B, 4, C, T, H / 2, W / 2)`.

    Raises:
        DataError: H or W is odd, or there are not five dims.
    """
    return _haar(frames, {"height": 3, "width": 4})


def haar3d(video: Tensor) -> Tensor:
    """The 8 sub-bands of each clip: index `4 t + 2 h + w`, 0 for low and 1 for high along each axis.

    Args:
        video: `(B, C, T, H, W)`, all of T, H and W even (`video_bands` takes an odd T).

    Returns:
        `(B, 8, C, T / 2, H / 2, W / 2)`.

    Raises:
        DataError: T, H or W is odd, or there are not five dims.
    """
    return _haar(video, {"time": 2, "height": 3, "width": 4})


def video_bands(video: Tensor) -> VideoBands:
    """The sub-bands of clips of any length: `haar3d` of pairs of frames, and for an odd length `haar2d` of frame 0.

    Args:
        video: `(B, C, T, H, W)`, H and W even.

    Raises:
        DataError: H or W is odd, or there are not five dims.
    """
    _check(video, {"height": 3, "width": 4})
    num_alone = video.shape[2] % 2
    return VideoBands(
        first=haar2d(video[:, :, :1]) if num_alone else None,
        pairs=haar3d(video[:, :, num_alone:]) if video.shape[2] > 1 else None,
    )


def wavelet_l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of each clip's sub-band coefficients, `(B,)`, in float32 or wider.

    The transform is linear, so it is taken once, of the difference. Zero if and only if the clips are equal.

    Args:
        a, b: `(B, C, T, H, W)`, H and W even.

    Raises:
        DataError: shapes differ, H or W is odd, or there are not five dims.
    """
    if a.shape != b.shape:
        raise DataError(f"clips to compare must have one shape: got {tuple(a.shape)} and {tuple(b.shape)}.")
    wide = torch.promote_types(a.dtype, torch.float32)
    return video_bands(a.to(wide) - b.to(wide)).flatten().abs().mean(dim=1)


def _haar(x: Tensor, axes: dict[str, int]) -> Tensor:
    # (B, C, T, H, W) -> (B, 2^n, C, ...) with every axis of `axes` halved; the first axis is the slowest in the band index.
    _check(x, axes)
    bands = [x]
    for dim in axes.values():
        bands = [half for band in bands for half in _halves(band, dim)]
    return torch.stack(bands, dim=1) * 2 ** (-len(axes) / 2)


def _halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)  # (..., 2 n, ...) -> (..., n, ...) twice
    return even + odd, even - odd


def _check(x: Tensor, axes: dict[str, int]) -> None:
    if x.ndim != 5:
        raise DataError(f"the Haar transform takes (B, C, T, H, W), not {tuple(x.shape)}.")
    for name, dim in axes.items():
        if x.shape[dim] % 2 or x.shape[dim] == 0:
            raise DataError(
                f"the Haar transform pairs neighbours along {name}, which has {x.shape[dim]} entries: it must be even and "
                "not 0" + (" (video_bands treats frame 0 by itself)." if name == "time" else ".")
            )
