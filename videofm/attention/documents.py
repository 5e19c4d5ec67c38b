"""Clips that are packed into one sequence: each is a document, whose tokens see each other and their own text alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from videofm.attention.layout import SequenceLayout
from videofm.attention.masks import MaskSpec
from videofm.errors import DataError

if TYPE_CHECKING:
    from videofm.types import AttentionFn, Conditioning


@dataclass(frozen=True)
class Documents:
    """Documents of `lengths` tokens, one after the other in a sequence; all of it is known to the host.

    `pieces` says whose tokens are at hand, in their order: (number of a document, how many of its tokens). They are all of them
    until `split`. `mask` is what self-attention of the whole sequence sees, whichever tokens are at hand.
    """

    lengths: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]
    mask: MaskSpec = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", MaskSpec.documents(self.lengths))

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Documents:
        """All tokens of documents of these lengths."""
        return cls(tuple(lengths), tuple(enumerate(lengths)))

    @property
    def num_tokens(self) -> int:
        """Tokens at hand."""
        return sum(count for _, count in self.pieces)

    def split(self, layout: SequenceLayout, part: int) -> Documents:
        """The same documents with the tokens of one part of `layout` at hand.

        Raises:
            ParallelError: the layout is that of another sequence.
        """
        self.mask.check(layout.length)
        ends = torch.tensor(list(accumulate(self.lengths)))
        numbers = torch.bucketize(layout.positions(part), ends, right=True)
        found, counts = numbers.unique_consecutive(return_counts=True)
        return replace(self, pieces=tuple(zip(found.tolist(), counts.tolist(), strict=True)))


def attend_to_texts(attend: AttentionFn, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, documents: Documents) -> Tensor:
    """Attention of packed documents to a text each, document by document: what each would compute by itself.

    Args:
        attend: attention with a mask tensor.
        q: `(1, L, N, K)`, the tokens at hand of `documents`.
        k: `(documents, S, G, K)`.
        v: like k.
        mask: `(documents, 1, 1, S)` bool, True = may attend.
        documents: whose tokens these are.

    Returns:
        `(1, L, N, K)`.
    """
    queries = q.split([count for _, count in documents.pieces], dim=1)
    attended = [
        attend(piece, k[number : number + 1], v[number : number + 1], mask[number : number + 1])
        for piece, (number, _) in zip(queries, documents.pieces, strict=True)
    ]
    return torch.cat(attended, dim=1)


def check_documents(documents: Documents | None, tokens: Tensor, conditioning: Conditioning) -> None:
    """Refuse documents that are not those of the call; None is fine.

    Args:
        documents: with the tokens at hand.
        tokens: `(1, L, C)`.
        conditioning: a text a document.

    Raises:
        DataError: a batch of several sequences, or another number of tokens or texts.
    """
    if documents is None:
        return
    if (found := tuple(tokens.shape[:2])) != (1, documents.num_tokens):
        raise DataError(
            f"latent_tokens are {found[0]} sequences of {found[1]} tokens, but {len(documents.lengths)} packed documents have "
            f"{documents.num_tokens} at hand: packed clips are one sequence of just these."
        )
    if (num_texts := len(conditioning.embeddings)) != (num := len(documents.lengths)):
        raise DataError(f"{num} packed documents come with {num_texts} texts: bring one a document, in their order.")
