"""Norms that look at one position only, so that no frame sees another. They reduce in float32 and keep the dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm as rms_norm_function
from torch.nn.functional import silu


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


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(mean over the last dim of x^2 + eps)` without weights, for tokens `(B, L, D)`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """RMSNorm with weights over the last dim, for queries and keys `(B, L, D)`, in float32 also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` -> the same shape and dtype."""
        return rms_norm_function(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


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

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> the same shape."""
        if x.device.type == "cpu":
            # torch 2.13: the backward pass of channels-last input crashes where only the weights need a gradient.
            x = x.contiguous()
        if self.scope == "clip":
            return super().forward(x)
        frames = x.transpose(1, 2)  # (B, C, T, H, W) -> (B, T, C, H, W)
        return super().forward(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)
