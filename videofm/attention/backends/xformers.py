"""xFormers' memory-efficient attention, for CUDA; takes masks of any form."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from videofm.attention.api import AttentionSpec
from videofm.attention.backends import shared
from videofm.attention.masks import MaskSpec
from videofm.attention.merge import BlockOutput
from videofm.attention.whole import attend_whole

MASK_ALIGNMENT = 8


class XformersBackend:
    """Wraps functions of `xformers.ops`; the package is imported at the first call."""

    name = "xformers"
    supports_lse = True
    supports_mask = True

    def supports(self, spec: AttentionSpec) -> str | None:
        """The kernel's limits, in words."""
        if importlib.util.find_spec("xformers") is None:
            return "the package is not installed (pip install -c constraints.txt -e '.[gpu]')."
        if spec.device_type != "cuda":
            return f"it runs on cuda only, not on {spec.device_type} (use sdpa)."
        if spec.dtype == torch.float64:
            return "it has no float64 (use math)."
        if spec.head_width % 8:
            return f"head width {spec.head_width} is not a multiple of 8 (use sdpa)."
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | MaskSpec | None = None) -> Tensor:
        """q `(B, Lq, N, K)`, k and v `(B, Lk, G, K)` -> like q; see `AttentionBackend`."""
        if isinstance(mask, MaskSpec):
            return attend_whole(self.__call__, q, k, v, mask, causal=_causal)
        k, v = (shared.expand_heads(x, q.shape[2]) for x in (k, v))
        return _ops().memory_efficient_attention(q, k, v, attn_bias=_bias(mask, q, k))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> BlockOutput:
        """See `AttentionBackend`."""
        if not q.numel() or not k.numel():
            return shared.nothing_seen(q)
        k, v = (shared.expand_heads(x, q.shape[2]) for x in (k, v))
        bias = _bias(mask, q, k)
        out, lse = _ops().memory_efficient_attention_forward_requires_grad(q, k, v, attn_bias=bias, scale=scale)
        return shared.mark_dead(BlockOutput(out, lse[..., : q.shape[1]]), shared.dead_rows(mask))  # rows of lse may be padded

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `AttentionBackend`."""
        if not q.numel() or not k.numel():
            return shared.no_gradients(q, k, v)
        num_kv_heads = k.shape[2]
        k, v = (shared.expand_heads(x, q.shape[2]) for x in (k, v))
        dout, out, lse = dout.to(q.dtype), out.to(q.dtype), shared.finite_lse(lse)
        bias = _bias(mask, q, k)
        dq, dk, dv = _ops().memory_efficient_attention_backward(dout, out, lse, q, k, v, attn_bias=bias, scale=scale)
        return dq, shared.sum_heads(dk, num_kv_heads), shared.sum_heads(dv, num_kv_heads)


def _ops() -> Any:
    return importlib.import_module("xformers.ops")


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (shared.expand_heads(x, q.shape[2]) for x in (k, v))
    return _ops().memory_efficient_attention(q, k, v, attn_bias=_ops().LowerTriangularMask())


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as the kernel asks for it: added to logits, and in the type of q."""
    return None if mask is None else shared.aligned_bias(mask, q, k.shape[1], MASK_ALIGNMENT)


BACKEND = XformersBackend()
