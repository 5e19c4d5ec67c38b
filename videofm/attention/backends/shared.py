"""What backends have in common: blocks without queries or keys, rows that see nothing, heads that share keys, dense masks."""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor

from videofm.attention.merge import BlockOutput


def nothing_seen(q: Tensor) -> BlockOutput:
    """Attention to no keys at all: out 0, lse -inf."""
    batch_size, num_queries, num_heads, _ = q.shape
    lse = q.new_full((batch_size, num_heads, num_queries), -torch.inf, dtype=accumulation_type(q))
    return BlockOutput(torch.zeros_like(q), lse)


def no_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a block that computes nothing."""
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def accumulation_type(q: Tensor) -> torch.dtype:
    """The type of lse and of sums: float32, or float64 for float64."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """Keys or values `(B, L, G, K)`, each head repeated for the query heads that share it -> `(B, L, N, K)`."""
    return x if x.shape[2] == num_heads else x.repeat_interleave(num_heads // x.shape[2], dim=2)


def sum_heads(gradient: Tensor, num_kv_heads: int) -> Tensor:
    """The gradient of `expand_heads`: `(B, L, N, K)` -> `(B, L, G, K)`, summed in float32 or better."""
    if gradient.shape[2] == num_kv_heads:
        return gradient
    return reduce(gradient.to(accumulation_type(gradient)), "b l (g r) k -> b l g k", "sum", g=num_kv_heads).to(gradient.dtype)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to logits, 0 or -inf; a float mask in `dtype`."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def aligned_bias(mask: Tensor, q: Tensor, num_keys: int, alignment: int) -> Tensor:
    """`additive` as `(B, N, Lq, Lk)`; rows start at multiples of `alignment` elements, dims that broadcast stay expanded."""
    bias = additive(mask, q.dtype)
    bias = bias[(None,) * (4 - bias.dim())]
    rows = (*bias.shape[:3], -(-num_keys // alignment) * alignment)
    padded = bias.new_zeros(rows)[..., :num_keys].copy_(bias)
    return padded.expand(q.shape[0], q.shape[2], q.shape[1], num_keys)


def dead_rows(mask: Tensor | None) -> Tensor | None:
    """Rows of a bool mask that see no key, broadcasting to `(B, N, Lq)`; None without a mask.

    What a kernel writes as the lse of such a row differs (0.0, inf or -inf), and 0.0 is also the lse of some live rows: the
    mask knows, the result does not.
    """
    return None if mask is None else ~mask[(None,) * (4 - mask.dim())].any(dim=-1)


def mark_dead(result: BlockOutput, dead: Tensor | None) -> BlockOutput:
    """`result` with out 0 and lse -inf at `dead` rows, whatever the kernel wrote there."""
    if dead is None:
        return result
    out = result.out.masked_fill(dead.transpose(1, 2)[..., None], 0.0)  # (B, N, Lq) -> (B, Lq, N, 1)
    return BlockOutput(out, result.lse.masked_fill(dead, -torch.inf))


def finite_lse(lse: Tensor, dead_value: float = 0.0) -> Tensor:
    """`lse` as kernels want it in backward: contiguous, and `dead_value` where a row sees nothing in the whole softmax.

    With -inf there, a kernel would compute `exp(-inf - -inf)`. Any finite value serves where a mask drops the row;
    FlashAttention has no mask and wants +inf.
    """
    return lse.masked_fill(lse == -torch.inf, dead_value).contiguous()
