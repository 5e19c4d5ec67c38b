"""Ulysses (arXiv 2309.14509): ranks trade their tokens for heads, each computes some heads of the whole, and they trade back.

One all-to-all carries q, k and v there and one carries the result back; the backward pass has one of each too. Heads are
independent, so the forward pass computes bitwise what one rank would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from videofm.attention.comm import HeadPlan, accumulator_dtype, plan_heads, rank_in, to_heads, to_tokens
from videofm.attention.strategies import none
from videofm.attention.strategies.base import Strategy
from videofm.attention.strategies.call import AttentionCall, AttentionResult, Gradients
from videofm.attention.strategies.place import SequencePlace


def efficiency(num_heads: int, ulysses_degree: int) -> float:
    """The share of the ranks' time that is used: 1 where the degree divides the heads; 12 heads on 8 ranks use 0.75.

    With more ranks than heads some have nothing to compute. That works, and costs what this number says.
    """
    return num_heads / (ulysses_degree * -(-num_heads // ulysses_degree))


class UlyssesStrategy(Strategy):
    """Tokens for heads among the ranks of a block, around the strategy `inside` for what a block does with the others."""

    name = "ulysses"
    inside: Strategy = none.STRATEGY

    def groups(self, place: SequencePlace) -> tuple[ProcessGroup | None, ProcessGroup | None]:
        """All ranks that share a sequence trade."""
        return place.context, None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        """One all-to-all, attention of this rank's heads, one all-to-all."""
        plan = plan_heads(q.shape[2], k.shape[2], call.inner_degree)
        traded = to_heads((q, k, v), (plan.queries, plan.keys, plan.keys), call.part_lengths, call.inner)
        q_heads, k_heads, v_heads = _split(traded, plan, call)
        result = self.inside.forward(q_heads, _expand(k_heads, plan, call), _expand(v_heads, plan, call), call)
        (out,) = to_tokens((result.out,), (plan.queries,), call.part_lengths, call.inner)
        return AttentionResult(out, result.lse, traded, result.out)

    def backward(self, dout: Tensor, saved: Sequence[Tensor], lse: Tensor, num_kv_heads: int, call: AttentionCall) -> Gradients:
        """One all-to-all, gradients of this rank's heads, one all-to-all; `saved` is `traded` and `traded_out`."""
        traded, out_heads = saved
        plan = plan_heads(dout.shape[2], num_kv_heads, call.inner_degree)
        q_heads, k_heads, v_heads = _split(traded, plan, call)
        k_wide, v_wide = _expand(k_heads, plan, call), _expand(v_heads, plan, call)
        dout_heads = to_heads((dout,), (plan.queries,), call.part_lengths, call.inner).permute(1, 2, 0, 3)  # (B, L, n, K)
        inside = self.inside.backward(dout_heads, (q_heads, k_wide, v_wide, out_heads), lse, k_wide.shape[2], call)
        dk, dv = (_reduce(x, plan, call) for x in (inside.dk, inside.dv))
        grads = to_tokens((inside.dq, dk, dv), (plan.queries, plan.keys, plan.keys), call.part_lengths, call.inner)
        return Gradients(*grads)


def _split(traded: Tensor, plan: HeadPlan, call: AttentionCall) -> tuple[Tensor, ...]:
    """q, k and v `(B, L, n, K)`, views of `(heads of all three, B, L, K)`."""
    heads, kv_heads = plan.counts(rank_in(call.inner))
    return tuple(x.permute(1, 2, 0, 3) for x in traded.split([heads, kv_heads, kv_heads]))


def _expand(x: Tensor, plan: HeadPlan, call: AttentionCall) -> Tensor:
    """Keys or values with one head for each query head, where groups of query heads are cut unevenly; else as they are."""
    index = plan.key_of_query(rank_in(call.inner))
    return x if index is None else x.index_select(2, torch.tensor(index, device=x.device))


def _reduce(dx: Tensor, plan: HeadPlan, call: AttentionCall) -> Tensor:
    """The gradient of `_expand`, summed in float32 at least."""
    rank = rank_in(call.inner)
    index = plan.key_of_query(rank)
    if index is None:
        return dx
    batch, length, _, width = dx.shape
    total = torch.zeros(batch, length, plan.counts(rank)[1], width, dtype=accumulator_dtype(dx.dtype), device=dx.device)
    return total.index_add_(2, torch.tensor(index, device=dx.device), dx.to(total.dtype)).to(dx.dtype)


STRATEGY = UlyssesStrategy()
