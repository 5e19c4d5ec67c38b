"""RMS norm of queries and keys, then rotary positions: one kernel on a GPU, the two operations one after the other elsewhere.

A training step of a transformer spends more time moving queries and keys through memory for these than on their arithmetic.
The kernel reads each of them once and writes it once; it computes in float32 throughout, where the two operations round
to the dtype of the input in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from torch import Tensor, nn

from videofm.ops.norm import RMSNorm
from videofm.ops.rope import RotaryTable, rotate, rotate_halves

Pairs = Literal["adjacent", "halves"]
"""Which channels are turned together: those of `ops.rope.rotate`, or those of `ops.rope.rotate_halves`."""

_HAS_TRITON = find_spec("triton") is not None


@dataclass(frozen=True)
class QueriesAndKeys:
    """Queries and keys of one shape."""

    q: Tensor
    k: Tensor


def qk_norm_rope(
    q: Tensor, k: Tensor, q_norm: nn.Module, k_norm: nn.Module, table: RotaryTable, pairs: Pairs
) -> QueriesAndKeys:
    """Queries and keys, each normalised and then rotated; dtypes stay.

    On a GPU where triton is installed, and where both norms are `RMSNorm` itself, one kernel does it all. A norm of another
    class, one that asks other ranks for the mean square say, is called as the module that it is, and the rotation follows.

    Args:
        q: `(B, L, D)` for adjacent pairs (the norm sees all heads together), `(B, L, N, K)` for halves (one head at a time).
        k: of the shape of `q`.
        q_norm: of the queries, over their last dim.
        k_norm: of the keys.
        table: `(B or 1, L, D)` or `(B or 1, L, 1, K)`; a constant, it gets no gradient.
        pairs: the pairs of channels that are turned.
    """
    if q.is_cuda and _HAS_TRITON and type(q_norm) is RMSNorm and type(k_norm) is RMSNorm:
        return fused(q, k, q_norm, k_norm, table, pairs)
    turn = rotate if pairs == "adjacent" else rotate_halves
    return QueriesAndKeys(turn(q_norm(q), table), turn(k_norm(k), table))


def fused(q: Tensor, k: Tensor, q_norm: RMSNorm, k_norm: RMSNorm, table: RotaryTable, pairs: Pairs) -> QueriesAndKeys:
    """`qk_norm_rope` by the kernel, wherever the tensors are: on the CPU under `TRITON_INTERPRET=1` only."""
    from videofm.ops.kernels.qk_norm_rope import qk_norm_rope as kernel

    halves = pairs == "halves"
    assert q.shape == k.shape and q.dim() == (4 if halves else 3) and q_norm.eps == k_norm.eps is not None
    assert not (table.cos.requires_grad or table.sin.requires_grad), "a rotary table is a constant"
    rows = (x if halves else x.unsqueeze(2) for x in (q, k, table.cos, table.sin))  # (B, L, N, K), where N may be 1
    q_rows, k_rows, cos, sin = rows
    q_out, k_out, _, _ = kernel(q_rows, k_rows, q_norm.weight, k_norm.weight, cos, sin, q_norm.eps, halves)
    return QueriesAndKeys(q_out.view(q.shape), k_out.view(k.shape))
