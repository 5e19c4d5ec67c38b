"""A 3D convolution over whole clips, or over the chunks of one with an explicit cache.

Streaming (Wan2.1, arXiv 2503.20314; spec E): the first chunk is padded in front, every later chunk is prefixed with what the
previous one left over. With padded length T', kernel k and stride s there are `n = floor((T' - k) / s) + 1` outputs, and the
last `T' - n * s` frames are the tail that the next chunk needs. The cache is an argument: a module keeps none.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d, pad

from videofm.errors import ConfigError

TimePadding = Literal["repeat", "zeros"]
SpacePadding = Literal["same", "end", "replicate"]


class ChunkCache:
    """What the layers of a causal network keep of the chunks of one clip so far: the last input frames of each.

    A network gets the cache of a chunk and fills it; `following()` is the cache to pass with the next chunk, and leaves this
    one as it is, so that a clip can go on twice from one point.

    Attributes:
        is_first: whether the chunk is the first of its clip.
        tails: input frames `(B, C, T, H, W)` by layer.
        shared: what all chunks of the clip have in common, set with the first (noise that a decoder injects).
    """

    def __init__(
        self,
        is_first: bool = True,
        tails: dict[nn.Module, Tensor] | None = None,
        shared: dict[str, Any] | None = None,
    ) -> None:
        self.is_first = is_first
        self.tails = tails or {}
        self.shared = shared or {}

    def following(self) -> ChunkCache:
        """The cache for the chunk after this one."""
        return ChunkCache(False, dict(self.tails), dict(self.shared))


class CausalConv3d(nn.Conv3d):
    """Conv3d over `(B, C, T, H, W)` whose padding in time is chosen, and which can stream when it looks back only.

    Args:
        in_channels, out_channels: as in Conv3d.
        kernel_size: one odd number for all axes, or (time, height, width).
        stride: (time, height, width).
        causal: pad time in front only, by `k - 1` frames, so that an output sees no later frame. Otherwise `(k - 1) / 2` frames
            on both sides.
        time_padding: `repeat` the first (and last) frame, or `zeros`.
        space_padding: `same` is `k // 2` zeros on all sides, `end` is one row and column of zeros at bottom and right (the
            strided convolutions of Stable Diffusion's VAE), `replicate` repeats the border by `k // 2`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int] = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
        causal: bool = True,
        time_padding: TimePadding = "repeat",
        space_padding: SpacePadding = "same",
    ) -> None:
        kernel = (kernel_size,) * 3 if isinstance(kernel_size, int) else kernel_size
        assert all(size % 2 == 1 for size in kernel), "an even kernel has no centre"
        inside = (kernel[1] // 2, kernel[2] // 2) if space_padding == "same" else (0, 0)
        super().__init__(in_channels, out_channels, kernel, stride, padding=(0, *inside))
        self.causal, self.time_padding, self.space_padding = causal, time_padding, space_padding

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """Output frames of a clip, or those that a chunk completes (possibly none); outputs of chunks, concatenated, are those
        of the clip.

        Raises:
            ConfigError: a cache for a convolution that is not causal, whose outputs would have to wait for the next chunk.
        """
        if cache is None:
            return self._convolve(self._pad_time(x))
        if not self.causal:
            raise ConfigError("only a causal convolution can stream: this one was built with causal=False and looks ahead.")
        x = self._pad_time(x) if cache.is_first else torch.cat([cache.tails[self], x], dim=2)
        num_outputs = (x.shape[2] - self.kernel_size[0]) // self.stride[0] + 1
        # A copy: a view would keep the whole padded chunk in memory.
        cache.tails[self] = x[:, :, max(0, num_outputs) * self.stride[0] :].clone()
        return self._convolve(x) if num_outputs > 0 else self._no_frames(x)

    def _convolve(self, x: Tensor) -> Tensor:
        x = self._pad_space(x)
        if _aten_is_slow(x):
            return _OneDnnConvolution.apply(x, self.weight, self.bias, self.stride, self.padding)
        return conv3d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]

    def _pad_time(self, x: Tensor) -> Tensor:
        extra = self.kernel_size[0] - 1
        if extra == 0:
            return x
        before = extra if self.causal else extra // 2
        if self.time_padding == "zeros":
            return pad(x, (0, 0, 0, 0, before, extra - before))
        return _RepeatEnds.apply(x, before, extra - before)

    def _pad_space(self, x: Tensor) -> Tensor:
        if self.space_padding == "end":
            return pad(x, (0, 1, 0, 1))
        if self.space_padding == "replicate":
            height, width = self.kernel_size[1] // 2, self.kernel_size[2] // 2
            return pad(x, (width, width, height, height, 0, 0), mode="replicate")
        return x

    def _no_frames(self, x: Tensor) -> Tensor:
        one = self._pad_space(x[:, :, :1])
        height, width = (
            (one.shape[dim] + 2 * int(self.padding[dim - 2]) - self.kernel_size[dim - 2]) // self.stride[dim - 2] + 1
            for dim in (3, 4)
        )
        return x.new_empty(x.shape[0], self.out_channels, 0, height, width)


class _RepeatEnds(torch.autograd.Function):
    """`x` `(B, C, T, H, W)` with `before` copies of its first frame in front and `after` of its last behind.

    It has its own gradient because that of a `cat` of slices fills a clip with zeros for each slice, and adds them all.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, before: int, after: int) -> Tensor:
        ctx.before, ctx.after = before, after
        first, last = x[:, :, :1].expand(-1, -1, before, -1, -1), x[:, :, -1:].expand(-1, -1, after, -1, -1)
        return torch.cat([first, x, last], dim=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        end = grad.shape[2] - ctx.after
        inner = grad[:, :, ctx.before : end].clone()
        inner[:, :, 0] += grad[:, :, : ctx.before].sum(dim=2)
        inner[:, :, -1] += grad[:, :, end:].sum(dim=2)
        return inner, None, None


def _aten_is_slow(x: Tensor) -> bool:
    """Whether aten (torch 2.13, `ConvParams::use_mkldnn`) gives `x` to `slow_conv3d`, 1.5 to 6 times slower than oneDNN: one
    sample in float32 whose B * C * T * H is at most 20480. The limit is where aten changes over by itself.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[0] == 1
        and x.shape[:4].numel() <= 20480
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
    )


class _OneDnnConvolution(torch.autograd.Function):
    """conv3d by oneDNN, forwards and backwards, whatever the size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.bias_shape = stride, padding, None if bias is None else list(bias.shape)
        return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        grad = grads[0]
        if not torch.is_grad_enabled():  # no second derivative is asked for, which oneDNN lacks
            grad, x = grad.to_mkldnn(), x.to_mkldnn()
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, ctx.bias_shape, ctx.stride, ctx.padding, (1, 1, 1), False, (0, 0, 0), 1, needed
        )
        return *(g.to_dense() if g is not None and g.is_mkldnn else g for g in found), None, None
