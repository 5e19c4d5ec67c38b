"""Ring attention (arXiv 2310.01889): queries stay, blocks of keys and values go round, partial results are merged.

The next block is on its way while this one is computed. Blocks that nobody on this rank sees are passed on all the same: every
rank sends as often as its neighbours expect. A rank keeps only its own keys and values for the backward pass, where blocks go
round again and take their gradients along, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from videofm.attention.comm import Exchange
from videofm.attention.merge import BlockOutput
from videofm.attention.strategies import blocks, none
from videofm.attention.strategies.base import Strategy
from videofm.attention.strategies.call import AttentionCall, AttentionResult, Gradients
from videofm.attention.strategies.place import SequencePlace
from videofm.attention.strategies.tiles import Tile, block_tiles


class RingStrategy(Strategy):
    """Keys and values go round the ranks that share a sequence."""

    name = "ring"

    def groups(self, place: SequencePlace) -> tuple[ProcessGroup | None, ProcessGroup | None]:
        """All ranks that share a sequence form the ring."""
        return None, place.context

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        """`degree - 1` exchanges of k and v."""
        if call.outer is None or call.outer_degree == 1:
            return none.STRATEGY.forward(q, k, v, call)
        accumulator = blocks.Accumulator(q)
        block = torch.stack((k, v))  # (2, B, L, G, K)
        for step in range(call.outer_degree):
            coming = _start(block, step, call)
            accumulator.add(_tiles(q, step, call), block[0], block[1], call)
            block = coming.wait() if coming else block
        output = accumulator.result()
        return AttentionResult(output.out, output.lse)

    def backward(self, dout: Tensor, saved: Sequence[Tensor], lse: Tensor, num_kv_heads: int, call: AttentionCall) -> Gradients:
        """`degree - 1` exchanges of k and v, and `degree` of their gradients, which end at home."""
        if call.outer is None or call.outer_degree == 1:
            return none.STRATEGY.backward(dout, saved, lse, num_kv_heads, call)
        q, k, v, out = saved
        block = torch.stack((k, v))  # (2, B, L, G, K)
        dq = blocks.zeros(q, k, v).dq
        arriving: Exchange | None = None
        for step in range(call.outer_degree):
            coming = _start(block, step, call)
            fresh = torch.zeros(block.shape, dtype=dq.dtype, device=q.device)
            total = Gradients(dq, fresh[0], fresh[1])
            blocks.add_gradients(total, dout, q, block[0], block[1], BlockOutput(out, lse), _tiles(q, step, call), call)
            if arriving:  # what the ranks before added to the gradient of this block; it travelled while this one computed
                fresh += arriving.wait()
            arriving = Exchange(fresh, _shape(fresh, step + 1, call), call.outer)
            block = coming.wait() if coming else block
        assert arriving is not None, "a ring has two ranks or more"
        dk, dv = arriving.wait().unbind()
        return Gradients(dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))


def _source(step: int, call: AttentionCall) -> int:
    """Whose block is here at `step`."""
    return (call.outer_rank - step) % call.outer_degree


def _shape(block: Tensor, step: int, call: AttentionCall) -> list[int]:
    """Of the block that is here at `step`."""
    kind, batch, _, num_heads, width = block.shape
    return [kind, batch, call.block_lengths[_source(step, call)], num_heads, width]


def _start(block: Tensor, step: int, call: AttentionCall) -> Exchange | None:
    """Pass `block` on and fetch the next, unless this is the last."""
    assert call.outer is not None
    return Exchange(block, _shape(block, step + 1, call), call.outer) if step + 1 < call.outer_degree else None


def _tiles(q: Tensor, step: int, call: AttentionCall) -> tuple[Tile, ...]:
    assert call.layout is not None
    return block_tiles(call.mask, call.layout, call.inner_degree, call.outer_rank, _source(step, call), q.device)


STRATEGY = RingStrategy()
