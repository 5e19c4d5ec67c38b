"""Which tokens of a sequence each process holds, as plain numbers that every process knows without asking."""

from __future__ import annotations

import bisect
import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from videofm.errors import ParallelError

Ranges = tuple[range, ...]


@dataclass(frozen=True)
class SequenceLayout:
    """How the global positions `0 ... length - 1` are dealt to parts, one part a rank; hashable, and exact for any length.

    `outer_parts` gives the positions of each outer part, in the order in which it stores its tokens, as steps of ranges. Each
    outer part is cut again into `num_inner` consecutive pieces of almost equal length, and part `outer * num_inner + inner` is
    one of these: a ring over outer parts with Ulysses inside has `rank = ring_rank * num_inner + ulysses_rank`. Parts may be
    empty, and their lengths may differ; nothing is ever padded.

    Raises:
        ParallelError: the parts do not hold each position once, or there is no part.
    """

    length: int
    outer_parts: tuple[Ranges, ...]
    num_inner: int = 1

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ParallelError(f"a sequence layout of {self.length} tokens: give 0 or more.")
        _check_counts(len(self.outer_parts), self.num_inner)
        seen, total = bytearray(self.length), 0
        for piece in (piece for part in self.outer_parts for piece in part):
            if len(piece) and not (0 <= piece[0] < self.length and 0 <= piece[-1] < self.length and piece.step > 0):
                raise ParallelError(f"{piece} is not a rising range inside a sequence of {self.length} tokens.")
            seen[piece.start : piece.stop : piece.step] = b"\1" * len(piece)
            total += len(piece)
        if total != self.length or not all(seen):
            missing, twice = self.length - sum(seen), total - sum(seen)
            raise ParallelError(
                f"the parts of a sequence of {self.length} tokens hold {total}: {missing} are missing and {twice} held twice. "
                "Each position belongs to one part."
            )

    # --- constructors: `num_parts` counts outer parts, so there are num_parts * num_inner parts in all ------------------------

    @classmethod
    def contiguous(cls, length: int, num_parts: int, num_inner: int = 1) -> SequenceLayout:
        """Consecutive tokens, lengths that differ by one at most, the longer parts first."""
        _check_counts(num_parts, num_inner)
        return cls._from_cuts(_even_cuts(length, num_parts), num_inner)

    @classmethod
    def zigzag(cls, length: int, num_parts: int, num_inner: int = 1) -> SequenceLayout:
        """Part r holds chunk r and chunk `2 * num_parts - 1 - r` of `2 * num_parts` consecutive ones: even work if causal."""
        _check_counts(num_parts, num_inner)
        cuts = [length * i // (2 * num_parts) for i in range(2 * num_parts + 1)]
        chunks = [range(start, stop) for start, stop in pairwise(cuts)]
        return cls(length, tuple(_tidy((chunks[r], chunks[-1 - r])) for r in range(num_parts)), num_inner)

    @classmethod
    def striped(cls, length: int, num_parts: int, num_inner: int = 1) -> SequenceLayout:
        """Token t on part `t % num_parts`: even work if causal, at each step of a ring too."""
        _check_counts(num_parts, num_inner)
        return cls(length, tuple(_tidy((range(r, length, num_parts),)) for r in range(num_parts)), num_inner)

    @classmethod
    def chunk_zigzag(cls, length: int, num_parts: int, chunk_length: int | Sequence[int], num_inner: int = 1) -> SequenceLayout:
        """Whole chunks of a block-causal mask, dealt so that work is even: with `2 * num_parts` equal chunks, the zigzag order.

        Args:
            length: tokens of the sequence.
            num_parts: outer parts.
            chunk_length: tokens of each chunk (the last may be shorter), or the list of all of them, which add up to `length`.
            num_inner: consecutive pieces of each outer part.

        Raises:
            ParallelError: the chunks do not add up.
        """
        _check_counts(num_parts, num_inner)
        cuts = [0, *accumulate(chunk_lengths(chunk_length, length))]
        chunks = [range(start, stop) for start, stop in pairwise(cuts)]
        return cls._dealt(length, chunks, [len(chunk) * chunk.stop for chunk in chunks], num_parts, num_inner)

    @classmethod
    def balanced(
        cls,
        document_lengths: Sequence[int],
        num_parts: int,
        *,
        whole: bool = False,
        causal: bool = False,
        token_cost: int = 0,
        num_inner: int = 1,
    ) -> SequenceLayout:
        """Packed documents, shared out by what they cost rather than by their tokens.

        A query costs one for each key that it sees (its document; if `causal`, the part of it up to itself) and `token_cost`
        for the rest of the model: a transformer of width D spends about as much on a token outside attention as on 6 D keys.

        Args:
            document_lengths: tokens of each document, in the order of the sequence.
            num_parts: outer parts.
            whole: deal whole documents, so that a ring moves keys that nobody needs but computes no partial result; otherwise
                parts are consecutive tokens, cut inside documents where that evens the work.
            causal: documents are causal inside.
            token_cost: what a token costs besides attention, in query-key pairs.
            num_inner: consecutive pieces of each outer part.

        Raises:
            ParallelError: a document of negative length.
        """
        _check_counts(num_parts, num_inner)
        if any(document < 0 for document in document_lengths):
            raise ParallelError(f"documents of {list(document_lengths)} tokens: lengths are 0 or more.")
        starts = [0, *accumulate(document_lengths)]
        costs = [_document_cost(document, document, causal, token_cost) for document in document_lengths]
        if whole:
            documents = [range(start, stop) for start, stop in pairwise(starts)]
            return cls._dealt(starts[-1], documents, costs, num_parts, num_inner)
        before = [0, *accumulate(costs)]

        def cost_up_to(position: int) -> int:
            index = min(bisect.bisect_right(starts, position), len(document_lengths)) - 1
            if index < 0:
                return 0
            return before[index] + _document_cost(position - starts[index], document_lengths[index], causal, token_cost)

        targets = [before[-1] * i / num_parts for i in range(1, num_parts)]
        inner = [bisect.bisect_left(range(starts[-1]), target, key=cost_up_to) for target in targets]
        return cls._from_cuts([0, *inner, starts[-1]], num_inner)

    @classmethod
    def _from_cuts(cls, cuts: Sequence[int], num_inner: int) -> SequenceLayout:
        return cls(cuts[-1], tuple(_tidy((range(start, stop),)) for start, stop in pairwise(cuts)), num_inner)

    @classmethod
    def _dealt(
        cls, length: int, pieces: Sequence[range], costs: Sequence[int], num_parts: int, num_inner: int
    ) -> SequenceLayout:
        """Each piece, the dearest first, to the part that has least to do; positions rise inside a part."""
        loads = [(0, part) for part in range(num_parts)]  # a heap as it stands; equal chunks come out in the zigzag order
        held: list[list[range]] = [[] for _ in range(num_parts)]
        for index in sorted(range(len(pieces)), key=lambda i: (costs[i], i), reverse=True):
            load, part = heapq.heappop(loads)
            held[part].append(pieces[index])
            heapq.heappush(loads, (load + costs[index], part))
        return cls(length, tuple(_tidy(sorted(part, key=lambda piece: piece.start)) for part in held), num_inner)

    # --- text ----------------------------------------------------------------------------------------------------

    def to_text(self) -> str:
        """This layout as text, for places that take no objects (custom ops); `from_text` is the inverse."""
        return self._text

    @staticmethod
    def from_text(text: str) -> SequenceLayout:
        """The layout that `to_text` wrote; the same object for the same text."""
        return _from_text(text)

    @cached_property
    def _text(self) -> str:
        parts = [[[piece.start, piece.stop, piece.step] for piece in part] for part in self.outer_parts]
        return json.dumps([self.length, self.num_inner, parts], separators=(",", ":"))

    # --- what a part holds ------------------------------------------------------------------------------------------

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each part, `len(outer_parts) * num_inner` of them; zeros are allowed."""
        return tuple(sum(map(len, part)) for part in self._parts)

    @cached_property
    def _parts(self) -> tuple[Ranges, ...]:
        return tuple(piece for part in self.outer_parts for piece in _cut(part, self.num_inner))

    def outer(self) -> SequenceLayout:
        """The outer parts alone, uncut: the layout of the ring."""
        return SequenceLayout(self.length, self.outer_parts)

    def positions(self, part: int) -> Tensor:
        """The global positions of the tokens of `part`, int64 on the CPU, in the order in which it stores them."""
        return torch.cat(
            [
                torch.empty(0, dtype=torch.int64),
                *(torch.arange(piece.start, piece.stop, piece.step) for piece in self._parts[part]),
            ]
        )

    def split(self, x: Tensor, dim: int, part: int) -> Tensor:
        """The tokens of `part`, out of the whole sequence `x` along `dim`; a view where they are consecutive. Differentiable.

        Raises:
            ParallelError: `x` has not `length` tokens.
        """
        if x.shape[dim] != self.length:
            raise ParallelError(
                f"the sequence has {x.shape[dim]} tokens (dim {dim} of {tuple(x.shape)}), but its layout was made for "
                f"{self.length}: make a layout for this length."
            )
        pieces = [_take(x, dim, piece) for piece in self._parts[part]]
        if not pieces:
            return x.narrow(dim, 0, 0)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def join(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The whole sequence, out of the tokens of all parts along `dim`: the inverse of `split`. Differentiable.

        Raises:
            ParallelError: `parts` are not as many, or not as long, as those of this layout.
        """
        got = tuple(part.shape[dim] for part in parts)
        if got != self.lengths:
            raise ParallelError(f"parts of {list(got)} tokens cannot be joined: the layout has {list(self.lengths)}.")
        pieces = [piece for part in self._parts for piece in part]
        if all(piece.step == 1 for piece in pieces):
            tensors = [
                x for x, part in zip(parts, self._parts, strict=True) for x in x.split([len(p) for p in part], dim) if part
            ]
            ordered = sorted(zip(pieces, tensors, strict=True), key=lambda pair: pair[0].start)
            return torch.cat([tensor for _, tensor in ordered] or list(parts), dim)
        order = torch.cat([self.positions(part) for part in range(len(parts))])
        return torch.cat(list(parts), dim).index_select(dim, order.argsort().to(parts[0].device))


@lru_cache(maxsize=256)
def _from_text(text: str) -> SequenceLayout:
    length, num_inner, parts = json.loads(text)
    return SequenceLayout(length, tuple(tuple(range(*piece) for piece in part) for part in parts), num_inner)


def chunk_lengths(chunk_length: int | Sequence[int], length: int) -> tuple[int, ...]:
    """The lengths of all chunks of a sequence of `length` tokens.

    Args:
        chunk_length: tokens of each chunk, of which the last may be shorter, or the list of all of them.
        length: tokens of the sequence.

    Raises:
        ParallelError: a chunk without tokens, or a list that does not add up to `length`.
    """
    if isinstance(chunk_length, int):
        if chunk_length < 1:
            raise ParallelError(f"chunks of {chunk_length} tokens: a chunk has 1 or more.")
        return tuple(min(chunk_length, length - start) for start in range(0, length, chunk_length))
    if sum(chunk_length) != length or any(chunk < 1 for chunk in chunk_length):
        raise ParallelError(
            f"chunks of {list(chunk_length)} tokens add up to {sum(chunk_length)}: give lengths of 1 or more that add up to "
            f"the {length} tokens of the sequence."
        )
    return tuple(chunk_length)


def _check_counts(num_parts: int, num_inner: int) -> None:
    if num_parts < 1 or num_inner < 1:
        raise ParallelError(f"a sequence cannot be cut into {num_parts} parts of {num_inner} pieces: both are 1 or more.")


def _even_cuts(length: int, num_parts: int) -> list[int]:
    return [0, *accumulate(length // num_parts + (part < length % num_parts) for part in range(num_parts))]


def _document_cost(num_queries: int, length: int, causal: bool, token_cost: int) -> int:
    """What the first `num_queries` tokens of a document of `length` tokens cost."""
    pairs = num_queries * (num_queries + 1) // 2 if causal else num_queries * length
    return pairs + num_queries * token_cost


def _tidy(pieces: Sequence[range]) -> Ranges:
    """`pieces` without empty ones, neighbours merged: fewer copies, and one text for one layout."""
    tidy: list[range] = []
    for piece in pieces:
        if not piece:
            continue
        piece = piece if len(piece) > 1 else range(piece.start, piece.start + 1)
        if tidy and tidy[-1].step == piece.step == 1 and tidy[-1].stop == piece.start:
            tidy[-1] = range(tidy[-1].start, piece.stop)
        else:
            tidy.append(piece)
    return tuple(tidy)


def _cut(part: Ranges, num_pieces: int) -> list[Ranges]:
    """`part` as `num_pieces` consecutive pieces of almost equal length."""
    starts = [0, *accumulate(map(len, part))]
    cuts = _even_cuts(starts[-1], num_pieces)
    return [
        _tidy([p[max(a - start, 0) : max(b - start, 0)] for p, start in zip(part, starts[:-1], strict=True)])
        for a, b in pairwise(cuts)
    ]


def _take(x: Tensor, dim: int, piece: range) -> Tensor:
    if piece.step == 1:
        return x.narrow(dim, piece.start, len(piece))
    index: list[slice] = [slice(None)] * x.dim()
    index[dim] = slice(piece.start, piece.stop, piece.step)
    return x[tuple(index)]
