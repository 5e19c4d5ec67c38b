"""All-gather of keys and values (Llama 3, arXiv 2407.21783): queries stay, and every rank gets all keys and values.

The bytes of a ring and the numbers of one rank: one softmax over all keys, nothing to merge. It stores the keys and values of
one layer whole while that layer computes, and gathers them again for the backward pass, which sums their gradients at home.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from videofm.attention.comm import gather_tokens, sum_tokens
from videofm.attention.strategies import none
from videofm.attention.strategies.base import Strategy
from videofm.attention.strategies.call import AttentionCall, AttentionResult, Gradients
from videofm.attention.strategies.place import SequencePlace


class AllGatherStrategy(Strategy):
    """Keys and values to all ranks that share a sequence."""

    name = "allgather_kv"

    def groups(self, place: SequencePlace) -> tuple[ProcessGroup | None, ProcessGroup | None]:
        """All ranks that share a sequence gather."""
        return None, place.context

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        """One gather of k and v, then one attention."""
        return none.STRATEGY.forward(q, *_gather(k, v, call), call)

    def backward(self, dout: Tensor, saved: Sequence[Tensor], lse: Tensor, num_kv_heads: int, call: AttentionCall) -> Gradients:
        """One gather of k and v, and one sum of their gradients over the ranks."""
        q, k, v, out = saved
        grads = none.STRATEGY.backward(dout, (q, *_gather(k, v, call), out), lse, num_kv_heads, call)
        packed = torch.stack((grads.dk, grads.dv)).permute(2, 0, 1, 3, 4)  # (2, B, L, G, K) -> (L, 2, B, G, K)
        dk, dv = sum_tokens(packed, call.block_lengths, call.outer).unbind(1)
        return Gradients(grads.dq, *(x.transpose(0, 1).contiguous() for x in (dk, dv)))  # (L, B, G, K) -> (B, L, G, K)


def _gather(k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """All keys and values `(B, sum of L, G, K)`, in the order of the ranks."""
    packed = torch.stack((k, v)).permute(2, 0, 1, 3, 4)  # (2, B, L, G, K) -> (L, 2, B, G, K): tokens first, ranks in a row
    k, v = (x.transpose(0, 1) for x in gather_tokens(packed, call.block_lengths, call.outer).unbind(1))  # (B, L, G, K)
    return k, v


STRATEGY = AllGatherStrategy()
