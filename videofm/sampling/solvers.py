"""Integrate the flow from noise to data along a list of noise levels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""noisy `(B, L, C)` float32 and sigma `(B,)` -> velocity `(B, L, C)`."""


def euler(velocity: VelocityFn, noise: Tensor, sigmas: Tensor, on_step: Callable[[], None] | None = None) -> Tensor:
    """Euler's method; latents stay in float32 between steps.

    Args:
        velocity: the model; d noisy / d sigma.
        noise: `(B, L, C)`, the state at `sigmas[0]`.
        sigmas: `(num_steps + 1,)`, falling, from `Schedule.sigmas`.
        on_step: called after every step; may raise to stop.

    Returns:
        `(B, L, C)` float32, the state at the last sigma.
    """
    state = noise.float()
    for sigma, following in pairwise(sigmas.to(state.device)):
        state = state + (following - sigma) * velocity(state, sigma.expand(len(state))).float()
        if on_step is not None:
            on_step()
    return state
