"""Rotary positions along time, height and width, in two families. Everything is float32, also under autocast.

Fractional (LTX-Video, arXiv 2501.00103, section 2.3; spec C.3): `video_coordinates`, `rotary_table`, `rotate`. A token has
coordinates (seconds, pixels down, pixels right). Divided by the span of each axis they are fractions of the largest video;
frequencies rise exponentially from pi/2 to theta * pi/2; all heads together are rotated, in adjacent pairs.

Counted (Step-Video, arXiv 2502.10248, section 4; spec step-video A3): `cell_coordinates`, `cell_rotary_table`, `rotate_halves`.
A token is at whole numbers (frame, row, column). Each head has channels for each axis, whose first half is paired with the
second. `line_rotary_table` gives all of a head to one axis, for sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange, repeat
from torch import Tensor

from videofm.errors import ConfigError
from videofm.types import Compression

SPAN = (20.0, 2048.0, 2048.0)
"""What counts as 1.0 along (time in seconds, height in pixels, width in pixels)."""


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of each token's angles, float32: `(B, L, D)`, or `(B, L, 1, K)` where heads are rotated alike.

    One table serves all layers of a step, and so does what is derived from it at first use.
    """

    cos: Tensor
    sin: Tensor

    @cached_property
    def turns(self) -> Tensor:
        """`cos + i sin` of adjacent pairs, complex64 `(B, L, D / 2)`: what `rotate` multiplies by."""
        return torch.view_as_complex(torch.stack([self.cos[..., ::2], self.sin[..., ::2]], dim=-1))

    @cached_property
    def signed_sin(self) -> Tensor:
        """`sin`, negative for the first half of each axis' channels: what `rotate_halves` multiplies exchanged halves by."""
        return _signed(self.sin)


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
    if torch.compiler.is_compiling():  # which fuses this, and cannot fuse complex numbers
        a, b = rearrange(x.float(), "b l (d two) -> two b l d", two=2)
        cos, sin = table.cos[..., ::2], table.sin[..., ::2]
        return rearrange([a * cos - b * sin, b * cos + a * sin], "two b l d -> b l (d two)").to(x.dtype)
    pairs = torch.view_as_complex(rearrange(x.float().contiguous(), "b l (d two) -> b l d two", two=2))
    return rearrange(torch.view_as_real(pairs * table.turns), "b l d two -> b l (d two)").to(x.dtype)


def cell_coordinates(shape: tuple[int, int, int], batch_size: int, device: torch.device | str | None = None) -> Tensor:
    """The number of every latent cell along each axis, from 0, in the order of `tokens_from_latents`.

    Args:
        shape: (T, H, W) in latent cells.
        batch_size: B.
        device: of the result.

    Returns:
        `(B, 3, L)` float32: frame, row, column.
    """
    axes = [torch.arange(n, dtype=torch.float32, device=device) for n in shape]
    return repeat(torch.stack(torch.meshgrid(*axes, indexing="ij")), "xyz t h w -> b xyz (t h w)", b=batch_size)


def head_split(head_width: int) -> tuple[int, int, int]:
    """Channels of a head for (time, height, width): a half and two quarters, 64, 32 and 32 of the 128 of Step-Video.

    Raises:
        ConfigError: `head_width` is no multiple of 8, so that a quarter is odd.
    """
    if head_width % 8 or head_width < 8:
        raise ConfigError(
            f"head_width {head_width}: rotary positions give a half of a head to time and a quarter each to height and width, "
            f"in pairs of channels; take a multiple of 8."
        )
    return head_width // 2, head_width // 4, head_width // 4


def cell_rotary_table(coordinates: Tensor, head_width: int, theta: float = 10000.0) -> RotaryTable:
    """The table of `rotate_halves` for tokens at `coordinates` `(B, 3, L)`; cos and sin are `(B, L, 1, K)`, for any head.

    Channels i and i + n / 2 of the n that an axis has share the angle `coordinate * theta ** (-2 i / n)`.
    """
    angles = []
    for axis, num_channels in enumerate(head_split(head_width)):
        exponents = torch.arange(0, num_channels, 2, dtype=torch.float32, device=coordinates.device) / num_channels
        axis_angles = coordinates[:, axis, :, None].float() * theta**-exponents  # (B, L, n / 2)
        angles += [axis_angles, axis_angles]
    joined = rearrange(torch.cat(angles, dim=-1), "b l k -> b l 1 k")
    return RotaryTable(joined.cos(), joined.sin())


def line_rotary_table(positions: Tensor, head_width: int, theta: float = 10000.0) -> RotaryTable:
    """The table of `rotate_halves` for tokens in one row (Su et al. 2021); cos and sin are `(B, L, 1, K)`, for any head.

    The frequencies `theta ** (-2 i / K)`, i from 0 to before K / 2, go to the pairs of channels in the order in which
    `cell_rotary_table` gives pairs to its axes: the network is that of LLaMA up to the order of channels within a head, and the
    rotation, with its kernel, is that of the counted family.

    Args:
        positions: `(B, L)`, whole numbers; they may be negative.
        head_width: K.
        theta: the ratio of the highest to the lowest frequency, nearly.

    Raises:
        ConfigError: `head_width` is no multiple of 8.
    """
    halves = [num_channels // 2 for num_channels in head_split(head_width)]
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions.device) / head_width
    angles = positions[:, :, None].float() * theta**-exponents  # (B, L, K / 2)
    joined = torch.cat([part for part in angles.split(halves, dim=-1) for _ in range(2)], dim=-1)
    joined = rearrange(joined, "b l k -> b l 1 k")
    return RotaryTable(joined.cos(), joined.sin())


def rotate_halves(x: Tensor, table: RotaryTable) -> Tensor:
    """Every head of `x` `(B, L, N, K)` turned by the angles of its token; computed in float32, returned in the dtype of `x`."""
    wide = x.float()
    sizes = [half for half in _halves(x.shape[-1]) for _ in range(2)]
    t1, t2, h1, h2, w1, w2 = wide.split(sizes, dim=-1)
    exchanged = torch.cat([t2, t1, h2, h1, w2, w1], dim=-1)
    sin = _signed(table.sin) if torch.compiler.is_compiling() else table.signed_sin
    return torch.addcmul(wide * table.cos, exchanged, sin).to(x.dtype)


def _signed(sin: Tensor) -> Tensor:
    signs = [sin.new_full((half,), sign) for half in _halves(sin.shape[-1]) for sign in (-1.0, 1.0)]
    return sin * torch.cat(signs)


def _halves(head_width: int) -> list[int]:
    """Half of the channels that each axis has of a head."""
    return [num_channels // 2 for num_channels in head_split(head_width)]
