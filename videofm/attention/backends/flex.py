"""PyTorch's `flex_attention` (Dong et al. 2024): masks by name become block masks, and blocks nobody sees cost nothing.

On CUDA it is compiled once for each form of mask. On the CPU it runs uncompiled, stores all logits and has no gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from einops import reduce
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from videofm.attention.api import AttentionSpec
from videofm.attention.masks import MaskSpec
from videofm.attention.merge import BlockOutput
from videofm.errors import ConfigError

BLOCK = 128
"""Queries and keys of a block of the mask."""
MIN_HEAD_WIDTH = 16


class FlexBackend:
    """Whole sequences under any `MaskSpec`."""

    name = "flex"
    supports_lse = False
    supports_mask = False

    def supports(self, spec: AttentionSpec) -> str | None:
        """The kernel's limits, in words."""
        if spec.has_mask:
            return "it takes masks by name, not as tensors (use sdpa for this call)."
        if spec.needs_lse:
            return "it gives no gradients of partial results, which this strategy merges (use sdpa or flash_attn)."
        if spec.device_type == "cpu":
            return "it has no gradients on cpu (use sdpa)." if spec.needs_grad else None
        if spec.device_type != "cuda":
            return f"it runs on cuda and cpu only, not on {spec.device_type} (use sdpa)."
        if spec.dtype == torch.float64:
            return "it has no float64 on cuda (use math)."
        if spec.head_width < MIN_HEAD_WIDTH:
            return f"its kernel needs a head width of {MIN_HEAD_WIDTH} or more, not {spec.head_width} (use sdpa)."
        return None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | MaskSpec | None = None) -> Tensor:
        """q `(B, L, N, K)`, k and v `(B, L, G, K)` -> like q; see `AttentionBackend`.

        Raises:
            ConfigError: `mask` is a tensor.
            ParallelError: `mask` was not made for these sequences.
        """
        if isinstance(mask, Tensor):
            raise ConfigError("attention backend flex takes masks by name, not as tensors: choose sdpa for this call.")
        if not q.numel() or not k.numel():
            return torch.zeros_like(q)
        blocks = None
        if mask is not None and mask.kind != "full":
            mask.check(k.shape[1], q.shape[0])
            blocks = block_mask(mask, q.shape[1], k.shape[1], q.device)
        shares_heads = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, L, N, K) -> (B, N, L, K)
        attend = _compiled() if q.device.type == "cuda" else flex_attention
        out: Tensor = attend(q, k, v, block_mask=blocks, enable_gqa=shares_heads)
        return out.transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> BlockOutput:
        """Refused: see `supports`."""
        raise ConfigError(f"attention backend flex: {self.supports(AttentionSpec(1, q.shape[-1], needs_lse=True))}")

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Refused: see `supports`."""
        raise ConfigError(f"attention backend flex: {self.supports(AttentionSpec(1, q.shape[-1], needs_lse=True))}")


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@lru_cache(maxsize=8)
def block_mask(mask: MaskSpec, num_queries: int, num_keys: int, device: torch.device) -> BlockMask:
    """`mask` by blocks of `BLOCK x BLOCK`: which are full, which are cut, and a rule for the pairs of the latter.

    Blocks are found by counting the keys that each query sees in each block of keys, without a matrix of `Lq x Lk`.

    Args:
        mask: any kind but `full`.
        num_queries: Lq, from position 0.
        num_keys: Lk, from position 0; for kinds other than `key_padding` as many as queries.
        device: of the result.
    """
    with torch.inference_mode(False):  # what is kept must serve later calls that differentiate
        if mask.is_per_sample:
            end = torch.tensor(mask.lengths, device=device)[:, None].expand(-1, num_queries)
            start = sinks = torch.zeros_like(end)
        else:
            start, end = (bound[None] for bound in mask.intervals(torch.arange(num_queries, device=device)))
            sinks = mask.end_of_sinks(start, end)
        seen = _overlap(start, end, num_keys) + _overlap(torch.zeros_like(sinks), sinks, num_keys)  # (B or 1, Lq, key blocks)
        counts = reduce(pad(seen, (0, 0, 0, -num_queries % BLOCK)), "b (q row) k -> b 1 q k", "sum", row=BLOCK)
        is_full = counts == BLOCK * BLOCK
        cut, full = _listed((counts > 0) & ~is_full), _listed(is_full)
        rule = _rule(start, end, sinks)
        return BlockMask.from_kv_blocks(*cut, *full, BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=(num_queries, num_keys))


def _overlap(start: Tensor, end: Tensor, num_keys: int) -> Tensor:
    """Keys in `[start, end)` `(B, Lq)` by block of keys: `(B, Lq, blocks)`, int32."""
    first = torch.arange(0, num_keys, BLOCK, device=start.device)
    after = (first + BLOCK).clamp(max=num_keys)
    return (torch.minimum(end[..., None], after) - torch.maximum(start[..., None], first)).clamp(min=0).int()


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix of blocks, bool `(B, 1, q, k)`, as the number of them in each row and their indices, these first; int32."""
    return blocks.sum(dim=-1).int(), blocks.int().argsort(dim=-1, descending=True, stable=True).int()


def _rule(start: Tensor, end: Tensor, sinks: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Whether query `i` of sample `b` sees key `j`; bounds are `(B, Lq)`, or `(1, Lq)` for all samples."""
    is_per_sample = start.shape[0] > 1

    def sees(b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        sample = b if is_per_sample else 0
        return ((j >= start[sample, i]) & (j < end[sample, i])) | (j < sinks[sample, i])

    return sees


BACKEND = FlexBackend()
