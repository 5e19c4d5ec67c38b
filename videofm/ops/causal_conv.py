"""A 3D convolution that pads time by repeating frames, whole clips or chunk by chunk.

Streaming (Wan2.1, arXiv 2503.20314; spec E): the first chunk is padded with copies of its first frame, every later chunk is
prefixed with what the previous one left over. With padded length T', kernel k and stride s there are
`n = floor((T' - k) / s) + 1` outputs, and the last `T' - n * s` frames are the cache. State goes in and comes out; none is
kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from videofm.errors import ConfigError


@dataclass(frozen=True)
class StreamOutput:
    """Frames that a chunk completes (possibly none), and the input frames that the next chunk needs; both `(B, C, T, H, W)`."""

    output: Tensor
    cache: Tensor


class CausalConv3d(nn.Conv3d):
    """Conv3d over `(B, C, T, H, W)`, zero padding in space, repeated frames in time.

    Args:
        in_channels, out_channels: as in Conv3d.
        kernel_size: one odd number for all axes.
        stride: (time, height, width).
        causal: pad with `k - 1` copies of frame 0, so that an output sees no later frame. Otherwise with `(k - 1) / 2`
            copies of the first and of the last frame.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
        causal: bool = True,
    ) -> None:
        assert kernel_size % 2 == 1, "an even kernel has no centre"
        pad = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, stride, padding=(0, pad, pad))
        self.causal = causal

    def forward(self, x: Tensor, cache: Tensor | None = None) -> Tensor:
        """All output frames of a clip, or of a chunk that follows `cache` (causal only)."""
        if cache is not None:
            return self.stream(x, cache).output
        return super().forward(self._pad(x))

    def stream(self, x: Tensor, cache: Tensor | None) -> StreamOutput:
        """One chunk of a clip, `cache` None for the first; concatenated outputs equal `forward` of the whole clip.

        Raises:
            ConfigError: the convolution is not causal, so its outputs would have to wait for the next chunk.
        """
        if not self.causal:
            raise ConfigError("only a causal convolution can stream: this one was built with causal=False and looks ahead.")
        x = self._pad(x) if cache is None else torch.cat([cache, x], dim=2)
        kernel, stride = self.kernel_size[0], self.stride[0]
        num_outputs = (x.shape[2] - kernel) // stride + 1
        if num_outputs <= 0:
            return StreamOutput(self._no_frames(x), x)
        return StreamOutput(super().forward(x), x[:, :, num_outputs * stride :])

    def _pad(self, x: Tensor) -> Tensor:
        extra = self.kernel_size[0] - 1
        if extra == 0:
            return x
        before = extra if self.causal else extra // 2
        first, last = x[:, :, :1].expand(-1, -1, before, -1, -1), x[:, :, -1:].expand(-1, -1, extra - before, -1, -1)
        return torch.cat([first, x, last], dim=2)

    def _no_frames(self, x: Tensor) -> Tensor:
        height, width = (
            (x.shape[dim] + 2 * self.padding[dim - 2] - self.kernel_size[dim - 2]) // self.stride[dim - 2] + 1 for dim in (3, 4)
        )
        return x.new_empty(x.shape[0], self.out_channels, 0, height, width)
