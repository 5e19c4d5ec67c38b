"""Laws of the noise level sigma. A law is its quantile function, so a draw is an increasing function of a uniform one.

Sources: logit-normal and mode levels from Esser et al. 2024 (arXiv 2403.03206, section 3.1); the shift with the token count
and the tails from LTX-Video (arXiv 2501.00103; spec C.4); the shift with resolution from Open-Sora 1.2; the constant shift and
the U shape from Step-Video (arXiv 2502.10248; spec A4, A10).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from videofm.config.flow_matching import (
    ConstantShiftNoiseLevels,
    LogitNormalNoiseLevels,
    ModeNoiseLevels,
    NoiseLevels,
    ResolutionShiftNoiseLevels,
    ShiftedLogitNormalNoiseLevels,
    UniformNoiseLevels,
    UShapedNoiseLevels,
)
from videofm.types import Compression

LOW_TAIL, HIGH_TAIL = 0.005, 0.999
"""The percentiles outside of which `floor` and `stretch` change the shifted law."""
STRETCH_MIN, STRETCH_UNIFORM = 1e-3, 0.1
"""Smallest level of `stretch`, and the share of its levels that are uniform."""
_BISECTIONS = 40


@dataclass(frozen=True)
class ClipShape:
    """The size of a clip: tokens and latent frames, and height and width of its frames in pixels."""

    num_tokens: int
    num_frames: int
    height: int
    width: int

    @classmethod
    def of(cls, latents: Tensor, compression: Compression) -> ClipShape:
        """The size of the clips that latents `(B, C, T, H, W)` stand for."""
        frames, rows, columns = latents.shape[2:]
        return cls(frames * rows * columns, frames, rows * compression.height, columns * compression.width)


@dataclass(frozen=True)
class NoiseLevelLaw:
    """The law that a config section describes."""

    config: NoiseLevels

    def quantile(self, probability: Tensor, clip: ClipShape) -> Tensor:
        """The sigma below which a share `probability` in [0, 1] of the draws for `clip` lies.

        A uniform draw as `probability` makes it a draw of the law.

        Returns:
            float32 in [0, 1], shape of `probability`.
        """
        # In double: quantiles of probabilities near 0 or 1 are steep.
        p = probability.double()
        match self.config:
            case UniformNoiseLevels():
                return p.float()
            case LogitNormalNoiseLevels(mean=mean, std=std):
                return _logit_normal(p, mean, std).float()
            case ShiftedLogitNormalNoiseLevels(std=std, tails=tails) as law:
                return _TAILS[tails](p, location(law, clip.num_tokens), std).float()
            case ModeNoiseLevels(scale=scale):
                # The paper's 1 - u - s (cos^2(pi u / 2) - 1 + u), which falls, at u = 1 - p.
                return (p + scale * (p - torch.sin(math.pi / 2 * p).square())).clamp(0, 1).float()
            case UShapedNoiseLevels(steepness=a):
                # The distribution function is 1/2 + sinh(a (sigma - 1/2)) / (2 sinh(a / 2)).
                return (0.5 + torch.asinh((2 * p - 1) * math.sinh(a / 2)) / a).clamp(0, 1).float()
            case ConstantShiftNoiseLevels(shift=factor, base=base):
                return shift(NoiseLevelLaw(base).quantile(p, clip), factor)
            case ResolutionShiftNoiseLevels(base=base) as law:
                return shift(NoiseLevelLaw(base).quantile(p, clip), resolution_factor(law, clip))


def location(law: ShiftedLogitNormalNoiseLevels, num_tokens: int) -> float:
    """Mean of `logit(sigma)` for clips of `num_tokens` latent tokens: a line through two points, on which it goes on."""
    slope = (law.max_shift - law.base_shift) / (law.max_tokens - law.base_tokens)
    return law.base_shift + slope * (num_tokens - law.base_tokens)


def resolution_factor(law: ResolutionShiftNoiseLevels, clip: ClipShape) -> float:
    """The shift for clips of that many pixels a frame and latent frames; 1 at the base sizes."""
    return law.scale * math.sqrt(clip.height * clip.width / law.base_pixels * clip.num_frames / law.base_frames)


def shift(sigma: Tensor, factor: float) -> Tensor:
    """`factor * sigma / (1 + (factor - 1) * sigma)`: keeps 0 and 1, and multiplies `sigma / (1 - sigma)` by `factor`."""
    return factor * sigma / (1 + (factor - 1) * sigma)


def _logit_normal(p: Tensor, mean: float, std: float) -> Tensor:
    return torch.sigmoid(mean + std * torch.special.ndtri(p))


def _floor(p: Tensor, mean: float, std: float) -> Tensor:
    """Logit-normal between its percentiles; beyond them the density stays what it is there, and all is scaled to mass 1."""
    low, high = (_sigmoid(mean + std * NormalDist().inv_cdf(tail)) for tail in (LOW_TAIL, HIGH_TAIL))
    density_low, density_high = (_logit_normal_density(sigma, mean, std) for sigma in (low, high))
    mass_low, mass_high = density_low * low, density_high * (1 - high)
    mass = (mass_low + HIGH_TAIL - LOW_TAIL + mass_high) * p  # of the unscaled density, from 0 on
    left = mass_low + HIGH_TAIL - LOW_TAIL + mass_high - mass  # and what is left of it to 1
    middle = _logit_normal((mass - mass_low + LOW_TAIL).clamp(LOW_TAIL, HIGH_TAIL), mean, std)
    return torch.where(mass < mass_low, mass / density_low, torch.where(left < mass_high, 1 - left / density_high, middle))


def _stretch(p: Tensor, mean: float, std: float) -> Tensor:
    """The percentiles moved to 0 and 1; below `STRETCH_MIN` reflected there, above 1 set to 1; some draws are uniform."""
    low, high = (_sigmoid(mean + std * NormalDist().inv_cdf(tail)) for tail in (LOW_TAIL, HIGH_TAIL))

    def stretched(sigma: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit((low + sigma * (high - low)).clamp(0, 1)) - mean) / std)

    def distribution(sigma: Tensor) -> Tensor:
        reflected = stretched(sigma) - stretched(2 * STRETCH_MIN - sigma)
        return (1 - STRETCH_UNIFORM) * reflected + STRETCH_UNIFORM * (sigma - STRETCH_MIN) / (1 - STRETCH_MIN)

    below, above = torch.full_like(p, STRETCH_MIN), torch.ones_like(p)
    for _ in range(_BISECTIONS):
        middle = (below + above) / 2
        reached = distribution(middle) >= p
        below, above = torch.where(reached, below, middle), torch.where(reached, middle, above)
    return above


_TAILS: dict[str, Callable[[Tensor, float, float], Tensor]] = {"plain": _logit_normal, "floor": _floor, "stretch": _stretch}


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _logit_normal_density(sigma: float, mean: float, std: float) -> float:
    return NormalDist(mean, std).pdf(math.log(sigma / (1 - sigma))) / (sigma * (1 - sigma))
