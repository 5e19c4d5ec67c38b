"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): from the velocity of the empty prompt past the prompt's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from videofm.sampling.solvers import VelocityFn
from videofm.types import Conditioning


def guided_velocity(
    dit: nn.Module, positive: Conditioning, negative: Conditioning, coordinates: Tensor, scale: float
) -> VelocityFn:
    """`v = v_negative + scale * (v_positive - v_negative)` as a function of (noisy, sigma).

    Args:
        dit: the model.
        positive: text of the prompts, B of them.
        negative: text to move away from, B of them; not read when `scale` is 1.
        coordinates: `(B, 3, L)` as in `videofm.ops.rope`.
        scale: 1 is no guidance and costs one evaluation a step, else two in one batch of 2B.
    """
    if scale == 1.0:
        return lambda noisy, sigma: dit(noisy, sigma, positive, coordinates).float()
    both = Conditioning(torch.cat([negative.embeddings, positive.embeddings]), torch.cat([negative.mask, positive.mask]))
    twice = torch.cat([coordinates, coordinates])

    def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
        predicted = dit(torch.cat([noisy, noisy]), torch.cat([sigma, sigma]), both, twice).float()
        without, with_prompt = predicted.chunk(2)
        return without + scale * (with_prompt - without)

    return velocity
