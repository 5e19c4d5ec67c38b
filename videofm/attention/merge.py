"""Attention to keys in pieces: partial results and how two of them become one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockOutput:
    """Attention of queries to some of the keys.

    `out` `(B, Lq, N, K)` is normalised over these keys, and `lse` `(B, N, Lq)` is the natural logarithm of the sum of the
    exponentials of their logits: float32, or float64 for float64. A row that sees none of them has out 0 and lse -inf.
    """

    out: Tensor
    lse: Tensor


def merge(out: Tensor, lse: Tensor, out_j: Tensor, lse_j: Tensor) -> BlockOutput:
    """Attention to the keys of two disjoint blocks, from the attention to each.

    Each output is weighted by its share of the sum of exponentials. Any order of merging gives the same up to rounding, a block
    of which a row sees nothing does not change it, and a row that sees nothing of either stays at out 0, lse -inf.

    Args:
        out: attention of the queries to the first block, `(B, Lq, N, K)`.
        lse: `(B, N, Lq)`.
        out_j: attention of the same queries to the second block.
        lse_j: like `lse`.

    Returns:
        both fields in the type of `lse`, whatever that of `out`: round to the model's type once, after the last merge.
    """
    maximum = torch.maximum(lse, lse_j)
    maximum = maximum.masked_fill(maximum == -torch.inf, 0.0)
    weight, weight_j = (lse - maximum).exp(), (lse_j - maximum).exp()
    total = weight + weight_j
    divisor = total.masked_fill(total == 0, 1.0)
    share, share_j = ((x / divisor).transpose(1, 2)[..., None] for x in (weight, weight_j))  # (B, N, Lq) -> (B, Lq, N, 1)
    return BlockOutput(out.to(total.dtype) * share + out_j.to(total.dtype) * share_j, maximum + total.log())
