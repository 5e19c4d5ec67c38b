"""What the forward passes of one optimizer step leave for its update: sums on one rank, and a few vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from videofm.models.quantizers.search import count_codes, sum_codes
from videofm.models.quantizers.state import draw


class Pending:
    """Statistics of the micro-batches since the last update. They are no state: a checkpoint lies between two steps.

    Everything that is added up is in one tensor, `[counts | sums | number of tokens]`, so that one sum over ranks does for all.
    Counts are exact up to 2^24 tokens a step.
    """

    def __init__(self, num_books: int, vocab_size: int, sum_dim: int) -> None:
        self.num_books, self.vocab_size, self.sum_dim = num_books, vocab_size, sum_dim
        self.clear()

    def clear(self) -> None:
        """Drop everything."""
        self._flat: Tensor | None = None
        self._vectors: Tensor | None = None

    @torch.no_grad()
    def add_tokens(self, num_tokens: Tensor, indices: Tensor, inputs: Tensor | None) -> None:
        """Count `indices` `(N, num_books)` (-1: no code), and sum `inputs` `(num_books, N, D)`, what each book got, by code."""
        counts, sums = [], []
        for book, column in enumerate(indices.unbind(1)):
            if inputs is None:
                counts.append(count_codes(column, self.vocab_size))
            else:
                found = sum_codes(inputs[book], column, self.vocab_size)
                counts.append(found.counts)
                sums.append(found.sums.flatten())
        part = torch.cat([*counts, *sums, num_tokens.float().reshape(1)])
        self._flat = part if self._flat is None else self._flat + part

    @torch.no_grad()
    def add_vectors(self, vectors: Tensor, num: int, seed: int, step: int) -> None:
        """Keep `num` vectors of `vectors` `(N, D)` and those before: the draw from all of them (`state.draw`)."""
        both = vectors.detach().float() if self._vectors is None else torch.cat([self._vectors, vectors.float()])
        self._vectors = draw(both, num, seed, step)

    def flat(self, device: torch.device) -> Tensor:
        """`[counts (num_books, V) | sums (num_books, V, D) | number of tokens]`, zeros where this rank had no samples."""
        length = self.num_books * self.vocab_size * (1 + self.sum_dim) + 1
        return torch.zeros(length, device=device) if self._flat is None else self._flat

    def vectors(self, dim: int, device: torch.device) -> Tensor:
        """The vectors that were kept, `(N, D)`."""
        return torch.zeros(0, dim, device=device) if self._vectors is None else self._vectors

    def counts_of(self, flat: Tensor) -> Tensor:
        """The counts `(num_books, V)` in what `flat` gave."""
        return flat[: self.num_books * self.vocab_size].view(self.num_books, self.vocab_size)

    def sums_of(self, flat: Tensor) -> Tensor:
        """The sums `(num_books, V, sum_dim)` in what `flat` gave."""
        return flat[self.num_books * self.vocab_size : -1].view(self.num_books, self.vocab_size, self.sum_dim)
