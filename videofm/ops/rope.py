"""Rotary positions over fractional coordinates (LTX-Video, arXiv 2501.00103, section 2.3; spec C.3).

A token has coordinates (seconds, pixels down, pixels right). Divided by the span of each axis they are fractions of the largest
video; frequencies rise exponentially from pi/2 to theta * pi/2. Everything is float32, also under autocast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from videofm.types import Compression

SPAN = (20.0, 2048.0, 2048.0)
"""What counts as 1.0 along (time in seconds, height in pixels, width in pixels)."""


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of each token's angles, both `(B, L, D)` float32; adjacent channels share an angle."""

    cos: Tensor
    sin: Tensor


def video_coordinates(
    shape: tuple[int, int, int],
    fps: Tensor,
    compression: Compression,
    causal_fix: bool = False,
) -> Tensor:
    """The coordinates of the top left corner of every latent cell, in the order of `tokens_from_latents`.

    Args:
        shape: (T, H, W) in latent cells.
        fps: `(B,)` pixel frames a second.
        compression: pixels a cell along each axis.
        causal_fix: give latent frame f the time of pixel frame `max(0, time * (f - 1) + 1)`, the first one that it holds,
            in place of `time * f`. `LTXPipeline` of diffusers does not; `LTXConditionPipeline` does.

    Returns:
        `(B, 3, L)` float32: seconds, pixels down, pixels right.
    """
    frames, rows, columns = (torch.arange(n, dtype=torch.float32, device=fps.device) for n in shape)
    frames = frames * compression.time
    if causal_fix:
        frames = (frames + 1 - compression.time).clamp(min=0)
    grid = torch.meshgrid(frames, rows * compression.height, columns * compression.width, indexing="ij")
    coordinates = repeat(torch.stack(grid), "xyz t h w -> b xyz (t h w)", b=fps.shape[0])
    scale = torch.ones(fps.shape[0], 3, 1, device=fps.device)
    scale[:, 0, 0] = fps.float()
    return coordinates / scale


def frequencies(width: int, theta: float = 10000.0, device: torch.device | str | None = None) -> Tensor:
    """`theta ** u * pi / 2` for u evenly spaced over [0, 1], `(width // 6,)` float32, increasing: one set for each axis."""
    exponents = torch.linspace(0.0, 1.0, width // 6, dtype=torch.float32, device=device)
    return theta**exponents * (math.pi / 2)


def rotary_table(coordinates: Tensor, width: int, theta: float = 10000.0) -> RotaryTable:
    """The table for tokens at `coordinates`.

    Args:
        coordinates: `(B, 3, L)`: seconds, pixels down, pixels right.
        width: channels that are rotated, D. The first `width % 6` of them are left alone; the rest are laid out with the
            frequency slow and the axis (time, height, width) fast, each angle twice.
    """
    span = torch.tensor(SPAN, dtype=torch.float32, device=coordinates.device)
    signed = coordinates.float() / span[:, None] * 2 - 1  # (B, 3, L), from -1 to 1 over the largest video
    angles = rearrange(signed, "b xyz l -> b l 1 xyz") * frequencies(width, theta, coordinates.device)[:, None]
    angles = repeat(angles, "b l f xyz -> b l (f xyz two)", two=2)
    angles = torch.nn.functional.pad(angles, (width % 6, 0))  # angle 0: cos 1, sin 0
    return RotaryTable(angles.cos(), angles.sin())


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """`x` `(B, L, D)` with each channel pair (2i, 2i+1) turned by its angle; computed in float32, returned in the dtype of
    `x`.
    """
    even, odd = rearrange(x, "b l (d two) -> two b l d", two=2)
    turned = rearrange([-odd, even], "two b l d -> b l (d two)")
    return (x.float() * table.cos + turned.float() * table.sin).to(x.dtype)
