"""A 3D convolution over whole clips, or over the chunks of one with an explicit cache.

Streaming (Wan2.1, arXiv 2503.20314; spec E): the first chunk is padded in front, every later chunk is prefixed with what the
previous one left over. With padded length T', kernel k and stride s there are `n = floor((T' - k) / s) + 1` outputs, and the
last `T' - n * s` frames are the tail that the next chunk needs. The cache is an argument: a module keeps none.

Layers ask the cache for what they need of the rest of the clip. Of a stream that is the past; where the chunks of a clip are
computed at the same time by several processes (`videofm.models.vae.parallelize`) it is the rest, and nothing is out of reach.
"""

from __future__ import annotations

from dataclasses import dataclass
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

    def padded(self, conv: CausalConv3d, x: Tensor) -> Tensor:
        """`x`, the input of `conv`, with all frames that its outputs see: of the chunks before, or padding.

        Raises:
            ConfigError: `conv` looks ahead, so that its outputs would have to wait for the next chunk.
        """
        if not conv.causal:
            raise ConfigError("only a causal convolution can stream: this one was built with causal=False and looks ahead.")
        x = conv.pad_time(x, *conv.reach) if self.is_first else torch.cat([self.tails[conv], x], dim=2)
        num_outputs = (x.shape[2] - conv.kernel_size[0]) // conv.stride[0] + 1
        # A copy: a view would keep the whole padded chunk in memory.
        self.tails[conv] = x[:, :, max(0, num_outputs) * conv.stride[0] :].clone()
        return x

    def around(self, layer: nn.Module, x: Tensor, before: int, after: int) -> Surrounded:
        """`x`, the input of `layer`, with so many frames before and after it, fewer at the ends of the clip.

        Raises:
            ConfigError: this is a stream, in which later frames are not there yet.
        """
        raise ConfigError(f"{type(layer).__name__} looks at later frames, so it cannot stream.")

    def whole(self, layer: nn.Module, x: Tensor) -> Tensor:
        """All frames of the clip of which `x`, the input of `layer`, are some. Raises as `around`."""
        raise ConfigError(f"{type(layer).__name__} looks at all frames, so it cannot stream.")

    def of_all_chunks(self, values: Tensor) -> Tensor:
        """`values`, of one shape for every chunk, of all chunks of the clip: `(P, ...)`. Raises as `around`."""
        raise ConfigError("a norm over the clip needs all its frames, so it cannot stream.")


@dataclass(frozen=True)
class Surrounded:
    """Frames of a chunk with their neighbours, `num_before` of them in front."""

    frames: Tensor
    num_before: int


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

    @property
    def reach(self) -> tuple[int, int]:
        """How many frames before and after the one it stands at an output sees."""
        extra = self.kernel_size[0] - 1
        return (extra, 0) if self.causal else (extra // 2, extra // 2)

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """Output frames of a clip, or those that a chunk completes (possibly none); outputs of chunks, concatenated, are those
        of the clip.

        Raises:
            ConfigError: the cache of a stream for a convolution that looks ahead.
        """
        x = self.pad_time(x, *self.reach) if cache is None else cache.padded(self, x)
        if (missing := self.kernel_size[0] - x.shape[2]) > 0:
            # No output, but one that hangs on the input: ranks that share a clip walk through one graph.
            return self._convolve(torch.cat([x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])], dim=2))[:, :, :0]
        return self._convolve(x)

    def pad_time(self, x: Tensor, before: int, after: int) -> Tensor:
        """`x` with so many frames in front and behind: repeated, or zeros."""
        if before == after == 0:
            return x
        if self.time_padding == "zeros":
            return pad(x, (0, 0, 0, 0, before, after))
        return _RepeatEnds.apply(x, before, after)

    def _convolve(self, x: Tensor) -> Tensor:
        x = self._pad_space(x)
        if _aten_is_slow(x):
            return _OneDnnConvolution.apply(x, self.weight, self.bias, self.stride, self.padding)
        return conv3d(x, self.weight, self.bias, self.stride, self.padding)  # type: ignore[arg-type]

    def _pad_space(self, x: Tensor) -> Tensor:
        if self.space_padding == "end":
            return pad(x, (0, 1, 0, 1))
        if self.space_padding == "replicate":
            height, width = self.kernel_size[1] // 2, self.kernel_size[2] // 2
            return pad(x, (width, width, height, height, 0, 0), mode="replicate")
        return x


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
