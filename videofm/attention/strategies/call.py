"""One attention call as a strategy sees it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.distributed import ProcessGroup

from videofm.attention.api import AttentionBackend
from videofm.attention.comm import degree, rank_in
from videofm.attention.layout import SequenceLayout
from videofm.attention.masks import MaskSpec


@dataclass(frozen=True)
class AttentionCall:
    """What is computed, and with whom.

    The parts of `layout` form a grid: `outer` degree blocks of `inner` degree consecutive parts. The ranks of `inner` hold one
    block and trade its tokens for heads; the ranks of `outer` pass blocks of keys and values on. Either may be None, a degree
    of one. `layout` is None where one rank holds everything.
    """

    backend: AttentionBackend
    mask: MaskSpec
    scale: float
    layout: SequenceLayout | None = None
    inner: ProcessGroup | None = None
    outer: ProcessGroup | None = None

    @cached_property
    def inner_degree(self) -> int:
        """Parts of a block."""
        return degree(self.inner)

    @cached_property
    def outer_degree(self) -> int:
        """Blocks."""
        return degree(self.outer)

    @cached_property
    def outer_rank(self) -> int:
        """The block of this rank."""
        return rank_in(self.outer)

    @cached_property
    def part(self) -> int:
        """The part of the layout that this rank holds."""
        return self.outer_rank * self.inner_degree + rank_in(self.inner)

    @property
    def part_lengths(self) -> tuple[int, ...]:
        """Tokens of the parts of this rank's block."""
        assert self.layout is not None
        return self.layout.lengths[self.outer_rank * self.inner_degree :][: self.inner_degree]

    @property
    def block_lengths(self) -> tuple[int, ...]:
        """Tokens of each block."""
        assert self.layout is not None
        lengths, size = self.layout.lengths, self.inner_degree
        return tuple(sum(lengths[start : start + size]) for start in range(0, len(lengths), size))


@dataclass(frozen=True)
class AttentionResult:
    """What a strategy computed, and what its backward pass needs.

    `out` `(B, L, N, K)` belongs to the tokens of this rank. `lse` `(B, n, L')` belongs to the heads and queries that this rank
    computed. Where tokens were traded for heads, `traded` `(heads of q, k and v, B, L', K)` and `traded_out` `(B, L', n, K)`
    are kept in place of q, k, v and out, so that the backward pass need not trade them again; else both are None.
    """

    out: Tensor
    lse: Tensor
    traded: Tensor | None = None
    traded_out: Tensor | None = None


@dataclass(frozen=True)
class Gradients:
    """Gradients of q, k and v, each of the shape of its tensor."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
