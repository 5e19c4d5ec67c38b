"""Norms that look at one position only, so that no frame sees another. They reduce in float32 and keep the dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm as rms_norm_function


def pixel_norm(x: Tensor, eps: float = 1e-8) -> Tensor:
    """`x / sqrt(mean over channels of x^2 + eps)` for `x` `(B, C, ...)` (Karras et al. 2017; as diffusers does it in LTX)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)).to(x.dtype)


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
