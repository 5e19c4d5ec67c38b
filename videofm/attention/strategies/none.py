"""Every process holds whole sequences: the backend as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.distributed import ProcessGroup

from videofm.attention.api import AttentionBackend, AttentionSpec
from videofm.attention.merge import BlockOutput
from videofm.attention.strategies import blocks
from videofm.attention.strategies.base import Strategy
from videofm.attention.strategies.call import AttentionCall, AttentionResult, Gradients
from videofm.attention.strategies.place import SequencePlace
from videofm.attention.strategies.tiles import Tile, block_tiles, whole_tiles

if TYPE_CHECKING:
    from videofm.types import AttentionFn


class NoStrategy(Strategy):
    """Attention on one rank; as an operator, also the middle of Ulysses."""

    name = "none"

    def refuse(self, spec: AttentionSpec, context_degree: int, ulysses_degree: int) -> str | None:
        """Nothing: calls that each rank serves alone, such as those to a text, stay so whatever is shared."""
        return None

    def wrap(
        self,
        backend: AttentionBackend,
        place: SequencePlace | None = None,
        spec: AttentionSpec | None = None,
        opaque: bool = False,
    ) -> AttentionFn:
        """`backend` itself, or with `opaque` as one operator, see `Strategy.wrap`. `place` and `spec` are not needed."""
        return super().wrap(backend, SequencePlace(), spec, opaque)

    def groups(self, place: SequencePlace) -> tuple[ProcessGroup | None, ProcessGroup | None]:
        """None and None."""
        return None, None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> AttentionResult:
        """All queries to all keys."""
        output = blocks.forward(q, k, v, _tiles(q, k, call), call)
        return AttentionResult(output.out, output.lse)

    def backward(self, dout: Tensor, saved: Sequence[Tensor], lse: Tensor, num_kv_heads: int, call: AttentionCall) -> Gradients:
        """Gradients for all queries and keys; `saved` is q, k, v and out."""
        q, k, v, out = saved
        return blocks.backward(dout, q, k, v, BlockOutput(out, lse), _tiles(q, k, call), call)


def _tiles(q: Tensor, k: Tensor, call: AttentionCall) -> tuple[Tile, ...]:
    if call.layout is None:
        return whole_tiles(call.mask, q.shape[1], k.shape[1], q.device)
    return block_tiles(call.mask, call.layout, call.inner_degree, call.outer_rank, None, q.device)


STRATEGY = NoStrategy()
wrap = STRATEGY.wrap
