"""Attention over several ranks as one operator that the rest of torch understands.

`torch.ops.videofm.attention` takes tensors, names and numbers, so that `torch.compile` sees one opaque node, `FlopCounterMode`
counts it, and selective activation checkpointing can keep its results: with `MUST_SAVE` the recomputation of a block sends
nothing. Its backward pass is an operator as well.

FLOPs are those of the model: forward `4 * pairs * heads * K` for the query-key pairs that the mask allows and the heads that
this rank computes, backward twice that; ranks add up to the whole. What kernels recompute or mask away is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils.flop_counter import register_flop_formula

from videofm.attention.comm import accumulator_dtype, plan_heads, rank_in
from videofm.attention.layout import SequenceLayout
from videofm.attention.masks import MaskSpec
from videofm.attention.strategies.call import AttentionCall, AttentionResult, Gradients
from videofm.attention.strategies.tiles import positions
from videofm.registry import ATTENTION_BACKENDS, ATTENTION_STRATEGIES, lookup

Shape = Sequence[int]
INNER = 4
"""Where the name of the inner group stands after q, k and v."""
SAVED_WITHOUT_TRADE = 4
"""q, k, v and out."""


class Algorithm(Protocol):
    """Both directions of a strategy, without autograd."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        """q `(B, L, N, K)`, k and v `(B, L, G, K)` of this rank's tokens."""
        ...

    def backward(self, dout: Tensor, saved: Sequence[Tensor], lse: Tensor, num_kv_heads: int, call: AttentionCall) -> Gradients:
        """Gradients for this rank's tokens; see `attention_backward`."""
        ...


def group_name(group: ProcessGroup | None) -> str:
    """The name under which the operator finds `group`; empty for None."""
    return "" if group is None else str(group.group_name)


@torch.library.custom_op("videofm::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strategy: str,
    backend: str,
    layout: str,
    mask: str,
    inner: str,
    outer: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmax attention of a sequence that several ranks share.

    Args:
        q: queries of this rank's tokens `(B, L, N, K)`.
        k: keys `(B, L, G, K)`.
        v: values `(B, L, G, K)`.
        strategy: name in `ATTENTION_STRATEGIES`.
        backend: name in `ATTENTION_BACKENDS`.
        layout: text of the `SequenceLayout`; empty where one rank holds all.
        mask: text of the `MaskSpec`.
        inner: name of the group that trades tokens for heads, or empty.
        outer: name of the group that shares keys and values, or empty.
        scale: of the logits.

    Returns:
        `out`, `lse`, `traded`, `traded_out` of `AttentionResult`; only `out` is differentiable. The last two have no elements
        where the strategy does not trade.
    """
    call = _call(backend, layout, mask, inner, outer, scale)
    with torch.autocast(q.device.type, enabled=False):
        result = _algorithm(strategy).forward(q, k, v, call)
    nothing = (q.new_empty(0), q.new_empty(0))
    traded = nothing if result.traded is None or result.traded_out is None else (result.traded, result.traded_out)
    return result.out, result.lse, *traded


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, strategy: str, backend: str, layout: str, mask: str, inner: str, outer: str, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, num_heads, width = q.shape
    lse_dtype = accumulator_dtype(q.dtype)
    if not inner:
        lse = q.new_empty(batch, num_heads, length, dtype=lse_dtype)
        return q.new_empty(q.shape), lse, q.new_empty(0), q.new_empty(0)
    call = _call(backend, layout, mask, inner, outer, scale)
    heads, kv_heads = plan_heads(num_heads, k.shape[2], call.inner_degree).counts(rank_in(call.inner))
    gathered = sum(call.part_lengths)
    return (
        q.new_empty(q.shape),
        q.new_empty(batch, heads, gathered, dtype=lse_dtype),
        q.new_empty(heads + 2 * kv_heads, batch, gathered, width),
        q.new_empty(batch, gathered, heads, width),
    )


@torch.library.custom_op("videofm::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    saved: list[Tensor],
    lse: Tensor,
    num_kv_heads: int,
    strategy: str,
    backend: str,
    layout: str,
    mask: str,
    inner: str,
    outer: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` for q, k and v.

    Args:
        dout: gradient of `out`.
        saved: q, k, v and out; where tokens were traded for heads, `traded` and `traded_out`.
        lse: as `attention` gave it.
        num_kv_heads: G, of k and v.
        strategy: this and the rest as for `attention`.
        backend: see there.
        layout: see there.
        mask: see there.
        inner: see there.
        outer: see there.
        scale: see there.
    """
    call = _call(backend, layout, mask, inner, outer, scale)
    with torch.autocast(dout.device.type, enabled=False):
        grads = _algorithm(strategy).backward(dout, saved, lse, num_kv_heads, call)
    dq, dk, dv = _apart(grads.dq, grads.dk, grads.dv)
    return dq, dk, dv


@attention_backward.register_fake
def _(dout: Tensor, saved: list[Tensor], lse: Tensor, num_kv_heads: int, *names: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, _, width = dout.shape
    if len(saved) == SAVED_WITHOUT_TRADE:
        length = saved[1].shape[1]
    dk, dv = (dout.new_empty(batch, length, num_kv_heads, width) for _ in range(2))
    return dout.new_empty(dout.shape), dk, dv


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *ctx.names = inputs
    out, lse, traded, traded_out = output
    ctx.num_kv_heads = k.shape[2]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, traded, traded_out)
    has_traded = bool(ctx.names[INNER])
    ctx.save_for_backward(lse, *((traded, traded_out) if has_traded else (q, k, v, out)))


def _backward(ctx: Any, dout: Tensor | None, *rest: None) -> tuple[Any, ...]:
    nothing = (None,) * len(ctx.names)
    if dout is None:
        return None, None, None, *nothing
    lse, *saved = ctx.saved_tensors
    return *torch.ops.videofm.attention_backward(dout, saved, lse, ctx.num_kv_heads, *ctx.names), *nothing


attention.register_autograd(_backward, setup_context=_setup_context)


def _apart(*tensors: Tensor) -> list[Tensor]:
    """`tensors` in storages of their own, as results of an operator must be; strategies and kernels may share one."""
    seen: set[int] = set()
    result = []
    for x in tensors:
        storage = x.untyped_storage()._cdata
        result.append(x.clone() if storage in seen else x)
        seen.add(storage)
    return result


def _algorithm(strategy: str) -> Algorithm:
    algorithm: Algorithm = lookup(ATTENTION_STRATEGIES, strategy, "attention strategy")
    return algorithm


def _call(backend: str, layout: str, mask: str, inner: str, outer: str, scale: float) -> AttentionCall:
    return AttentionCall(
        lookup(ATTENTION_BACKENDS, backend, "attention backend"),
        MaskSpec.from_text(mask),
        scale,
        SequenceLayout.from_text(layout) if layout else None,
        _resolve_process_group(inner) if inner else None,
        _resolve_process_group(outer) if outer else None,
    )


@register_flop_formula(torch.ops.videofm.attention)
def _forward_flops(q: Shape, k: Shape, v: Shape, strategy: str, *names: Any, **kwargs: Any) -> int:
    return _flops(q, k[1], k[2], _call(*names))


@register_flop_formula(torch.ops.videofm.attention_backward)
def _backward_flops(
    dout: Shape, saved: list[Shape], lse: Shape, num_kv_heads: int, strategy: str, *names: Any, **kwargs: Any
) -> int:
    num_keys = saved[1][1] if len(saved) == SAVED_WITHOUT_TRADE else dout[1]
    return 2 * _flops(dout, num_keys, num_kv_heads, _call(*names))


def _flops(q: Shape, num_keys: int, num_kv_heads: int, call: AttentionCall) -> int:
    batch, num_queries, num_heads, width = q
    if call.layout is None:
        queries, keys = torch.arange(num_queries), torch.arange(num_keys)
    else:
        queries, keys = positions(call.layout, call.inner_degree, call.outer_rank), torch.arange(call.layout.length)
    heads, _ = plan_heads(num_heads, num_kv_heads, call.inner_degree).counts(rank_in(call.inner))
    return 4 * call.mask.num_pairs_between(queries, keys, batch) * heads * width
