"""The nearest code of each vector, and what is counted of the vectors of each code. Nothing larger than a chunk is ever made.

Spec: tokenizers-quantization.md 2a (common rules). Distances are `|e|^2 - 2 x e` in float32, of vectors and codes less the mean
of the codes: with a common offset, the rounding of `|e|^2` alone would change indices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_DISTANCES = 2**27
"""Distances of one chunk on a GPU: 512 MiB."""
MAX_DISTANCES_CPU = 2**24
"""The same where memory is near: 64 MiB, about what caches can still help with."""
MAX_ROWS_CPU = 512
"""Vectors of a chunk there; more gain nothing in the matrix product."""
BLOCK = 256
"""Codes of which a CPU takes the least distance first; see `_lowest`."""


@torch.no_grad()
def nearest(x: Tensor, book: Tensor, max_distances: int | None = None) -> Tensor:
    """The number `(N,)` int64 of the row of `book` `(V, D)` that is nearest to each row of `x` `(N, D)`; ties go to the lowest.

    Computed in float32 whatever autocast says, `max_distances` distances at a time (by default what suits the device). Equal
    means equal once computed: a matrix product may round two columns that hold the same differently.
    """
    limit = max_distances or (MAX_DISTANCES_CPU if x.device.type == "cpu" else MAX_DISTANCES)
    with torch.autocast(x.device.type, enabled=False):
        book, x = book.float(), x.float()
        centre = book.mean(0)
        book, size = book - centre, len(book)
        halves = x.device.type == "cpu" and len(book) >= 4 * BLOCK
        norms = book.square().sum(1)
        if halves and len(book) % BLOCK:
            num_missing = BLOCK - len(book) % BLOCK
            book = torch.cat([book, book.new_zeros(num_missing, book.shape[1])])
            norms = torch.cat([norms, norms.new_full((num_missing,), torch.inf)])
        num_rows = max(1, limit // len(book))
        if x.device.type == "cpu":
            num_rows = min(num_rows, MAX_ROWS_CPU)
        workspace = x.new_empty(min(num_rows, len(x)), len(book))
        found = [_of_chunk(part - centre, book, norms, workspace, halves) for part in x.split(num_rows)]
        return torch.cat(found).clamp(max=size - 1)  # NaN may find a code that fills up the last block


def _of_chunk(x: Tensor, book: Tensor, norms: Tensor, workspace: Tensor, halves: bool) -> Tensor:
    distances = torch.addmm(norms, x, book.T, alpha=-2.0, out=workspace[: len(x)])
    return _lowest(distances) if halves else distances.argmin(1)


def _lowest(distances: Tensor) -> Tensor:
    """`distances.argmin(1)` in two steps: the block that has the least, by `amin`, which a CPU does several times faster."""
    blocks = distances.unflatten(1, (distances.shape[1] // BLOCK, BLOCK))
    block = blocks.amin(2).argmin(1)
    inside = blocks[torch.arange(len(blocks)), block].argmin(1)
    return block * BLOCK + inside


@dataclass(frozen=True)
class CodeSums:
    """Of the vectors of each code: how many, `counts` `(V,)`, and their sum, `sums` `(V, D)`, float32."""

    counts: Tensor
    sums: Tensor


@torch.no_grad()
def count_codes(indices: Tensor, vocab_size: int) -> Tensor:
    """How often each of `vocab_size` codes is in `indices` `(N,)`, as `(V,)` float32; -1 is no code."""
    return torch.bincount(indices + 1, minlength=vocab_size + 1)[1:].float()


@torch.no_grad()
def sum_codes(x: Tensor, indices: Tensor, vocab_size: int) -> CodeSums:
    """Counts and sums of the rows of `x` `(N, D)` by their code; rows of code -1 are left out. Memory is `V * D`."""
    sums = torch.zeros(vocab_size + 1, x.shape[1], device=x.device).index_add_(0, indices + 1, x.float())
    return CodeSums(count_codes(indices, vocab_size), sums[1:])
