"""Which tokens may attend to which, as plain numbers: evaluated on global positions, so that it holds for any layout.

All masks of one sequence but padding have one form: a query at position i sees the keys in `[start(i), end(i))`, and the first
`num_sink` keys before `start(i)`. What a block of a matrix needs follows from counting keys in intervals, without the matrix.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from videofm.attention.layout import chunk_lengths
from videofm.errors import ParallelError

Kind = Literal["full", "causal", "block_causal", "documents", "key_padding"]
Block: TypeAlias = Literal["full", "empty"] | Tensor


@dataclass(frozen=True)
class MaskSpec:
    """A mask by name and numbers; hashable, and text where only text can go. Build it with the constructors below.

    `lengths` are those of chunks (`block_causal`), documents (`documents`) or samples (`key_padding`), in order; positions
    after the last of them see nothing and are seen by none. `is_causal` is for documents. `window` and `num_sink` are for the
    causal kinds: a query sees the last `window` keys up to the end of its chunk, and the first `num_sink` of the sequence.
    """

    kind: Kind
    lengths: tuple[int, ...] = ()
    is_causal: bool = False
    window: int | None = None
    num_sink: int = 0
    _text: str = field(init=False, repr=False, compare=False, default="")

    def __post_init__(self) -> None:
        # Made at once: torch.compile cannot look into a property that is computed on demand.
        fields = [self.kind, self.lengths, self.is_causal, self.window, self.num_sink]
        object.__setattr__(self, "_text", json.dumps(fields, separators=(",", ":")))

    # --- constructors ----------------------------------------------------------------------------------------------------

    @classmethod
    def full(cls) -> MaskSpec:
        """Every token sees every token."""
        return cls("full")

    @classmethod
    def causal(cls, window: int | None = None, num_sink: int = 0) -> MaskSpec:
        """A token sees itself and what is before it: all of it, or the last `window` tokens (itself one of them) and sinks.

        Raises:
            ParallelError: a window without tokens, sinks without a window, or a negative number of sinks.
        """
        _check_window(window, num_sink, 1)
        return cls("causal", window=window, num_sink=num_sink)

    @classmethod
    def block_causal(
        cls, chunk_length: int | Sequence[int], length: int | None = None, window: int | None = None, num_sink: int = 0
    ) -> MaskSpec:
        """A token sees its own chunk and the chunks before it: all of them, or the last `window` tokens and sinks.

        Args:
            chunk_length: tokens of each chunk, the last of which may be shorter (then `length` is needed), or the list of all.
            length: tokens of the sequence; may be left out where all chunks are listed.
            window: tokens that a query sees, counted back from the end of its chunk; None is all.
            num_sink: first tokens of the sequence that are seen beside the window.

        Raises:
            ParallelError: chunks do not add up to `length`, the window is smaller than a chunk, or sinks without a window.
        """
        if length is None:
            if isinstance(chunk_length, int):
                raise ParallelError(
                    f"block_causal with chunks of {chunk_length} tokens: give the `length` of the sequence too."
                )
            length = sum(chunk_length)
        lengths = chunk_lengths(chunk_length, length)
        _check_window(window, num_sink, max(lengths, default=1))
        return cls("block_causal", lengths, window=window, num_sink=num_sink)

    @classmethod
    def documents(cls, lengths: Sequence[int], causal: bool = False) -> MaskSpec:
        """Packed documents of these lengths: a token sees its own document, up to itself if `causal`.

        Raises:
            ParallelError: a negative length.
        """
        return cls("documents", _lengths(lengths, "documents"), causal)

    @classmethod
    def key_padding(cls, lengths: Sequence[int]) -> MaskSpec:
        """Sample b has `lengths[b]` real tokens, then padding that nobody sees (rows of padding see the real tokens).

        Raises:
            ParallelError: a negative length.
        """
        return cls("key_padding", _lengths(lengths, "samples"))

    # --- text ------------------------------------------------------------------------------------------------------------

    def to_text(self) -> str:
        """This mask as text, for places that take no objects (custom ops); `from_text` is the inverse."""
        return self._text

    @staticmethod
    def from_text(text: str) -> MaskSpec:
        """The mask that `to_text` wrote; the same object for the same text."""
        return _from_text(text)

    # --- meaning ---------------------------------------------------------------------------------------------------------

    @property
    def is_per_sample(self) -> bool:
        """Whether samples of a batch have masks of their own."""
        return self.kind == "key_padding"

    def check(self, length: int, batch_size: int | None = None) -> None:
        """Refuse a sequence that this mask was not made for.

        Args:
            length: tokens of the whole sequence.
            batch_size: samples, where known.

        Raises:
            ParallelError: lengths of chunks or documents do not add up to `length`, or padding is given for other samples.
        """
        if self.is_per_sample:
            if batch_size is not None and len(self.lengths) != batch_size:
                raise ParallelError(
                    f"key_padding gives the lengths of {len(self.lengths)} samples, but the batch has {batch_size}."
                )
            if max(self.lengths, default=0) > length:
                raise ParallelError(
                    f"key_padding has a sample of {max(self.lengths)} tokens, but sequences have {length}: a length counts the "
                    "real tokens of a padded sequence."
                )
        elif self.lengths and sum(self.lengths) != length:
            raise ParallelError(
                f"the lengths of {self.kind} add up to {sum(self.lengths)}, but the sequence has {length} tokens: "
                "make the mask for this sequence."
            )

    def dense(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """The mask between these global positions, on their device: bool, True = may attend.

        Args:
            q_positions: positions of queries `(Lq,)`.
            k_positions: positions of keys `(Lk,)`.

        Returns:
            `(Lq, Lk)`; for `key_padding`, whose rows are all alike, `(B, 1, 1, Lk)`.
        """
        if self.is_per_sample:
            lengths = torch.tensor(self.lengths, device=k_positions.device)
            return (k_positions < lengths[:, None])[:, None, None]  # (B, Lk) -> (B, 1, 1, Lk)
        start, end = (bound[:, None] for bound in self.intervals(q_positions))  # (Lq, 1) each
        seen = (k_positions >= start) & (k_positions < end)
        return seen | (k_positions < self.end_of_sinks(start, end)) if self.num_sink else seen

    def block(self, q_positions: Tensor, k_positions: Tensor) -> Block:
        """What attention between these global positions needs: `"full"` (no mask), `"empty"` (nothing) or the dense mask.

        The matrix is built only where it is needed: `O((Lq + Lk) log Lk)` otherwise.
        """
        num_rows = len(self.lengths) if self.is_per_sample else len(q_positions)
        num_seen = self._count(q_positions, k_positions)
        if num_seen == 0:
            return "empty"
        return "full" if num_seen == num_rows * len(k_positions) else self.dense(q_positions, k_positions)

    def num_pairs(self, length: int, batch_size: int = 1) -> int:
        """Query-key pairs that a batch of sequences of `length` tokens computes; what FLOPs count.

        Raises:
            ParallelError: this mask was not made for such a batch, see `check`.
        """
        self.check(length, batch_size if self.is_per_sample else None)
        positions = torch.arange(length)
        return self.num_pairs_between(positions, positions, batch_size)

    def num_pairs_between(self, q_positions: Tensor, k_positions: Tensor, batch_size: int = 1) -> int:
        """Query-key pairs between these global positions, for the whole batch."""
        num_seen = self._count(q_positions, k_positions)
        return num_seen * len(q_positions) if self.is_per_sample else num_seen * batch_size

    def intervals(self, q_positions: Tensor) -> tuple[Tensor, Tensor]:
        """First key and end (exclusive) of the keys that each query sees, sinks apart; int64 `(Lq,)` each. Not for padding."""
        assert not self.is_per_sample, "each sample has its own keys"
        zero = torch.zeros_like(q_positions)
        if self.kind == "full":
            return zero, zero + torch.iinfo(torch.int64).max
        if self.kind == "causal":
            start, end = zero, q_positions + 1
        else:
            # a position after the last boundary falls into an empty interval at the end
            bounds = torch.tensor([0, *accumulate(self.lengths), sum(self.lengths)], device=q_positions.device)
            index = torch.bucketize(q_positions, bounds[1:-1], right=True) if self.lengths else zero
            start, end = bounds[index], bounds[index + 1]
            if self.kind == "block_causal":
                start = torch.where(q_positions < bounds[-1], zero, end)
            elif self.is_causal:
                end = torch.minimum(end, q_positions + 1)
        return (start, end) if self.window is None else (torch.maximum(start, end - self.window), end)

    def end_of_sinks(self, start: Tensor, end: Tensor) -> Tensor:
        """End of the sinks that lie before `start`; 0 for a query that sees nothing."""
        return torch.where(end > start, start.clamp(max=self.num_sink), 0)

    def _count(self, q_positions: Tensor, k_positions: Tensor) -> int:
        """Pairs between these positions; for padding, keys seen by a query, summed over samples."""
        keys = k_positions.sort().values
        if self.is_per_sample:
            return int(torch.searchsorted(keys, torch.tensor(self.lengths, device=keys.device)).sum())
        if not len(q_positions):
            return 0
        start, end = self.intervals(q_positions)
        first = torch.searchsorted(keys, start)
        seen = (torch.searchsorted(keys, end) - first).clamp(min=0)
        if self.num_sink:
            seen = seen + torch.searchsorted(keys, self.end_of_sinks(start, end))
        return int(seen.sum())


@lru_cache(maxsize=256)
def _from_text(text: str) -> MaskSpec:
    kind, lengths, causal, window, num_sink = json.loads(text)
    return MaskSpec(kind, tuple(lengths), causal, window, num_sink)


def _lengths(lengths: Sequence[int], what: str) -> tuple[int, ...]:
    if any(length < 0 for length in lengths):
        raise ParallelError(f"{what} of {list(lengths)} tokens: lengths are 0 or more.")
    return tuple(int(length) for length in lengths)


def _check_window(window: int | None, num_sink: int, longest_chunk: int) -> None:
    if window is not None and window < longest_chunk:
        raise ParallelError(
            f"a window of {window} tokens is smaller than a chunk of {longest_chunk}: a chunk sees itself whole, so the window "
            f"has {longest_chunk} tokens or more."
        )
    if num_sink < 0 or (num_sink and window is None):
        raise ParallelError(
            f"num_sink={num_sink} with window={window}: sinks are 0 or more first tokens that stay visible when a window has "
            "moved on; without a window give 0."
        )
