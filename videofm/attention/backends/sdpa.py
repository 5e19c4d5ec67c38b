"""PyTorch's `scaled_dot_product_attention`: on every device, with masks, and fused where PyTorch has a kernel."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from videofm.attention.api import AttentionSpec


class SdpaBackend:
    """The default."""

    name = "sdpa"

    def supports(self, spec: AttentionSpec) -> str | None:
        """Everything."""
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q, k, v `(B, L, N, K)` -> `(B, L, N, K)`; see `AttentionBackend`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, L, N, K) -> (B, N, L, K)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


BACKEND = SdpaBackend()
