"""xFormers' memory-efficient attention, for CUDA; takes additive masks."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from videofm.attention.api import AttentionSpec

MASK_ALIGNMENT = 8


class XformersBackend:
    """Wraps `xformers.ops.memory_efficient_attention`; the package is imported at the first call."""

    name = "xformers"

    def supports(self, spec: AttentionSpec) -> str | None:
        """The kernel's limits, in words."""
        if importlib.util.find_spec("xformers") is None:
            return "the package is not installed (pip install videofm[gpu])."
        if spec.device_type != "cuda":
            return f"it runs on cuda only, not on {spec.device_type} (use sdpa)."
        if spec.head_width % 8:
            return f"head width {spec.head_width} is not a multiple of 8 (use sdpa)."
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q, k, v `(B, L, N, K)` -> `(B, L, N, K)`; see `AttentionBackend`."""
        bias = None if mask is None else _additive(mask, q, k)
        return importlib.import_module("xformers.ops").memory_efficient_attention(q, k, v, attn_bias=bias)


def _additive(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask as a full `(B, N, Lq, Lk)` bias in the dtype of q; its rows start at multiples of 8, as the kernel asks."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)
    batch, num_queries, num_heads, _ = q.shape
    num_keys = k.shape[1]
    padded = -(-num_keys // MASK_ALIGNMENT) * MASK_ALIGNMENT
    bias = q.new_zeros(batch, num_heads, num_queries, padded)[..., :num_keys]
    return bias.copy_(mask)


BACKEND = XformersBackend()
