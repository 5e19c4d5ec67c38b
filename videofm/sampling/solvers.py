"""Integrate the flow from noise to data along noise levels, one for the sample or one for each token."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from videofm.ops.flow import broadcast_sigma

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""noisy `(B, L, C)` float32 and sigma `(B,)` or `(B, L)` -> velocity `(B, L, C)`."""
Solver = Callable[[VelocityFn, Tensor, Tensor, Callable[[], None] | None], Tensor]


def capped(sigmas: Tensor, ceilings: Tensor) -> Tensor:
    """A level for each token: `(num_steps + 1, B, L)`, the schedule cut off at what each token starts with.

    Args:
        sigmas: `(num_steps + 1,)` of the schedule.
        ceilings: `(B, L)` noise level of each token at the start; 0 is a token that is given and never moves.
    """
    return torch.minimum(sigmas.to(ceilings.device)[:, None, None], ceilings)  # (N + 1, 1, 1) with (B, L)


def euler(velocity: VelocityFn, noise: Tensor, levels: Tensor, on_step: Callable[[], None] | None = None) -> Tensor:
    """Euler's method; the state stays in float32 between steps.

    Args:
        velocity: the model; d noisy / d sigma.
        noise: `(B, L, C)`, the state at `levels[0]`.
        levels: falling noise levels, `(num_steps + 1,)` of a schedule or `(num_steps + 1, B, L)` of `capped`. A token whose
            level does not change in a step keeps its bits, whatever the velocity.
        on_step: called after every step; may raise to stop.

    Returns:
        `(B, L, C)` float32, the state at the last level.
    """
    state = noise.float()
    for sigma, following in _steps(levels, state):
        state = _moved(state, velocity(state, sigma), sigma, following)
        if on_step is not None:
            on_step()
    return state


def heun(velocity: VelocityFn, noise: Tensor, levels: Tensor, on_step: Callable[[], None] | None = None) -> Tensor:
    """Heun's method of second order: a step of Euler, then the mean of the velocities at both of its ends.

    A step that ends at 0 for all tokens stays one of Euler, so that the model is not asked about pure data, of which it has
    seen next to nothing. One such step does not change the order (its error is that of one step, h squared). N steps take
    2 N - 1 evaluations. Arguments and result as in `euler`.
    """
    state = noise.float()
    for sigma, following in _steps(levels, state):
        slope = velocity(state, sigma).float()
        if bool(following.any()):
            ahead = velocity(_moved(state, slope, sigma, following), following).float()
            slope = (slope + ahead) / 2
        state = _moved(state, slope, sigma, following)
        if on_step is not None:
            on_step()
    return state


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun}


def _steps(levels: Tensor, state: Tensor) -> list[tuple[Tensor, Tensor]]:
    # Levels of a schedule become (B,); those of tokens are (B, L) already.
    levels = levels.to(state.device)
    return list(pairwise(levels if levels.ndim > 1 else levels[:, None].expand(-1, len(state))))


def _moved(state: Tensor, velocity: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
    step = broadcast_sigma(following - sigma, state)
    return torch.where(step == 0, state, state + step * velocity.float())
