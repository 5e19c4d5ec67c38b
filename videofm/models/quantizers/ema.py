"""`vq_ema`: codes are running means of the vectors that chose them (VQ-VAE, arXiv 1711.00937, appendix A.1).

The book starts from k-means over many vectors, and codes that fall out of use are set to vectors of the batch: with both, the
robust choice at any width (spec tokenizers-quantization.md 2a). The class holds any number of books that each quantise what the
ones before them left; `vq_ema` has one, `rvq` several.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from videofm.models.quantizers.base import Counters, Found, Quantizer
from videofm.models.quantizers.config import QuantizerConfig
from videofm.models.quantizers.kmeans import kmeans
from videofm.models.quantizers.search import nearest
from videofm.models.quantizers.state import draw, generator, place

EPSILON = 1e-5
"""Of Laplace smoothing. A code whose running count is below 100 times this stays as it is: its mean would be all smoothing."""


@dataclass(frozen=True, kw_only=True)
class EMAConfig(QuantizerConfig):
    """`codebook_size` codes of `dim` channels, running means with `decay` per update; `commit_weight` as in `vq`.

    The start: k-means (`start_iterations`) once `start_vectors` vectors for each code are there, collected over at least
    `start_updates` updates; 0 vectors: start from the random book. Revival: every `revive_every` updates (0: never), codes with
    less than `dead_share` of an equal share of the tokens become vectors of the batch. `seed` is of all draws.
    """

    kind: str = "vq_ema"
    codebook_size: int = 2048
    dim: int = 16
    commit_weight: float = 0.25
    decay: float = 0.99
    start_vectors: int = 32
    start_updates: int = 8
    start_iterations: int = 10
    revive_every: int = 100
    dead_share: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within("codebook_size", 2)
        self.within("dim", 1)
        self.within("commit_weight", 0)
        self.within("decay", 0, 1, below=True)
        self.within("start_vectors", 0)
        self.within("start_updates", 1)
        self.within("start_iterations", 0)
        self.within("revive_every", 0)
        self.within("dead_share", 0, 1, below=True)
        self.only_with("start_vectors", 0, "start_updates", "start_iterations")
        self.only_with("revive_every", 0, "dead_share")


class EMAQuantizer(Quantizer):
    """See the head of this file.

    Until k-means has run, training passes latents through (`z_q` is `z`, the commitment loss 0, the indices those of the random
    book, uncounted), so that the models around it learn what they will have to code; eval mode quantises with the random book.

    State besides that of the base, float32: `books` `(Q, V, D)`, `sums` `(Q, V, D)` and `counts` `(Q, V)`, the running sums
    whose ratio the books are, and `reservoir` `(R, D)`, vectors for the start, zeros after it. A level of `rvq` that was left
    out in a step keeps its sums.
    """

    config_class: ClassVar[type[QuantizerConfig]] = EMAConfig
    config: EMAConfig
    books: Tensor
    sums: Tensor
    counts: Tensor
    reservoir: Tensor

    def __init__(self, config: EMAConfig, num_levels: int = 1) -> None:
        size, dim = config.codebook_size, config.dim
        super().__init__(config, (size,) * num_levels, dim, {"commit": config.commit_weight}, config.seed, sums_inputs=True)
        drawn = torch.randn(num_levels, size, dim, generator=generator(config.seed, 0, "books"), device="cpu") / dim**0.5
        self.register_buffer("books", place(drawn))
        self.register_buffer("sums", place(drawn.clone()))
        self.register_buffer("counts", torch.ones(num_levels, size))
        self.register_buffer("reservoir", torch.zeros(config.start_vectors * size, dim))
        self.counters[4] = int(config.start_vectors == 0)

    def levels_in_use(self, counters: Counters) -> int:
        """How many books a training step uses."""
        return self.num_books

    def quantize(self, tokens: Tensor) -> Found:
        """See the base."""
        if not self.training:
            return self._walk(tokens, self.num_books)
        counters = self.read_counters()
        if counters.started:
            return self._walk(tokens, self.levels_in_use(counters))
        found = self._walk(tokens.detach(), self.num_books)
        return Found(tokens.detach(), found.indices, {"commit": torch.zeros_like(tokens[..., 0])}, found.inputs, counts=False)

    def _walk(self, tokens: Tensor, num_levels: int) -> Found:
        """Through the first `num_levels` books; each gets what is left. The gradient of its commitment reaches the tokens."""
        left, commit, indices, inputs = tokens, torch.zeros_like(tokens[..., 0]), [], []
        for book in self.books[:num_levels]:
            inputs.append(left.detach())
            indices.append(nearest(left.detach().flatten(0, 1), book).view(tokens.shape[:2]))
            chosen = book[indices[-1]]
            commit = commit + (left - chosen).square().mean(-1) / num_levels
            left = left - chosen
        num_missing = self.num_books - num_levels
        indices += [torch.full_like(indices[0], -1)] * num_missing
        inputs += [left.detach()] * num_missing
        table = torch.stack(indices, -1)
        return Found(self.lookup(table), table, {"commit": commit}, torch.stack(inputs))

    def search(self, x: Tensor) -> Tensor:
        """See the base."""
        return self._walk(x.unsqueeze(0), self.num_books).indices[0]

    def lookup(self, indices: Tensor) -> Tensor:
        """See the base."""
        codes = None
        for book, column in zip(self.books, indices.unbind(-1), strict=False):
            chosen = torch.where(column.unsqueeze(-1) >= 0, book[column.clamp(min=0)], 0.0)
            codes = chosen if codes is None else codes + chosen
        assert codes is not None
        return codes

    def num_vectors(self, counters: Counters) -> int:
        """See the base."""
        own = self.config.codebook_size if self._revives(counters) else self._num_wanted(counters)
        return max(own, super().num_vectors(counters))

    def _num_wanted(self, counters: Counters) -> int:
        """Vectors that the start takes from this step."""
        total = len(self.reservoir)
        return 0 if counters.started else min(math.ceil(total / self.config.start_updates), total - counters.num_collected)

    def _revives(self, counters: Counters) -> bool:
        every = self.config.revive_every
        return counters.started and every > 0 and (counters.num_updates + 1) % every == 0

    def learn(self, counts: Tensor, sums: Tensor, vectors: Tensor, counters: Counters) -> Counters:
        """See the base."""
        if not counters.started:
            return self._collect_start(vectors, counters)
        used = counts.sum(1, keepdim=True) > 0
        decay = torch.where(used, self.config.decay, 1.0)  # (Q, 1)
        self.counts.mul_(decay).add_((1 - decay) * counts)
        self.sums.mul_(decay.unsqueeze(-1)).add_((1 - decay).unsqueeze(-1) * sums)
        total = self.counts.sum(1, keepdim=True)
        smooth = (self.counts + EPSILON) / (total + self.counts.shape[1] * EPSILON) * total
        means = self.sums / smooth.unsqueeze(-1)
        self.books.copy_(torch.where(self.counts.unsqueeze(-1) >= 100 * EPSILON, means, self.books))
        return self._revive(vectors, counters) if self._revives(counters) else counters

    def _collect_start(self, vectors: Tensor, counters: Counters) -> Counters:
        first = counters.num_collected
        end = first + min(self._num_wanted(counters), len(vectors))
        self.reservoir[first:end] = vectors[: end - first]
        done = end == len(self.reservoir)
        if done:
            self._start(generator(counters.seed, counters.num_updates, "k-means"))
        return Counters(**{**vars(counters), "num_collected": end, "started": done})

    def _start(self, draws: torch.Generator) -> None:
        """Each book from k-means over what the ones before it leave of the reservoir."""
        left = self.reservoir.clone()
        for level, book in enumerate(self.books):
            found = kmeans(left, len(book), self.config.start_iterations, draws)
            book.copy_(found.centres)
            self.counts[level] = found.counts
            self.sums[level] = found.centres * found.counts.unsqueeze(1)
            left = left - book[nearest(left, book)]
        self.reservoir.zero_()

    def _revive(self, vectors: Tensor, counters: Counters) -> Counters:
        """Set codes that are out of use to vectors, as if an equal share of tokens had chosen them.

        No vector serves two levels: what a code leaves of the vector that it was set to is nothing.
        """
        left = draw(vectors, len(vectors), counters.seed, counters.num_updates, distinct=True)
        num_revived = counters.num_revived
        for level, book in enumerate(self.books):
            share = self.counts[level].mean()
            dead = (self.counts[level] < self.config.dead_share * share).nonzero().squeeze(1)[: len(left)]
            book[dead] = left[: len(dead)]
            self.counts[level, dead] = share
            self.sums[level, dead] = left[: len(dead)] * share
            num_revived += len(dead)
            left = left[len(dead) :]
            left = left - book[nearest(left, book)]
        return Counters(**{**vars(counters), "num_revived": num_revived})

    @property
    def num_start_vectors(self) -> int:
        """See the base."""
        return len(self.reservoir)

    def inexact(self, before: Counters, after: Counters) -> tuple[Tensor, ...]:
        """See the base: after k-means and after a revival, level by level, so that no gathered tensor is of all books."""
        if before.started == after.started and not self._revives(before):
            return ()
        return (*self.books, *self.sums, *self.counts)

    def emptied(self, counters: Counters) -> frozenset[str]:
        """See the base."""
        return frozenset({"reservoir"}) if counters.started else frozenset()

    def more_metrics(self, counters: Counters) -> dict[str, float]:
        """`revived`: how many codes were revived so far."""
        return {"revived": float(counters.num_revived)}
