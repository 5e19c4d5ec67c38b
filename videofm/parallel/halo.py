"""The frames of one clip on several ranks: halos, statistics, taking apart and putting together, each with its gradient.

Rank r of a group holds the frames that follow those of rank r - 1 (spec sequence-parallel, 1.8). Tensors are
`(B, C, T, H, W)`; a `Span` is what a rank holds, or wants, in frames of the clip. Spans are known to all ranks, so each
computes what it sends and receives, nothing is announced, and a collective is entered by all or by none.

Gradients. Outside of a split everything is the same on each rank: tensors, the loss, and gradients of tensors. Inside, a rank
has the gradient of its own frames. So `join` takes the rank's own frames of a gradient (every rank has all of it), and `take`
puts those of all ranks together. Parameters between the two get a part of their gradient on each rank: the parts have to be
SUMMED over the group. Parameters outside get all of it on each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Span(NamedTuple):
    """Frames `start` to `stop`, without `stop`, of a clip."""

    start: int
    stop: int

    @property
    def num_frames(self) -> int:
        """How many."""
        return self.stop - self.start

    def overlap(self, other: Span) -> Span:
        """The frames in both; an empty span where there are none."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))

    def within(self, outer: Span) -> slice:
        """Where these frames are in a tensor of those of `outer`."""
        return slice(self.start - outer.start, self.stop - outer.start)


Spans = tuple[Span, ...]
"""One for each rank of a group."""


def spans_of(counts: Sequence[int]) -> Spans:
    """The spans of ranks that hold so many frames each."""
    return tuple(Span(*pair) for pair in pairwise([0, *accumulate(counts)]))


class ContextRanks:
    """The ranks of `group`, which hold one clip together.

    Attributes:
        rank, degree: of this process in the group, and how many there are.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.degree = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> ContextRanks:
        """Itself: a copied model talks to the same ranks."""
        return self

    def spans(self, num_frames: int, device: torch.device) -> Spans:
        """What each rank holds, when this one holds `num_frames`. Waits for the device."""
        return spans_of(self.gather(torch.tensor(num_frames, device=device)).tolist())

    def exchange(self, x: Tensor, held: Spans, wanted: Spans) -> Tensor:
        """The frames that this rank wants, from those that hold them; `x` are those that it holds.

        The gradient of a frame is the sum over the ranks that wanted it, at the rank that holds it.
        """
        return _Exchange.apply(x, held, wanted, self)

    def stack(self, values: Tensor) -> Tensor:
        """`values` of all ranks, of one shape, in a new first dim `(P, ...)`; the gradient is summed over the ranks."""
        return _Stack.apply(values, self)

    def take(self, x: Tensor, spans: Spans) -> Tensor:
        """This rank's frames of `x`, the clip that every rank has. The gradient is the clip's, on every rank."""
        return _Take.apply(x, spans, self)

    def join(self, x: Tensor, spans: Spans) -> Tensor:
        """The clip, on every rank, of which this one has `x`. The gradient is this rank's part of the clip's."""
        return _Join.apply(x, spans, self)

    def gather(self, values: Tensor) -> Tensor:
        """`values` of all ranks, of one shape, in a new first dim `(P, ...)`. No gradient."""
        stacked = values.new_empty(self.degree, *values.shape)
        dist.all_gather(list(stacked.unbind()), values.contiguous(), group=self.group)
        return stacked

    def move(self, x: Tensor, have: Spans, need: Spans) -> list[tuple[Span, Tensor]]:
        """The pieces of `need[rank]` by the ranks that have them, in order; `x` are the frames of `have[rank]`. No gradient."""
        own = have[self.rank].overlap(need[self.rank])
        sent = [self._from_others(have[self.rank].overlap(span), rank) for rank, span in enumerate(need)]
        received = [self._from_others(need[self.rank].overlap(span), rank) for rank, span in enumerate(have)]
        pieces = [x[:, :, span.within(have[self.rank])] for span in sent]
        if any(a.overlap(b).num_frames for i, a in enumerate(have) for j, b in enumerate(need) if i != j):
            pieces = self._all_to_all(pieces, [span.num_frames for span in received])
        received[self.rank], pieces[self.rank] = own, x[:, :, own.within(have[self.rank])]
        return list(zip(received, pieces, strict=True))

    def _from_others(self, span: Span, rank: int) -> Span:
        """`span`, emptied for this rank itself: what it has it does not send."""
        return Span(span.start, span.start) if rank == self.rank else span

    def _all_to_all(self, pieces: list[Tensor], num_received: list[int]) -> list[Tensor]:
        batch, channels, _, height, width = pieces[0].shape
        frame = batch * channels * height * width
        received = pieces[0].new_empty(sum(num_received) * frame)
        dist.all_to_all_single(
            received,
            torch.cat([piece.reshape(-1) for piece in pieces]),  # (B, C, T, H, W) of each, one after the other
            [num_frames * frame for num_frames in num_received],
            [piece.numel() for piece in pieces],
            group=self.group,
        )
        parts = received.split([num_frames * frame for num_frames in num_received])
        return [part.view(batch, channels, part.numel() // frame, height, width) for part in parts]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Spans, wanted: Spans, ranks: ContextRanks) -> Tensor:
        ctx.held, ctx.wanted, ctx.ranks = held, wanted, ranks
        return torch.cat([piece for _, piece in ranks.move(x, held, wanted)], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        held = ctx.held[ctx.ranks.rank]
        total = grad.new_zeros(*grad.shape[:2], held.num_frames, *grad.shape[3:])
        for span, piece in ctx.ranks.move(grad, ctx.wanted, ctx.held):
            total[:, :, span.within(held)] += piece
        return total, None, None, None


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: ContextRanks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.ranks.group)
        return total[ctx.ranks.rank], None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spans: Spans, ranks: ContextRanks) -> Tensor:
        ctx.spans, ctx.ranks = spans, ranks
        return x[:, :, slice(*spans[ranks.rank])].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _joined(grads[0], ctx.spans, ctx.ranks), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spans: Spans, ranks: ContextRanks) -> Tensor:
        ctx.spans, ctx.ranks = spans, ranks
        return _joined(x, spans, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][:, :, slice(*ctx.spans[ctx.ranks.rank])], None, None


def _joined(x: Tensor, spans: Spans, ranks: ContextRanks) -> Tensor:
    clip = Span(0, spans[-1].stop)
    return torch.cat([piece for _, piece in ranks.move(x, spans, (clip,) * ranks.degree)], dim=2)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient is multiplied by `factor`."""
    return _ScaleGradient.apply(x, factor)
