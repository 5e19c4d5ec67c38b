"""The parts of the LTX video VAE (spec B.2). All tensors are `(B, C, T, H, W)`."""

from __future__ import annotations

from math import prod

import torch
from einops import reduce, repeat
from torch import Tensor, nn

from videofm.errors import ConfigError
from videofm.models.vae.ltx.config import UPSAMPLE_STRIDE
from videofm.ops.causal_conv import CausalConv3d
from videofm.ops.norm import ChannelLayerNorm, pixel_norm
from videofm.ops.patchify import depth_to_space, space_to_depth


class ResBlock(nn.Module):
    """Twice norm, SiLU, convolution, around a skip; in a decoder also modulated by the noise level, and with noise added.

    Args:
        in_channels, out_channels: if they differ, the skip is a LayerNorm and a 1x1x1 convolution.
        causal: whether convolutions look back only.
        modulated: add `scale_shift_table` (shift, scale for each norm) to the embedding of the noise level.
        inject_noise: after each convolution add one Gaussian map `(H, W)`, shared by samples, channels and frames, times a
            learned scale for each channel (zero at first).
        norm_eps: epsilon of the LayerNorm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        causal: bool,
        modulated: bool = False,
        inject_noise: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(in_channels, out_channels, causal=causal)
        self.conv2 = CausalConv3d(out_channels, out_channels, causal=causal)
        widens = in_channels != out_channels
        self.shortcut_norm = ChannelLayerNorm(in_channels, eps=norm_eps) if widens else None
        self.shortcut = CausalConv3d(in_channels, out_channels, kernel_size=1, causal=causal) if widens else None
        self.scale_shift_table = nn.Parameter(torch.randn(4, in_channels) / in_channels**0.5) if modulated else None
        self.noise_scale1 = nn.Parameter(torch.zeros(out_channels, 1, 1)) if inject_noise else None
        self.noise_scale2 = nn.Parameter(torch.zeros(out_channels, 1, 1)) if inject_noise else None

    def forward(self, x: Tensor, embedding: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """`x`, `embedding` `(B, 4 * C)` of the noise level and the source of injected noise -> the same shape as `x`."""
        shift1 = scale1 = shift2 = scale2 = None
        if self.scale_shift_table is not None:
            assert embedding is not None, "a modulated block needs the embedding of the noise level"
            shift1, scale1, shift2, scale2 = modulation(self.scale_shift_table, embedding)
        h = self.conv1(nn.functional.silu(modulate(pixel_norm(x), shift1, scale1)))
        h = _add_noise_map(h, self.noise_scale1, generator)
        h = self.conv2(nn.functional.silu(modulate(pixel_norm(h), shift2, scale2)))
        h = _add_noise_map(h, self.noise_scale2, generator)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut(self.shortcut_norm(x))
        return x + h


def modulation(table: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
    """A table `(R, C)` plus an embedding `(B, R * C)`, as R tensors `(B, C, 1, 1, 1)`."""
    rows = table + embedding.unflatten(1, (table.shape[0], -1))  # (B, R, C)
    return rows[..., None, None, None].unbind(dim=1)


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """`x * (1 + scale) + shift`, or `x` itself when there is nothing to apply."""
    return x if shift is None or scale is None else x * (1 + scale) + shift


def _add_noise_map(x: Tensor, scale: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if scale is None:
        return x
    if generator is None:
        raise ConfigError(
            "this decoder injects noise: pass decode(..., generator=torch.Generator) so that the result is reproducible."
        )
    noise = torch.randn(x.shape[-2:], generator=generator, device=x.device, dtype=x.dtype)  # (H, W)
    return x + (noise * scale)[None, :, None]  # (C, H, W) -> (1, C, 1, H, W)


class Downsample(nn.Module):
    """Space-to-depth of a convolution, plus the average over channel groups of space-to-depth of the input (0.9.5).

    With a stride of two in time a copy of frame 0 is put in front, so that 1 + 2n frames become 1 + n and the first
    stands alone.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int, int], causal: bool) -> None:
        super().__init__()
        self.stride = stride
        self.out_channels = out_channels
        self.conv = CausalConv3d(in_channels, out_channels // prod(stride), causal=causal)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, 1 + st * n, H, W)` -> `(B, out_channels, 1 + n, H / sh, W / sw)`."""
        x = torch.cat([x[:, :, : self.stride[0] - 1], x], dim=2)
        skip = reduce(space_to_depth(x, self.stride), "b (c group) t h w -> b c t h w", "mean", c=self.out_channels)
        return space_to_depth(self.conv(x), self.stride) + skip


class Upsample(nn.Module):
    """Depth-to-space of a convolution, optionally plus depth-to-space of the input, repeated to the right width.

    Doubles time, height and width, divides channels by `factor`, and drops the first frame: 1 + n frames become 1 + 2n.
    """

    def __init__(self, in_channels: int, factor: int, residual: bool, causal: bool) -> None:
        super().__init__()
        self.repeats = prod(UPSAMPLE_STRIDE) // factor
        self.residual = residual
        self.conv = CausalConv3d(in_channels, in_channels * self.repeats, causal=causal)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, 1 + n, H, W)` -> `(B, C / factor, 1 + 2n, 2H, 2W)`."""
        h = depth_to_space(self.conv(x), UPSAMPLE_STRIDE)[:, :, 1:]
        if not self.residual:
            return h
        skip = depth_to_space(x, UPSAMPLE_STRIDE)[:, :, 1:]
        return h + repeat(skip, "b c t h w -> b (r c) t h w", r=self.repeats)
