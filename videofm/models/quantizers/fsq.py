"""`fsq`: each channel is bounded and rounded to a few levels; there is no codebook (FSQ, arXiv 2309.15505).

Nothing is learned or kept equal between ranks, every code exists, and no loss is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from videofm.errors import ConfigError
from videofm.models.quantizers.base import Found, Quantizer
from videofm.models.quantizers.config import QuantizerConfig

MARGIN = 1e-3
"""The bound reaches this much past the outermost levels, so that rounding finds them."""

MAX_CODES = 2**24
"""Above it, float32 cannot count the uses of a code next to the tokens of a step."""


@dataclass(frozen=True, kw_only=True)
class FSQConfig(QuantizerConfig):
    """`levels` are the numbers of values of the channels, each at least 3; `dim` is how many they are."""

    kind: str = "fsq"
    levels: tuple[int, ...] = (8, 5, 5, 5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.levels or min(self.levels) < 3:
            raise ConfigError(
                f"quantizer fsq: levels are {self.levels}; it needs at least one, each at least 3 (two levels would lie on one "
                "side of the bound and almost always round to the same)."
            )
        if math.prod(self.levels) > MAX_CODES:
            raise ConfigError(
                f"quantizer fsq: levels {self.levels} make {math.prod(self.levels)} codes; at most {MAX_CODES} can be counted."
            )

    @property
    def dim(self) -> int:
        """Channels of the latents."""
        return len(self.levels)


class FSQ(Quantizer):
    """See the head of this file. The codes of a channel of n levels lie in [-1, 1], `k / (n // 2)` for integers k.

    Index = sum over channels of digit times the product of the levels before it, as in the public implementations.
    """

    config_class: ClassVar[type[QuantizerConfig]] = FSQConfig

    def __init__(self, config: FSQConfig) -> None:
        super().__init__(config, (math.prod(config.levels),), len(config.levels))
        self.levels = config.levels

    def bounded(self, z: Tensor) -> Tensor:
        """`z` in units of the code, before it is rounded; the gradient of `z_q` goes through this bound, as in the paper."""
        levels, half = self._levels(z)
        reach = (levels - 1) * (1 + MARGIN) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        shift = torch.atanh(offset / reach)
        # (D,) -> (D, 1, 1, 1), against (B, D, T, H, W)
        reach, offset, shift, half = (value.view(-1, 1, 1, 1) for value in (reach, offset, shift, half))
        return (torch.tanh(z + shift) * reach - offset) / half

    def quantize(self, tokens: Tensor) -> Found:
        """See the base."""
        indices = self.search(tokens.detach())
        return Found(self.lookup(indices), indices, {})

    def search(self, x: Tensor) -> Tensor:
        """See the base."""
        levels, half = self._levels(x)
        digits = (x * half).round().long() + half.long()
        return (digits.clamp(min=0).minimum(levels.long() - 1) * self._strides(x)).sum(-1, keepdim=True)

    def lookup(self, indices: Tensor) -> Tensor:
        """See the base."""
        levels, half = self._levels(indices)
        digits = indices // self._strides(indices) % levels.long()
        return (digits - half.long()).float() / half

    def _levels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The levels and half of them, `(D,)` float32, where `like` is."""
        levels = torch.tensor(self.levels, dtype=torch.float32, device=like.device)
        return levels, levels.div(2, rounding_mode="floor")

    def _strides(self, like: Tensor) -> Tensor:
        strides = [math.prod(self.levels[:number]) for number in range(len(self.levels))]
        return torch.tensor(strides, device=like.device)
