"""`rvq`: several codebooks, each for what the ones before it left (SoundStream, arXiv 2107.03312), updated as `vq_ema` is.

One straight-through step over the sum of all codes, so that the gradient reaches the encoder once and not once a level; the
commitment of every level reaches it too. Any number of first levels decodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from videofm.models.quantizers.base import Counters
from videofm.models.quantizers.config import QuantizerConfig
from videofm.models.quantizers.ema import EMAConfig, EMAQuantizer
from videofm.models.quantizers.state import generator


@dataclass(frozen=True, kw_only=True)
class RVQConfig(EMAConfig):
    """`num_levels` books of `codebook_size` codes each; the commitment loss is the mean over levels.

    With the probability `level_dropout` a training step uses only the first levels, from one to all but one. The draw is a
    function of the seed and the number of updates: the same on all ranks and for all micro-batches of a step.
    """

    kind: str = "rvq"
    codebook_size: int = 1024
    num_levels: int = 4
    level_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.within("num_levels", 1)
        self.within("level_dropout", 0, 1)
        self.only_with("num_levels", 1, "level_dropout")


class ResidualQuantizer(EMAQuantizer):
    """See the head of this file."""

    config_class: ClassVar[type[QuantizerConfig]] = RVQConfig
    any_prefix: ClassVar[bool] = True

    def __init__(self, config: RVQConfig) -> None:
        super().__init__(config, config.num_levels)
        self.level_dropout = config.level_dropout

    def levels_in_use(self, counters: Counters) -> int:
        """See the base."""
        if self.level_dropout == 0 or self.num_books == 1:
            return self.num_books
        draws = generator(counters.seed, counters.num_updates, "levels")
        cut = torch.rand(1, generator=draws, device="cpu").item() < self.level_dropout
        return int(torch.randint(1, self.num_books, (1,), generator=draws, device="cpu")) if cut else self.num_books
