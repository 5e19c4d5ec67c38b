"""`vq`: a codebook that is a parameter, trained by gradients (VQ-VAE, arXiv 1711.00937; normalised: VQGAN of arXiv 2110.04627).

Plain, it is known to use few of its codes; with `normalise` (codes and vectors on the unit sphere, few channels) most of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from videofm.models.quantizers.base import Found, Quantizer
from videofm.models.quantizers.config import QuantizerConfig
from videofm.models.quantizers.search import nearest


@dataclass(frozen=True, kw_only=True)
class VQConfig(QuantizerConfig):
    """`codebook_size` codes of `dim` channels; the weights are of mean squares over channels, each with one side held fixed."""

    kind: str = "vq"
    codebook_size: int = 1024
    dim: int = 8
    normalise: bool = False
    commit_weight: float = 0.25
    codebook_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within("codebook_size", 2)
        self.within("dim", 1)
        self.within("commit_weight", 0)
        self.within("codebook_weight", 0)


class VectorQuantizer(Quantizer):
    """See the head of this file."""

    config_class: ClassVar[type[QuantizerConfig]] = VQConfig

    def __init__(self, config: VQConfig) -> None:
        weights = {"codebook": config.codebook_weight, "commit": config.commit_weight}
        super().__init__(config, (config.codebook_size,), config.dim, weights)
        self.normalise = config.normalise
        self.codebook = nn.Parameter(torch.randn(config.codebook_size, config.dim) / config.dim**0.5)

    def bounded(self, z: Tensor) -> Tensor:
        """`z`, on the unit sphere with `normalise`."""
        return normalize(z, dim=1) if self.normalise else z

    def book(self, rows: Tensor) -> Tensor:
        """The codes `(..., D)` float32, with gradient, of the rows `(..., D)` of the codebook."""
        return normalize(rows.float(), dim=-1) if self.normalise else rows.float()

    def quantize(self, tokens: Tensor) -> Found:
        """See the base."""
        indices = self.search(tokens.detach().flatten(0, 1)).view(*tokens.shape[:2], 1)
        codes = self.book(self.codebook[indices.squeeze(-1)])
        return Found(codes.detach(), indices, code_losses(tokens, codes))

    def search(self, x: Tensor) -> Tensor:
        """See the base."""
        return nearest(x, self.book(self.codebook.detach())).unsqueeze(1)

    def lookup(self, indices: Tensor) -> Tensor:
        """See the base."""
        return self.book(self.codebook[indices.squeeze(-1)]).detach()


def code_losses(tokens: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """`codebook`: the codes move to the tokens; `commit`: the tokens to the codes. Mean squares over channels, `(B, L)`."""
    return {"codebook": (tokens.detach() - codes).square().mean(-1), "commit": (tokens - codes.detach()).square().mean(-1)}
