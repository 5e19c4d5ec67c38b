"""Attention by its definition, in float32: the reference that the others are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from videofm.attention.api import AttentionSpec


class MathBackend:
    """Logits, softmax and sum, written out."""

    name = "math"

    def supports(self, spec: AttentionSpec) -> str | None:
        """Everything; it is slow and stores all logits."""
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q, k, v `(B, L, N, K)` -> `(B, L, N, K)`; see `AttentionBackend`."""
        logits = torch.einsum("bqnk,bsnk->bnqs", q.float(), k.float()) * q.shape[-1] ** -0.5
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        return torch.einsum("bnqs,bsnk->bqnk", logits.softmax(dim=-1), v.float()).to(v.dtype)


BACKEND = MathBackend()
