"""Laws of the noise level sigma of a training sample. A law is its quantile function, so a draw is a function of a uniform.

Sources: logit-normal levels from Esser et al. 2024 (arXiv 2403.03206, section 3.1); the shift with the token count from
LTX-Video (arXiv 2501.00103; spec C.4), without the tail floor of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from videofm.config.train import LogitNormalNoiseLevels, NoiseLevels, ShiftedLogitNormalNoiseLevels, UniformNoiseLevels


@dataclass(frozen=True)
class NoiseLevelLaw:
    """The law that a config section describes: uniform, logit-normal, or logit-normal shifted by the token count."""

    config: NoiseLevels

    def location(self, num_tokens: int) -> float:
        """Mean of `logit(sigma)` for samples of `num_tokens` latent tokens; 0 for the uniform law."""
        match self.config:
            case UniformNoiseLevels():
                return 0.0
            case LogitNormalNoiseLevels(mean=mean):
                return mean
            case ShiftedLogitNormalNoiseLevels() as law:
                slope = (law.max_shift - law.base_shift) / (law.max_tokens - law.base_tokens)
                return law.base_shift + slope * (num_tokens - law.base_tokens)

    def quantile(self, probability: Tensor, num_tokens: int) -> Tensor:
        """The sigma below which a share `probability` in [0, 1] of the draws lies; float32, shape of `probability`."""
        if isinstance(self.config, UniformNoiseLevels):
            return probability.float()
        # In double: the normal quantile of a probability near 0 or 1 is steep.
        normal = torch.special.ndtri(probability.double())
        return torch.sigmoid(self.location(num_tokens) + self.config.std * normal).float()

    def sample(self, uniform: Tensor, num_tokens: int) -> Tensor:
        """One sigma for each draw of `uniform` in [0, 1); a deterministic, increasing function of the draw."""
        return self.quantile(uniform, num_tokens)
