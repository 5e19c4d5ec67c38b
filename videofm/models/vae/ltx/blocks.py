"""The parts of the LTX video VAE (spec B.2). All tensors are `(B, C, T, H, W)`."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from einops import reduce
from torch import Tensor, nn

from videofm.errors import ConfigError
from videofm.models.vae.ltx.config import UPSAMPLE_STRIDE
from videofm.ops.causal_conv import CausalConv3d, ChunkCache
from videofm.ops.norm import ChannelLayerNorm, pixel_norm_silu
from videofm.ops.patchify import depth_to_space, space_to_depth


class NoiseMaps:
    """The Gaussian maps `(H, W)` that a decoder adds: one for each place of use, shared by samples, channels and frames.

    Drawn from `generator` in the order of use. The chunks of a clip share one map at each place, so a decoder that streams
    keeps this object in the cache.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.maps: dict[nn.Parameter, Tensor] = {}

    def of(self, place: nn.Parameter, x: Tensor) -> Tensor:
        """The map of a place, of the height, width, device and dtype of `x`."""
        if place not in self.maps:
            drawn = torch.randn(x.shape[-2:], generator=self.generator, device=self.generator.device, dtype=torch.float32)
            self.maps[place] = drawn.to(x)
        return self.maps[place]


@dataclass(frozen=True)
class DecoderContext:
    """What a decoder's blocks are told besides `x`: the embedding of the noise level `(B, ...)`, and the injected noise."""

    embedding: Tensor | None
    noise_maps: NoiseMaps | None


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

    def forward(self, x: Tensor, context: DecoderContext | None = None, cache: ChunkCache | None = None) -> Tensor:
        """`x` -> the same frames; `context.embedding` is `(B, 4 * C)` here."""
        embedding, noise_maps = (None, None) if context is None else (context.embedding, context.noise_maps)
        shift1 = scale1 = shift2 = scale2 = None
        if self.scale_shift_table is not None:
            assert embedding is not None, "a modulated block needs the embedding of the noise level"
            shift1, scale1, shift2, scale2 = modulation(self.scale_shift_table, embedding)
        h = self.conv1(pixel_norm_silu(x, shift1, scale1), cache)
        h = _add_noise_map(h, self.noise_scale1, noise_maps)
        h = pixel_norm_silu(h, shift2, scale2)  # a line of its own frees what it was made of before the convolution
        h = self.conv2(h, cache)
        h = _add_noise_map(h, self.noise_scale2, noise_maps)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut(self.shortcut_norm(x), cache)
        return _added(h, x)


def modulation(table: Tensor, embedding: Tensor) -> tuple[Tensor, ...]:
    """A table `(R, C)` plus an embedding `(B, R * C)`, as R tensors `(B, C, 1, 1, 1)`."""
    rows = table + embedding.unflatten(1, (table.shape[0], -1))  # (B, R, C)
    return rows[..., None, None, None].unbind(dim=1)


def _added(x: Tensor, other: Tensor) -> Tensor:
    """`x + other` in the place of `x`, a convolution's output, which no gradient needs; a new tensor where types differ."""
    return x.add_(other) if x.dtype == other.dtype else x + other


def _add_noise_map(x: Tensor, scale: nn.Parameter | None, noise_maps: NoiseMaps | None) -> Tensor:
    if scale is None:
        return x
    if noise_maps is None:
        raise ConfigError(
            "this decoder injects noise: pass decode(..., generator=torch.Generator) so that the result is reproducible."
        )
    return _added(x, (noise_maps.of(scale, x) * scale)[None, :, None])  # (C, H, W) -> (1, C, 1, H, W)


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

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`(B, C, 1 + st * n, H, W)` -> `(B, out_channels, 1 + n, H / sh, W / sw)`; later chunks have `st * n` frames."""
        if self.stride[0] > 1 and (cache is None or cache.is_first):
            x = torch.cat([x[:, :, : self.stride[0] - 1], x], dim=2)
        skip = reduce(space_to_depth(x, self.stride), "b (c group) t h w -> b c t h w", "mean", c=self.out_channels)
        return space_to_depth(self.conv(x, cache), self.stride) + skip


class Upsample(nn.Module):
    """Depth-to-space of a convolution, optionally plus depth-to-space of the input, repeated to the right width.

    Doubles time, height and width, divides channels by `factor`, and drops the first frame: 1 + n frames become 1 + 2n.
    """

    def __init__(self, in_channels: int, factor: int, residual: bool, causal: bool) -> None:
        super().__init__()
        self.repeats = prod(UPSAMPLE_STRIDE) // factor
        self.residual = residual
        self.conv = CausalConv3d(in_channels, in_channels * self.repeats, causal=causal)

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`(B, C, 1 + n, H, W)` -> `(B, C / factor, 1 + 2n, 2H, 2W)`; a later chunk of n frames gives 2n."""
        dropped = 1 if cache is None or cache.is_first else 0
        h = self.conv(x, cache)
        if self.residual:  # before the move, which leaves `(r c)` apart: (B, r C, T, H, W) -> (B, r, C, T, H, W) and back
            h = _added(h.unflatten(1, (self.repeats, -1)), x.unsqueeze(1)).flatten(1, 2)
        return depth_to_space(h, UPSAMPLE_STRIDE)[:, :, dropped:]
