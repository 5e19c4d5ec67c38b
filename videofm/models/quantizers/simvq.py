"""`simvq`: the codes are a frozen random basis times one trained linear map (SimVQ, arXiv 2411.02038).

Every code moves in every step, also those that no token chose, so that large codebooks stay in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from videofm.models.quantizers.base import Found, Quantizer
from videofm.models.quantizers.config import QuantizerConfig
from videofm.models.quantizers.search import nearest
from videofm.models.quantizers.state import generator, place
from videofm.models.quantizers.vq import code_losses


@dataclass(frozen=True, kw_only=True)
class SimVQConfig(QuantizerConfig):
    """`codebook_size` codes of `dim` channels. `seed` makes the basis, which is also stored: the same on every rank."""

    kind: str = "simvq"
    codebook_size: int = 65536
    dim: int = 128
    commit_weight: float = 0.25
    codebook_weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within("codebook_size", 2)
        self.within("dim", 1)
        self.within("commit_weight", 0)
        self.within("codebook_weight", 0)


class SimVQ(Quantizer):
    """See the head of this file. The basis `(V, D)` is state (unit variance over `dim`); `project` is what trains."""

    config_class: ClassVar[type[QuantizerConfig]] = SimVQConfig
    basis: Tensor

    def __init__(self, config: SimVQConfig) -> None:
        weights = {"codebook": config.codebook_weight, "commit": config.commit_weight}
        super().__init__(config, (config.codebook_size,), config.dim, weights, config.seed)
        drawn = torch.randn(config.codebook_size, config.dim, generator=generator(config.seed, 0, "basis"), device="cpu")
        self.register_buffer("basis", place(drawn / config.dim**0.5))
        self.project = nn.Linear(config.dim, config.dim)

    def project_rows(self, rows: Tensor) -> Tensor:
        """The codes `(..., D)` float32 of rows `(..., D)` of the basis, with gradient to the linear map."""
        bias = self.project.bias.float()
        return nn.functional.linear(rows, self.project.weight.float(), bias)

    def book(self) -> Tensor:
        """All codes `(V, D)`, without gradient.

        A code is always read from this table: a product of another number of rows can differ in the last bit.
        """
        with torch.no_grad():
            return self.project_rows(self.basis)

    def quantize(self, tokens: Tensor) -> Found:
        """See the base. The loss projects only the rows that were chosen, so that its graph does not hold the table."""
        book = self.book()
        indices = nearest(tokens.detach().flatten(0, 1), book).view(*tokens.shape[:2], 1)
        chosen = indices.squeeze(-1)
        return Found(book[chosen], indices, code_losses(tokens, self.project_rows(self.basis[chosen])))

    def search(self, x: Tensor) -> Tensor:
        """See the base."""
        return nearest(x, self.book()).unsqueeze(1)

    def lookup(self, indices: Tensor) -> Tensor:
        """See the base."""
        return self.book()[indices.squeeze(-1)]
