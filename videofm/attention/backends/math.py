"""Attention by its definition, in float32 or better: the reference that the others are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from videofm.attention.api import AttentionSpec
from videofm.attention.backends.shared import accumulation_type, additive, expand_heads, sum_heads
from videofm.attention.masks import MaskSpec
from videofm.attention.merge import BlockOutput
from videofm.attention.whole import attend_whole


class MathBackend:
    """Logits, softmax and sum, written out."""

    name = "math"
    supports_lse = True
    supports_mask = True

    def supports(self, spec: AttentionSpec) -> str | None:
        """Everything; it is slow and stores all logits."""
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | MaskSpec | None = None) -> Tensor:
        """q `(B, Lq, N, K)`, k and v `(B, Lk, G, K)` -> like q; see `AttentionBackend`."""
        if isinstance(mask, MaskSpec):
            return attend_whole(self.__call__, q, k, v, mask)
        return self.forward(q, k, v, mask, q.shape[-1] ** -0.5).out

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> BlockOutput:
        """See `AttentionBackend`; differentiable here."""
        logits = _logits(q, k, mask, scale)
        if not logits.shape[-1]:
            return BlockOutput(torch.zeros_like(q), logits.sum(dim=-1) - torch.inf)
        maximum = logits.detach().amax(dim=-1, keepdim=True)
        maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
        weights = (logits - maximum).exp()
        total = weights.sum(dim=-1, keepdim=True)
        weights = weights / total.masked_fill(total == 0, 1.0)
        out = torch.einsum("bnqs,bsnk->bqnk", weights, expand_heads(v, q.shape[2]).to(weights.dtype))
        return BlockOutput(out.to(q.dtype), (total.log() + maximum).squeeze(-1))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `AttentionBackend`: with weights p, `dv = p^T dout` and `d(logits) = p (dout v^T - rowsum(dout out))`."""
        dtype, num_heads, num_kv_heads = accumulation_type(q), q.shape[2], k.shape[2]
        dout = dout.to(dtype)
        weights = (_logits(q, k, mask, scale) - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
        delta = torch.einsum("bqnk,bqnk->bnq", dout, out.to(dtype))
        dweights = torch.einsum("bqnk,bsnk->bnqs", dout, expand_heads(v, num_heads).to(dtype))
        dlogits = weights * (dweights - delta[..., None]) * scale
        dq = torch.einsum("bnqs,bsnk->bqnk", dlogits, expand_heads(k, num_heads).to(dtype))
        dk = sum_heads(torch.einsum("bnqs,bqnk->bsnk", dlogits, q.to(dtype)), num_kv_heads)
        dv = sum_heads(torch.einsum("bnqs,bqnk->bsnk", weights, dout), num_kv_heads)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _logits(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """`(B, N, Lq, Lk)`, -inf where masked."""
    dtype = accumulation_type(q)
    logits = torch.einsum("bqnk,bsnk->bnqs", q.to(dtype), expand_heads(k, q.shape[2]).to(dtype)) * scale
    return logits if mask is None else logits + additive(mask, dtype)


BACKEND = MathBackend()
