"""Norms that look at one position only, so that no frame sees another. They reduce in float32 and keep the dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm as rms_norm_function
from torch.nn.functional import silu

if TYPE_CHECKING:
    from videofm.ops.causal_conv import ChunkCache


def pixel_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    """`x / sqrt(mean over channels of x^2 + eps)` for `x` `(B, C, ...)` (Karras et al. 2017; as diffusers does it in LTX)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)).to(x.dtype)


def pixel_norm_silu(x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """`silu(pixel_norm(x) * (1 + scale) + shift)` for `x` `(B, C, T, H, W)`; shift and scale, both or none, `(B, C, 1, 1, 1)`.

    On CPU it is one function with one buffer: a new tensor costs more than the arithmetic on it, and of the intermediate
    results none is kept for the gradient.
    """
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return _PixelNormSiLU.apply(x, shift, scale, eps)
    x = pixel_norm(x, eps)
    return silu(x if shift is None or scale is None else x * (1 + scale) + shift)


class _PixelNormSiLU(torch.autograd.Function):
    """With r = rsqrt(mean x^2 + eps) and n = x r: y = silu(m), m = n (1 + scale) + shift. Kept are x and r `(B, 1, T, H, W)`.

    Backwards, with g the gradient of m times (1 + scale): that of x is r (g - n mean(n g)) = r g - x r^3 mean(x g).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor | None, scale: Tensor | None, eps: float) -> Tensor:
        y = torch.mul(x, x)
        r = y.mean(dim=1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r, shift, scale)
        return silu(_modulated(x, r, shift, scale, out=y), inplace=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, r, shift, scale = ctx.saved_tensors
        g = _modulated(x, r, shift, scale, out=torch.empty_like(x))
        torch.ops.aten.silu_backward.grad_input(grads[0], g, grad_input=g)
        product = torch.mul(x, g)
        grad_shift = grad_scale = None
        if scale is not None:
            grad_shift = g.sum(dim=(2, 3, 4), keepdim=True)
            grad_scale = product.mul_(r).sum(dim=(2, 3, 4), keepdim=True)
            g.mul_(1 + scale)
            torch.mul(x, g, out=product)
        weight = product.mean(dim=1, keepdim=True).mul_(r).mul_(r).mul_(r)
        g.mul_(r).sub_(torch.mul(x, weight, out=product))
        return g, grad_shift, grad_scale, None


def _modulated(x: Tensor, r: Tensor, shift: Tensor | None, scale: Tensor | None, out: Tensor) -> Tensor:
    torch.mul(x, r, out=out)
    return out if shift is None or scale is None else out.mul_(1 + scale).add_(shift)


def rms_norm(x: Tensor, eps: float = 1e-6, weight: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """`x / sqrt(mean over the last dim of x^2 + eps) * weight + shift` for tokens `(B, L, D)`, in the dtype of `x`.

    On CPU it is one function that keeps only x for the gradient and works in place, as `pixel_norm_silu`.

    Args:
        x: `(..., D)`.
        eps: added to the mean square.
        weight: broadcasts to `x`, as `(D,)` of a layer or `(B, 1, D)` of a sample's noise level; None is 1.
        shift: the same; None is 0.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, weight, shift, eps)
    y = rms_norm_function(x.float(), x.shape[-1:], eps=eps)
    if weight is not None and shift is not None:
        y = torch.addcmul(shift, y, weight)
    elif weight is not None or shift is not None:
        y = y * weight if weight is not None else y + shift
    return y.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """With r = rsqrt(mean x^2 + eps) and n = x r: y = n w + b. Kept are x and r `(..., 1)`.

    Backwards, with g the gradient of y times w: that of x is r (g - n mean(n g)) = r g - x r^3 mean(x g).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
        wide = _wide(x)
        r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r, weight)
        ctx.shift_shape = None if shift is None else shift.shape
        y = wide * r
        if weight is not None:
            y.mul_(weight)
        if shift is not None:
            y.add_(shift)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, r, weight = ctx.saved_tensors
        wide, grad = _wide(x), _wide(grads[0])
        grad_x = grad_weight = grad_shift = None
        if ctx.shift_shape is not None and ctx.needs_input_grad[2]:
            grad_shift = grad.sum_to_size(ctx.shift_shape)
        product = wide * grad
        if weight is not None and ctx.needs_input_grad[1]:
            grad_weight = (product * r).sum_to_size(weight.shape)
        if ctx.needs_input_grad[0]:
            mean = (product if weight is None else product.mul_(weight)).mean(dim=-1, keepdim=True)
            grad_x = grad * r if weight is None else torch.mul(grad, weight, out=product).mul_(r)
            grad_x = grad_x.addcmul_(wide, mean * r**3, value=-1).to(x.dtype)
        return grad_x, grad_weight, grad_shift, None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.RMSNorm):
    """RMSNorm with weights over the last dim, for queries and keys `(B, L, D)`, in float32 also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` -> the same shape and dtype."""
        eps = torch.finfo(torch.float32).eps if self.eps is None else self.eps
        return rms_norm(x, eps, self.weight)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of `(B, C, T, H, W)`, each position by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> the same shape."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)  # (B, C, T, H, W) -> (B, T, H, W, C) and back


class GroupNorm(nn.GroupNorm):
    """GroupNorm of `(B, C, T, H, W)` with statistics over each frame (`frame`) or over the clip (`clip`).

    Over a clip, as most released video VAEs have it, every frame sees every other: such a network is not causal, whatever its
    convolutions do. Per frame nothing crosses time, and one frame gives the same either way.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-6, scope: str = "frame") -> None:
        assert scope in ("frame", "clip"), scope
        super().__init__(num_groups, num_channels, eps)
        self.scope = scope

    def forward(self, x: Tensor, cache: ChunkCache | None = None) -> Tensor:
        """`(B, C, T, H, W)` -> the same shape; with a cache, of one chunk of a clip.

        Raises:
            ConfigError: a norm over the clip, of which a stream has a part only.
        """
        if x.device.type == "cpu":
            # torch 2.13: the backward pass of channels-last input crashes where only the weights need a gradient.
            x = x.contiguous()
        if self.scope == "clip":
            return super().forward(x) if cache is None else self._of_chunk(x, cache)
        frames = x.transpose(1, 2)  # (B, C, T, H, W) -> (B, T, C, H, W)
        return super().forward(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)

    def _of_chunk(self, x: Tensor, cache: ChunkCache) -> Tensor:
        """One chunk, normalised by the clip. Counts, means and variances of chunks are put together, which unlike sums of
        squares loses nothing where the mean is large (Chan et al. 1983).
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide.unflatten(1, (self.num_groups, -1)).flatten(2), dim=2, correction=0)  # (B, G)
        share = torch.full_like(mean, x[0, 0].numel())
        shares, means, variances = cache.of_all_chunks(torch.stack([share, mean, variance])).unbind(dim=1)  # (P, B, G) each
        shares = shares / shares.sum(dim=0)
        mean = (shares * means).sum(dim=0)
        variance = (shares * (variances + (means - mean).square())).sum(dim=0)
        per_channel = x.shape[1] // self.num_groups
        scale = torch.rsqrt(variance + self.eps).repeat_interleave(per_channel, dim=1) * self.weight  # (B, C)
        shift = self.bias - mean.repeat_interleave(per_channel, dim=1) * scale
        return torch.addcmul(_over_frames(shift), wide, _over_frames(scale)).to(x.dtype)


def _over_frames(values: Tensor) -> Tensor:
    return values[:, :, None, None, None]  # (B, C) -> (B, C, 1, 1, 1)
