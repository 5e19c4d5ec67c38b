"""FlashAttention 2 (Dao 2023, the `flash-attn` package), for CUDA in half precision and without masks."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from videofm.attention.api import AttentionSpec

MAX_HEAD_WIDTH = 256


class FlashAttnBackend:
    """Wraps `flash_attn.flash_attn_func`; the package is imported at the first call."""

    name = "flash_attn"

    def supports(self, spec: AttentionSpec) -> str | None:
        """The kernel's limits, in words."""
        if importlib.util.find_spec("flash_attn") is None:
            return "the package is not installed (pip install videofm[gpu])."
        if spec.device_type != "cuda":
            return f"it runs on cuda only, not on {spec.device_type} (use sdpa)."
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"it needs float16 or bfloat16, not {spec.dtype} (use sdpa, or train in bf16)."
        if spec.head_width > MAX_HEAD_WIDTH or spec.head_width % 8:
            return f"head width {spec.head_width} is not a multiple of 8 up to {MAX_HEAD_WIDTH} (use sdpa)."
        if spec.has_mask:
            return "it takes no mask (use sdpa or xformers for this call)."
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q, k, v `(B, L, N, K)` -> `(B, L, N, K)`; `mask` must be None."""
        assert mask is None, "supports() refuses masks"
        return importlib.import_module("flash_attn").flash_attn_func(q, k, v)


BACKEND = FlashAttnBackend()
