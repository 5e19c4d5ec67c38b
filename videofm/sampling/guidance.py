"""Guidance: velocities of several evaluations become one.

Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), its rescale (Lin et al. 2023, arXiv 2305.08891), its interval
(Kynkaanniemi et al. 2024, arXiv 2404.07724), CFG-star (Fan et al. 2025, arXiv 2503.18886), the linear decay of Step-Video
(spec A10) and skip guidance (`perturbation`); the order in which they meet is that of LTX-Video (spec C.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from videofm.config.sample import GuidanceConfig
from videofm.sampling.perturbation import Perturbation, perturbed
from videofm.sampling.solvers import VelocityFn
from videofm.types import Conditioning

_STAR_EPS = 1e-8
_DECAY = 9.0
"""Slope of Step-Video's decay: guidance is 1 from t = 1 / 9 on (t = 1 - sigma)."""


def cfg(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    """`negative + scale * (positive - negative)`, velocities `(B, L, C)`."""
    return negative + scale * (positive - negative)


def star(negative: Tensor, positive: Tensor) -> Tensor:
    """`negative` times `<positive, negative> / |negative|^2` of each sample: the part of `positive` along it."""
    along = (positive * negative).sum(dim=(1, 2), keepdim=True)
    return negative * (along / (negative.square().sum(dim=(1, 2), keepdim=True) + _STAR_EPS))


def rescaled(guided: Tensor, positive: Tensor, phi: float) -> Tensor:
    """`guided * (phi * std(positive) / std(guided) + 1 - phi)`, standard deviations over each sample."""
    ratio = positive.std(dim=(1, 2), keepdim=True) / guided.std(dim=(1, 2), keepdim=True)
    return guided * (phi * ratio + 1 - phi)


def linear_decay(scale: float, sigma: float) -> float:
    """`max(scale - 9 t (scale - 1), 1)` with `t = 1 - sigma`: `scale` at pure noise, 1 from sigma 8/9 down."""
    return max(scale - _DECAY * (1.0 - sigma) * (scale - 1.0), 1.0)


@dataclass(frozen=True)
class Guidance:
    """How a velocity is guided.

    Attributes:
        scale: of classifier-free guidance; 1 is off and costs no evaluation.
        rescale: phi of `rescaled`; 0 is off.
        interval: lowest and highest noise level with guidance of any kind; elsewhere a step is one plain evaluation.
        star: project the negative velocity first, see `star`.
        decay: let `scale` fall with the noise level, see `linear_decay`.
        perturbation: skip guidance, one more evaluation; None is off.
    """

    scale: float = 3.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    star: bool = False
    decay: bool = False
    perturbation: Perturbation | None = None

    @classmethod
    def from_config(cls, scale: float, config: GuidanceConfig) -> Guidance:
        """The guidance that a config section describes."""
        found = config.perturbation
        perturbation = None if found is None else Perturbation(tuple(found.blocks), found.scale, found.mode)
        low, high = config.interval
        return cls(scale, config.rescale, (low, high), config.star, config.decay, perturbation)

    @property
    def constant(self) -> bool:
        """Whether it is the same at every noise level."""
        return self.interval == (0.0, 1.0) and not self.decay

    def at(self, sigma: float) -> Guidance:
        """What is left of it at noise level `sigma`."""
        low, high = self.interval
        if not low <= sigma <= high:
            return _OFF
        scale = linear_decay(self.scale, sigma) if self.decay else self.scale
        return Guidance(scale, self.rescale, star=self.star, perturbation=self.perturbation)

    def combine(self, positive: Tensor, negative: Tensor | None, disturbed: Tensor | None) -> Tensor:
        """One velocity out of those of the prompt, the negative prompt (None: not evaluated) and the disturbed model."""
        guided = positive
        if negative is not None:
            guided = cfg(star(negative, positive) if self.star else negative, positive, self.scale)
        if disturbed is not None and self.perturbation is not None:
            guided = guided + self.perturbation.scale * (positive - disturbed)
        return guided if self.rescale == 0 or guided is positive else rescaled(guided, positive, self.rescale)


_OFF = Guidance(scale=1.0)


@dataclass(frozen=True)
class TokenFeatures:
    """What an injection reads: features `(B, L, C)` of the tokens, and `kept` `(B, L)` bool, False where the model's null
    feature stands. `in_negative` says whether the evaluation of the negative prompt has them too: then guidance strengthens
    the text alone, else the features with it.
    """

    tokens: Tensor
    kept: Tensor
    in_negative: bool = False

    def arguments(self, with_negative: bool, with_disturbed: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        """What a DiT is called with besides, for the evaluations of a step in the order of `guided_velocity`."""
        negative = [self.kept if self.in_negative else torch.zeros_like(self.kept)] * with_negative
        kept = torch.cat([*negative, *[self.kept] * (1 + with_disturbed)])
        return {"features": self.tokens.to(dtype).repeat(1 + with_negative + with_disturbed, 1, 1), "features_kept": kept}


def guided_velocity(
    dit: nn.Module,
    positive: Conditioning,
    negative: Conditioning,
    coordinates: Tensor,
    guidance: Guidance,
    features: TokenFeatures | None = None,
) -> VelocityFn:
    """The guided velocity as a function of (noisy, sigma): all evaluations of a step in one batch.

    Args:
        dit: the model.
        positive: text of the prompts, B of them.
        negative: text to move away from, B of them; not read where the scale is 1.
        coordinates: `(B, 3, L)`, from `dit.coordinates`.
        guidance: what to do. Its noise level is the highest of the tokens: given tokens have lower ones of their own.
        features: of the tokens, for a model with an injection.
    """

    @cache
    def texts(with_negative: bool, with_disturbed: bool) -> Conditioning:
        return joined([negative] * with_negative + [positive] + [positive] * with_disturbed)

    @cache
    def guiding(with_negative: bool, with_disturbed: bool) -> dict[str, Tensor]:
        return {} if features is None else features.arguments(with_negative, with_disturbed, positive.embeddings.dtype)

    def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
        here = guidance if guidance.constant else guidance.at(float(sigma.max()))
        with_negative, with_disturbed = here.scale != 1.0, here.perturbation is not None
        copies, rows = 1 + with_negative + with_disturbed, len(noisy)
        text = texts(with_negative, with_disturbed)
        disturbing = perturbed(dit, here.perturbation, (copies - 1) * rows) if here.perturbation else nullcontext()
        with disturbing:
            predicted = dit(
                noisy.to(text.embeddings.dtype).repeat(copies, 1, 1),
                sigma.repeat(copies, *[1] * (sigma.ndim - 1)),
                text,
                coordinates.repeat(copies, 1, 1),
                **guiding(with_negative, with_disturbed),
            ).float()
        parts = list(predicted.split(rows))
        without = parts.pop(0) if with_negative else None
        return here.combine(parts[0], without, parts[1] if with_disturbed else None)

    return velocity


def joined(texts: Sequence[Conditioning]) -> Conditioning:
    """One batch of all `texts`, shorter ones padded with masked tokens."""
    length = max(text.mask.shape[1] for text in texts)
    embeddings = [pad(text.embeddings, (0, 0, 0, length - text.mask.shape[1])) for text in texts]
    masks = [pad(text.mask, (0, length - text.mask.shape[1])) for text in texts]
    clips = [text.clip_embeddings for text in texts if text.clip_embeddings is not None]
    return Conditioning(torch.cat(embeddings), torch.cat(masks), torch.cat(clips) if clips else None)
