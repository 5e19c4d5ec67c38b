"""How the codes are used: counts over a sliding window of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from videofm.models.quantizers.state import StateModule

NUM_SLOTS = 5
"""Parts of the window: one that fills, and four that together have the asked number of tokens."""


class UsageWindow(StateModule):
    """Counts of the codes of the last `num_tokens` tokens or somewhat more (up to 5/4), over all ranks.

    The window is made of slots: the first is added to; once it has a quarter of the tokens, a new one begins, and the oldest
    goes.
    """

    counts: Tensor

    def __init__(self, num_books: int, vocab_size: int, num_tokens: int) -> None:
        super().__init__()
        self.slot_tokens = math.ceil(num_tokens / (NUM_SLOTS - 1))
        self.register_buffer("counts", torch.zeros(NUM_SLOTS, num_books, vocab_size, dtype=torch.int64))

    @torch.no_grad()
    def add(self, counts: Tensor) -> None:
        """Take in the counts `(num_books, V)` of one step."""
        self.counts[0] += counts.round().long()
        full = self.counts[0].sum(1).max() >= self.slot_tokens
        rolled = self.counts.roll(1, 0)
        rolled[0] = 0
        self.counts.copy_(torch.where(full, rolled, self.counts))

    @torch.no_grad()
    def summary(self) -> list[tuple[float, float, int]]:
        """For each book: the share of codes that were used, the perplexity `exp(H)` of their use, and how many were not used.

        A book of which nothing was counted yet has the use 0 and the perplexity 0.
        """
        totals = self.counts.sum(0).double()  # (num_books, V)
        shares = totals / totals.sum(1, keepdim=True).clamp(min=1)
        perplexity = torch.special.entr(shares).sum(1).exp() * (totals.sum(1) > 0)
        used = (totals > 0).sum(1)
        table = torch.stack([used.double() / totals.shape[1], perplexity, (totals.shape[1] - used).double()], 1)
        return [(use, spread, int(unused)) for use, spread, unused in table.tolist()]
