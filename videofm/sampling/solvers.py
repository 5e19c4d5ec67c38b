"""Integrate the flow from noise to data along noise levels, one for the sample or one for each token."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from videofm.ops import flow
from videofm.ops.flow import broadcast_sigma

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""noisy `(B, L, C)` float32 and sigma `(B,)` or `(B, L)` -> velocity `(B, L, C)`."""
Draw = Callable[[int], Tensor]
"""Number of a step, from 0 -> unit Gaussian `(B, L, C)` float32 of that step."""
Prepare = Callable[[int, Tensor], Tensor]
"""Number of a step, from 0, and the state before it -> the state that it starts from."""
_Move = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""Number of a step, state, its noise level and the next -> the next state."""


class Solver(Protocol):
    """From noise to data."""

    def __call__(
        self,
        velocity: VelocityFn,
        noise: Tensor,
        levels: Tensor,
        on_step: Callable[[], None] | None = None,
        prepare: Prepare | None = None,
    ) -> Tensor:
        """The state at the last level, `(B, L, C)` float32; it stays in float32 between steps.

        Args:
            velocity: the model; d noisy / d sigma.
            noise: `(B, L, C)`, the state at `levels[0]`.
            levels: falling noise levels, `(num_steps + 1,)` of a schedule or `(num_steps + 1, B, L)` of `capped`. A token whose
                level does not change in a step keeps its bits, whatever the velocity.
            on_step: called after every step; may raise to stop.
            prepare: called before every step, to change the state.
        """
        ...


def capped(sigmas: Tensor, ceilings: Tensor) -> Tensor:
    """A level for each token: `(num_steps + 1, B, L)`, the schedule cut off at what each token starts with.

    Args:
        sigmas: `(num_steps + 1,)` of the schedule.
        ceilings: `(B, L)` noise level of each token at the start; 0 is a token that is given and never moves.
    """
    return torch.minimum(sigmas.to(ceilings.device)[:, None, None], ceilings)  # (N + 1, 1, 1) with (B, L)


def euler(
    velocity: VelocityFn,
    noise: Tensor,
    levels: Tensor,
    on_step: Callable[[], None] | None = None,
    prepare: Prepare | None = None,
) -> Tensor:
    """Euler's method. Arguments and result as in `Solver`."""

    def move(number: int, state: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
        return _moved(state, velocity(state, sigma), sigma, following)

    return _along(levels, noise, move, on_step, prepare)


def heun(
    velocity: VelocityFn,
    noise: Tensor,
    levels: Tensor,
    on_step: Callable[[], None] | None = None,
    prepare: Prepare | None = None,
) -> Tensor:
    """Heun's method of second order: a step of Euler, then the mean of the velocities at both of its ends.

    A step that ends at 0 for all tokens stays one of Euler, so that the model is not asked about pure data, of which it has
    seen next to nothing. One such step does not change the order (its error is that of one step, h squared). N steps take
    2 N - 1 evaluations. Arguments and result as in `Solver`.
    """

    def move(number: int, state: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
        slope = velocity(state, sigma).float()
        if bool(following.any()):
            ahead = velocity(_moved(state, slope, sigma, following), following).float()
            slope = (slope + ahead) / 2
        return _moved(state, slope, sigma, following)

    return _along(levels, noise, move, on_step, prepare)


def stochastic(draw: Draw) -> Solver:
    """Steps of distilled models: go straight to the data that the velocity points to, and from there to the next level with
    noise of `draw` that is new in each step (`stochastic_sampling` of diffusers' FlowMatchEulerDiscreteScheduler)."""

    def solver(
        velocity: VelocityFn,
        noise: Tensor,
        levels: Tensor,
        on_step: Callable[[], None] | None = None,
        prepare: Prepare | None = None,
    ) -> Tensor:
        def move(number: int, state: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
            clean = state - broadcast_sigma(sigma, state) * velocity(state, sigma).float()
            moved = flow.add_noise(clean, draw(number), following)
            return torch.where(broadcast_sigma(following == sigma, state), state, moved)

        return _along(levels, noise, move, on_step, prepare)

    return solver


SOLVERS: dict[str, Callable[[Draw], Solver]] = {
    "euler": lambda draw: euler,
    "heun": lambda draw: heun,
    "stochastic": stochastic,
}
"""Name -> the solver, given noise for its steps; only `stochastic` draws any."""


def _along(levels: Tensor, noise: Tensor, move: _Move, on_step: Callable[[], None] | None, prepare: Prepare | None) -> Tensor:
    state = noise.float()
    # Levels of a schedule become (B,); those of tokens are (B, L) already.
    levels = levels.to(state.device)
    levels = levels if levels.ndim > 1 else levels[:, None].expand(-1, len(state))
    moves = (levels[1:] != levels[:-1]).flatten(1).any(dim=1).tolist()
    for number, (sigma, following) in enumerate(pairwise(levels)):
        if prepare is not None:
            state = prepare(number, state)
        if moves[number]:  # else all tokens wait below the schedule, and the model would be asked for nothing
            state = move(number, state, sigma, following)
        if on_step is not None:
            on_step()
    return state


def _moved(state: Tensor, velocity: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
    step = broadcast_sigma(following - sigma, state)
    return torch.where(step == 0, state, state + step * velocity.float())
