"""Parts of Step-Video's VAE: dual-path blocks, token-causal attention, upsamplers (spec step-video A2).

All tensors are `(B, C, T, H, W)`. Convolutions see two frames of zeros before the first frame, and never a later frame.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from videofm.attention import AttentionSpec, choose
from videofm.models.vae.blocks import Norm, ResBlock
from videofm.ops.causal_conv import CausalConv3d

if TYPE_CHECKING:
    from videofm.types import AttentionFn

QUERY_BLOCK = 1024
"""Queries of one attention call. A mask over all tokens of a large chunk would take gigabytes."""

Conv = partial(CausalConv3d, time_padding="zeros")


def unshuffle(x: Tensor, factor: int) -> Tensor:
    """Space and time to channels: `(B, C, 1 + factor * n, H, W)` -> `(B, C * factor^3, 1 + n, H / factor, W / factor)`.

    Zero frames in front make the length fit, so that the first frame stays by itself.
    """
    x = pad(x, (0, 0, 0, 0, factor - 1, 0))
    return rearrange(x, "b c (t ft) (h fh) (w fw) -> b (c ft fh fw) t h w", ft=factor, fh=factor, fw=factor)


def shuffle(x: Tensor, factor: int) -> Tensor:
    """The inverse of `unshuffle`; the frames in place of the padding are dropped."""
    x = rearrange(x, "b (c ft fh fw) t h w -> b c (t ft) (h fh) (w fw)", ft=factor, fh=factor, fw=factor)
    return x[:, :, factor - 1 :]


class DualPathDown(nn.Module):
    """Shrinks every axis by `factor`: a convolution, and beside it the input itself, unshuffled and averaged over channels."""

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__()
        self.factor, self.out_channels = factor, out_channels
        self.conv = Conv(in_channels, out_channels // factor**3)

    def forward(self, x: Tensor) -> Tensor:
        """`x` -> a smaller, wider one."""
        averaged = reduce(unshuffle(x, self.factor), "b (c g) t h w -> b c t h w", "mean", c=self.out_channels)
        return unshuffle(self.conv(x), self.factor) + averaged


class DualPathUp(nn.Module):
    """Grows every axis by `factor`: a convolution, and beside it the input with repeated channels, both shuffled."""

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__()
        self.factor, self.num_repeats = factor, out_channels * factor**3 // in_channels
        self.conv = Conv(in_channels, out_channels * factor**3)

    def forward(self, x: Tensor) -> Tensor:
        """`x` -> a larger, narrower one."""
        return shuffle(self.conv(x) + x.repeat_interleave(self.num_repeats, dim=1), self.factor)


class TokenCausalAttention(nn.Module):
    """Single-head attention over all positions of a chunk, around a skip. In the order (T, H, W) none sees a later one."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.attend: AttentionFn = choose("auto", AttentionSpec(1, width, has_mask=True))

    def forward(self, x: Tensor) -> Tensor:
        """`x` -> the same shape."""
        num_frames, height, width = x.shape[2:]
        tokens = rearrange(self.norm(x), "b c t h w -> b (t h w) c")
        q, k, v = (layer(tokens).unsqueeze(2) for layer in (self.q, self.k, self.v))  # (B, L, 1, C)
        starts = range(0, tokens.shape[1], QUERY_BLOCK)
        attended = torch.cat([self._attend_from(start, q, k, v) for start in starts], dim=1).squeeze(2)  # (B, L, C)
        return x + rearrange(self.out(attended), "b (t h w) c -> b c t h w", t=num_frames, h=height, w=width)

    def _attend_from(self, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the block of queries that begins at `start` gets from the tokens up to each of them."""
        end = min(start + QUERY_BLOCK, q.shape[1])
        mask = torch.ones(1, 1, end - start, end, dtype=torch.bool, device=q.device).tril(diagonal=start)
        return self.attend(q[:, start:end], k[:, :end], v[:, :end], mask)


class Middle(nn.Module):
    """ResBlock, attention, ResBlock, at the coarsest resolution."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.block1 = res_block(width, width, norm)
        self.attention = TokenCausalAttention(width, norm)
        self.block2 = res_block(width, width, norm)

    def forward(self, x: Tensor) -> Tensor:
        """`x` -> the same shape."""
        return self.block2(self.attention(self.block1(x)))


class SpatialUpsample(nn.Module):
    """Twice the height and width: nearest neighbour, then a convolution inside each frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Conv(width, width, (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> `(B, C, T, 2 H, 2 W)`."""
        return self.conv(repeat(x, "b c t h w -> b c t (h fh) (w fw)", fh=2, fw=2))


class ResidualUpsample(nn.Module):
    """Twice every axis: nearest neighbour, then two convolutions with norms behind them, around two skips."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.norm1 = Conv(width, width), norm(width)
        self.conv2, self.norm2 = Conv(width, width), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> `(B, C, 2 T, 2 H, 2 W)`."""
        x = repeat(x, "b c t h w -> b c (t ft) (h fh) (w fw)", ft=2, fh=2, fw=2)
        h = self.norm2(self.conv2(silu(self.norm1(self.conv1(x)))))
        return x + silu(x + h)


def res_block(entering: int, leaving: int, norm: Norm) -> ResBlock:
    """A ResBlock that changes the width from `entering` to `leaving`."""
    shortcut = Conv(entering, leaving, 1) if entering != leaving else None
    return ResBlock(Conv(entering, leaving), Conv(leaving, leaving), norm, shortcut)
