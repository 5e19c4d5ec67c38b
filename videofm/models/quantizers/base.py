"""The contract of quantizers: latents to the nearest of a finite set of codes, and back.

Spec: tokenizers-quantization.md 2a. Laws that every kind keeps (tests/unit/models/test_quantizers.py runs over the registry):

- in eval mode `codes(out.indices)` is `out.z_q`, bit for bit, and nothing is ever written;
- the gradient of `z_q` with respect to `bounded(z)` is the identity, however many books there are (straight-through);
- indices are those of a float32 search, whatever autocast says and however the search is cut up;
- masked tokens change neither loss nor statistics;
- ranks with a share of the samples each compute what one rank computes with all.

A step of training: `forward` for each micro-batch, which only collects; backward; the optimizer; then `update(ranks)` once on
every rank, or `discard()` where the optimizer skipped the step. `forward` must not lie in a region under activation
checkpointing, whose second pass would count again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from videofm.errors import DataError, ParallelError
from videofm.models.quantizers.config import QuantizerConfig
from videofm.models.quantizers.pending import Pending
from videofm.models.quantizers.state import StateModule, digest, draw
from videofm.models.quantizers.usage import UsageWindow

if TYPE_CHECKING:
    from videofm.types import Ranks


CHECK_EVERY = 100
"""Updates from one comparison of the whole state between ranks to the next; the counters are compared in each `metrics`."""


@dataclass(frozen=True)
class QuantizerOutput:
    """What a quantizer makes of latents.

    `z_q` has the shape and dtype of `z` `(B, D, T, H, W)`, with the straight-through gradient. `indices` are int64,
    `(B, T, H, W)` of one book or `(B, T, H, W, Q)` of several; -1 where a book was left out. `losses` are means over the tokens
    of each sample, `(B,)` float32, and `loss` `(B,)` is their sum with the weights of the config.
    """

    z_q: Tensor
    indices: Tensor
    loss: Tensor
    losses: Mapping[str, Tensor]


@dataclass(frozen=True)
class Found:
    """What a kind finds for tokens: codes `(B, L, D)` without gradient, indices `(B, L, Q)`, and losses of each token `(B, L)`.

    `inputs` `(Q, B, L, D)`, for kinds whose update sums vectors, is what each book was given. `counts` says whether the indices
    are of codes that are in use already, to be counted.
    """

    codes: Tensor
    indices: Tensor
    losses: Mapping[str, Tensor]
    inputs: Tensor | None = None
    counts: bool = True


@dataclass(frozen=True)
class Counters:
    """Where the state stands: see `Quantizer.counters`."""

    seed: int
    num_updates: int
    num_probes: int
    num_collected: int
    started: bool
    num_revived: int


class Quantizer(StateModule, ABC):
    """See the head of this file. `vocab_sizes` are the numbers of codes of the books, `dim` the channels of latents.

    State, all in the state dict and of a dtype that casts do not change: `counters` (int64: seed, updates so far, vectors in
    the probe, vectors in the reservoir of a start, whether that start is done, codes that were revived), `probe` `(P, D)` (the
    first vectors that were seen) with `probe_indices` `(P, Q)`, and the counts of the usage window. What has been collected
    since the last `update` is no state: loading drops it.
    """

    config_class: ClassVar[type[QuantizerConfig]]
    any_prefix: ClassVar[bool] = False
    """Whether `codes` also takes the first books only, and -1 for a book that is left out."""
    counters: Tensor
    probe: Tensor
    probe_indices: Tensor

    def __init__(
        self,
        config: QuantizerConfig,
        vocab_sizes: tuple[int, ...],
        dim: int,
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
        sums_inputs: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.vocab_sizes, self.dim, self.weights = config, vocab_sizes, dim, dict(weights or {})
        self.register_buffer("counters", torch.tensor([seed, 0, 0, 0, 1, 0]))
        self.register_buffer("probe", torch.zeros(config.probe_size, dim))
        self.register_buffer("probe_indices", torch.full((config.probe_size, len(vocab_sizes)), -1))
        self.usage = UsageWindow(len(vocab_sizes), max(vocab_sizes), config.usage_tokens * max(vocab_sizes))
        self._pending = Pending(len(vocab_sizes), max(vocab_sizes), dim if sums_inputs else 0)
        self._is_checked = False  # between ranks, since it was built or loaded

    @property
    def num_books(self) -> int:
        """Indices of a token."""
        return len(self.vocab_sizes)

    @property
    def bits_per_token(self) -> float:
        """What the indices of a token can tell, in bits."""
        return sum(math.log2(size) for size in self.vocab_sizes)

    @property
    def is_ready(self) -> bool:
        """Whether the book has started; before that, training passes latents through and eval mode has a random book."""
        return self.read_counters().started

    @property
    def num_start_vectors(self) -> int:
        """Vectors that the start of the books needs; 0 where they need none."""
        return 0

    def start_told(self) -> str:
        """`N of M start vectors`: how far the start is, for messages."""
        return f"{self.read_counters().num_collected} of {self.num_start_vectors} start vectors"

    # What a kind has to say.

    @abstractmethod
    def quantize(self, tokens: Tensor) -> Found:
        """The codes of `tokens` `(B, L, D)`, which are `bounded` float32."""

    @abstractmethod
    def search(self, x: Tensor) -> Tensor:
        """The indices `(N, Q)` of vectors `(N, D)`, with all books."""

    @abstractmethod
    def lookup(self, indices: Tensor) -> Tensor:
        """The codes `(..., D)` float32 of `indices` `(..., Q)` in range; -1, in kinds that have it, adds nothing."""

    def bounded(self, z: Tensor) -> Tensor:
        """`z` `(B, D, T, H, W)` as it is searched for, float32: itself, unless a kind bounds or normalises it."""
        return z

    def num_vectors(self, counters: Counters) -> int:
        """How many vectors of the global batch this step's update wants."""
        return self.config.probe_size - counters.num_probes

    def learn(self, counts: Tensor, sums: Tensor, vectors: Tensor, counters: Counters) -> Counters:
        """Change the books after a step, from `counts` `(Q, V)`, `sums` `(Q, V, D)` and some `vectors` of the global batch."""
        return counters

    def inexact(self, before: Counters, after: Counters) -> tuple[Tensor, ...]:
        """State that the update between these counters may have left with other last bits on each rank.

        `update` takes the first rank's. Sums by index have no fixed order on GPUs.
        """
        return ()

    def emptied(self, counters: Counters) -> frozenset[str]:
        """Names of saved buffers that hold nothing any more, so that ranks need not compare them."""
        return frozenset()

    # What all kinds do.

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantise `z` `(B, D, T, H, W)` of any float dtype; only tokens that are True in `mask` `(B, T, H, W)` count.

        In training mode this collects what `update` needs.

        Raises:
            DataError: `z` or `mask` of another shape.
        """
        self._check(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            bounded = self.bounded(z.float())
            tokens = rearrange(bounded, "b d t h w -> b (t h w) d")
            kept = torch.ones_like(tokens[..., 0], dtype=torch.bool) if mask is None else mask.flatten(1)
            found = self.quantize(tokens)
            if self.training:
                self._collect(tokens, kept, found)
            shape = dict(zip("thw", z.shape[2:], strict=True))
            codes = rearrange(found.codes, "b (t h w) d -> b d t h w", **shape)
            z_q = codes + (bounded - bounded.detach())  # the difference is exactly 0, so that z_q is the code bit for bit
            losses = {name: _mean(values, kept) for name, values in found.losses.items()}
        loss = torch.zeros(len(z), device=z.device)
        for name, value in losses.items():
            loss = loss + self.weights[name] * value
        indices = rearrange(found.indices, "b (t h w) q -> b t h w q", **shape)
        return QuantizerOutput(z_q.to(z.dtype), indices.squeeze(-1) if self.num_books == 1 else indices, loss, losses)

    def codes(self, indices: Tensor) -> Tensor:
        """The codes `(B, D, T, H, W)` float32 of `indices`, as `forward` gives them.

        Raises:
            DataError: indices of another shape, or out of range.
        """
        table = indices.unsqueeze(-1) if self.num_books == 1 else indices
        self._check_indices(table)
        with torch.autocast(indices.device.type, enabled=False):
            return rearrange(self.lookup(table.long()), "b t h w d -> b d t h w")

    @torch.no_grad()
    def update(self, ranks: Ranks) -> None:
        """Take in what was collected since the last call, on all ranks; once after each optimizer step, on every rank."""
        counters, pending = self.read_counters(), self._pending
        flat = ranks.sum(pending.flat(self.counters.device))
        num = self.num_vectors(counters)
        vectors = pending.vectors(self.dim, self.counters.device)
        if num:
            vectors = draw(ranks.gather(vectors), num, counters.seed, counters.num_updates)
        pending.clear()
        if not bool(flat[-1] > 0):
            return
        first, end = counters.num_probes, min(counters.num_probes + len(vectors), len(self.probe))
        self.probe[first:end] = vectors[: end - first]
        counts = pending.counts_of(flat)
        self.usage.add(counts)
        before, counters = counters, self.learn(counts, pending.sums_of(flat), vectors, counters)
        for tensor in self.inexact(before, counters):  # also of one data rank, which others may share samples with
            tensor.copy_(ranks.gather(tensor)[: len(tensor)])
        values = {**vars(counters), "num_updates": counters.num_updates + 1, "num_probes": end}
        self.counters.copy_(torch.tensor([int(value) for value in values.values()]))

    def discard(self) -> None:
        """Drop what was collected since the last `update`: the optimizer skipped the step."""
        self._pending.clear()

    @torch.no_grad()
    def metrics(self, ranks: Ranks) -> dict[str, float]:
        """Numbers for the log; all ranks must ask.

        `usage`, the share of codes used in the window of the last tokens; `perplexity` of their use, in codes; `dead`, how many
        codes were not used; `churn`, the share of the probe's indices that changed since the last call. Of several books the
        mean (`dead`: the sum), and usage and perplexity of each. Before a code has been counted: only `start`, how much of what
        the start of the book needs is there.

        Raises:
            ParallelError: the state differs between ranks. The counters are compared in every call; all of it in the first one
                after it was built or loaded, and where the number of updates is a multiple of `CHECK_EVERY`.
        """
        counters = self.read_counters()
        self._check_equal(ranks, counters)
        books = self.usage.summary()
        if not any(book[1] for book in books):
            return {"start": self.start_share(counters)}
        values = {
            "usage": sum(book[0] for book in books) / len(books),
            "perplexity": sum(book[1] for book in books) / len(books),
            "dead": float(sum(book[2] for book in books)),
        }
        if len(books) > 1:
            for number, (use, spread, _) in enumerate(books):
                values |= {f"usage_{number}": use, f"perplexity_{number}": spread}
        return values | self._churn(counters.num_probes) | self.more_metrics(counters)

    def start_share(self, counters: Counters) -> float:
        """How much of the vectors that a start needs there is, in [0, 1]."""
        return counters.num_collected / self.num_start_vectors if self.num_start_vectors else 1.0

    def more_metrics(self, counters: Counters) -> dict[str, float]:
        """Numbers that only this kind has."""
        return {}

    def read_counters(self) -> Counters:
        """The counters, on the host."""
        seed, num_updates, num_probes, num_collected, started, num_revived = self.counters.tolist()
        return Counters(seed, num_updates, num_probes, num_collected, bool(started), num_revived)

    @torch.no_grad()
    def _collect(self, tokens: Tensor, kept: Tensor, found: Found) -> None:
        indices = found.indices.masked_fill(~kept.unsqueeze(-1), -1) if found.counts else torch.full_like(found.indices, -1)
        inputs = None if found.inputs is None else found.inputs.flatten(1, 2)
        self._pending.add_tokens(kept.sum(), indices.flatten(0, 1), inputs)
        counters = self.read_counters()
        num = self.num_vectors(counters)
        if num:
            self._pending.add_vectors(tokens.detach()[kept], num, counters.seed, counters.num_updates)

    def _churn(self, num_probes: int) -> dict[str, float]:
        if not num_probes:
            return {}
        before, now = self.probe_indices[:num_probes].clone(), self.search(self.probe[:num_probes])
        if self.training:
            self.probe_indices[:num_probes] = now
        known = before[:, 0] >= 0
        return {"churn": float((before != now)[known].float().mean())} if bool(known.any()) else {}

    def _check(self, z: Tensor, mask: Tensor | None) -> None:
        if z.ndim != 5 or z.shape[1] != self.dim or not z.is_floating_point():
            raise DataError(
                f"a quantizer of {self.dim} channels takes floating-point latents (B, {self.dim}, T, H, W), got {z.dtype} "
                f"{tuple(z.shape)}. Set its dim to the width of what comes before it."
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (len(z), *z.shape[2:])):
            raise DataError(
                f"the mask of latents {tuple(z.shape)} is bool {(len(z), *z.shape[2:])}, got {mask.dtype} {tuple(mask.shape)}."
            )

    def _check_indices(self, table: Tensor) -> None:
        """Refuse a table `(B, T, H, W, Q)` that no forward pass of this quantizer makes."""
        num = table.shape[-1]
        fits = 1 <= num <= self.num_books if self.any_prefix else num == self.num_books
        if table.ndim != 5 or not fits or table.is_floating_point():
            last = "" if self.num_books == 1 else f", {self.num_books}"
            raise DataError(f"indices here are integers (B, T, H, W{last}), got {table.dtype} {tuple(table.shape)}.")
        if not table.numel():
            return
        sizes = torch.tensor(self.vocab_sizes[:num], device=table.device)
        if bool(((table < (-1 if self.any_prefix else 0)) | (table >= sizes)).any()):
            raise DataError(
                f"indices from {int(table.min())} to {int(table.max())}; this quantizer has codes 0 to "
                f"{max(self.vocab_sizes) - 1}. They are of another tokenizer, or hold special tokens of a model of text."
            )

    def _check_equal(self, ranks: Ranks, counters: Counters) -> None:
        if ranks.data_degree == 1:
            return
        names = {"counters"}
        if not self._is_checked or counters.num_updates % CHECK_EVERY == 0:
            names = set(self.state_dict()) - self.emptied(counters)
        # Ranks that disagree on what to compare gather the same shape all the same: an error, and no deadlock.
        digests = ranks.gather(digest(self, names)).tolist()
        if len(set(digests)) > 1:
            raise ParallelError(
                f"the state of quantizer {self.config.kind} differs between ranks after {counters.num_updates} "
                f"updates (digests {', '.join(f'{value & 0xFFFFFFFF:08x}' for value in digests)}). Every rank must load the "
                "same checkpoint and call update after every step."
            )
        self._is_checked = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._pending.clear()
        self._is_checked = False
        super()._load_from_state_dict(state_dict, prefix, *args)


def _mean(values: Tensor, kept: Tensor) -> Tensor:
    """The mean over the kept tokens of each sample, `(B, L)` -> `(B,)`; 0 where none is kept."""
    return torch.where(kept, values, 0.0).sum(1) / kept.sum(1).clamp(min=1)
