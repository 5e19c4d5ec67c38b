"""Parts shared by the VAEs that descend from Stable Diffusion's: GroupNorm ResBlocks and attention inside a frame.

All tensors are `(B, C, T, H, W)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import silu

from videofm.attention import AttentionSpec, choose
from videofm.ops.causal_conv import CausalConv3d, ChunkCache

if TYPE_CHECKING:
    from videofm.types import AttentionFn

Norm = Callable[[int], nn.Module]
"""Makes the norm of so many channels, which takes a cache as a convolution does."""


class ResBlock(nn.Module):
    """Twice norm, SiLU, convolution, around a skip, which is a convolution where the width changes.

    Args:
        conv1, conv2: the convolutions; `conv1` sets the widths.
        norm: makes the norms.
        shortcut: the convolution of the skip, or None when the width stays.
    """

    def __init__(self, conv1: CausalConv3d, conv2: CausalConv3d, norm: Norm, shortcut: CausalConv3d | None = None) -> None:
        super().__init__()
        assert (shortcut is None) == (conv1.in_channels == conv2.out_channels)
        self.norm1, self.conv1 = norm(conv1.in_channels), conv1
        self.norm2, self.conv2 = norm(conv2.in_channels), conv2
        self.shortcut = shortcut

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`x` -> the same frames, of another width perhaps."""
        h = self.conv1(silu(self.norm1(x, cache)), cache)
        h = self.conv2(silu(self.norm2(h, cache)), cache)
        return h + (x if self.shortcut is None else self.shortcut(x, cache))


class FrameAttention(nn.Module):
    """Single-head attention among the positions of each frame, around a skip: nothing crosses time."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.attend: AttentionFn = choose("auto", AttentionSpec(1, width))

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`x` -> the same shape."""
        return x + self.attended(x, cache)

    def attended(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """What is added to `x`."""
        num_frames, height, width = x.shape[2:]
        tokens = rearrange(self.norm(x, cache), "b c t h w -> (b t) (h w) c")
        q, k, v = (layer(tokens).unsqueeze(2) for layer in (self.q, self.k, self.v))  # (B T, H W, 1, C)
        tokens = self.out(self.attend(q, k, v, None).squeeze(2))
        return rearrange(tokens, "(b t) (h w) c -> b c t h w", t=num_frames, h=height, w=width)
