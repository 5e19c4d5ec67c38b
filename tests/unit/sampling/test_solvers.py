"""Solvers against cases with known answers, and where their noise comes from."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from torch import Tensor

from videofm.ops import flow
from videofm.sampling import Schedule, ShiftedSchedule
from videofm.sampling.noise import derived_seed, initial_noise, video_seed
from videofm.sampling.solvers import SOLVERS, capped, euler, heun, stochastic


def unit(number: int) -> Tensor:
    """Noise of a step, for any state: a number."""
    return torch.tensor([[[0.5 + number]]])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_exact_velocity_recovers_the_clean_tokens(num_steps: int, solver: str) -> None:
    """The path is straight, so no solver has an error whatever the number of steps."""
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 12, 4), torch.randn(2, 12, 4)
    steps = []

    def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
        torch.testing.assert_close(noisy, flow.add_noise(clean, noise, sigma), atol=1e-5, rtol=0)
        return flow.velocity(clean, noise)

    found = SOLVERS[solver](lambda number: noise)(velocity, noise, Schedule().sigmas(num_steps, 12), lambda: steps.append(1))
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=0)
    assert len(steps) == num_steps


@pytest.mark.parametrize("solver", SOLVERS)
def test_state_stays_float32_for_a_model_in_bfloat16(solver: str) -> None:
    found = SOLVERS[solver](unit)(
        lambda noisy, sigma: noisy.bfloat16(), torch.randn(1, 2, 3), torch.tensor([1.0, 0.5, 0.0]), None
    )
    assert found.dtype == torch.float32


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver: str, order: int) -> None:
    """d x / d sigma = x from sigma 1 to 0 ends at x / e. Twice the steps divide the error by 2 to the order: measured from
    40 to 160 steps. A solver of the other order fails both ways."""
    errors = []
    for num_steps in (40, 160):
        levels = ShiftedSchedule(1.0).sigmas(num_steps, 0)
        found = SOLVERS[solver](unit)(lambda noisy, sigma: noisy, torch.ones(1, 1, 1), levels, None)
        errors.append(abs(found.item() - 1 / math.e))
    assert math.log(errors[0] / errors[1], 4) == pytest.approx(order, abs=0.1)


def test_heun_asks_twice_a_step_but_never_about_pure_data() -> None:
    asked: list[float] = []

    def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
        asked.append(sigma.max().item())
        return noisy

    heun(velocity, torch.ones(1, 2, 1), torch.tensor([1.0, 0.5, 0.25, 0.0]))
    assert asked == [1.0, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_token_goes_from_its_own_level_to_its_own_next(solver: str) -> None:
    """Tokens that start at 1, 0.6 and 0.3 hold that much noise; exact velocities bring all to the clean ones, and the model
    is told levels that are true at every evaluation."""
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    ceilings = torch.tensor([1.0, 0.6, 0.3]).expand(2, 3)

    def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
        assert sigma.shape == (2, 3)
        torch.testing.assert_close(noisy, flow.add_noise(clean, noise, sigma), atol=1e-5, rtol=0)
        return flow.velocity(clean, noise)

    levels = capped(ShiftedSchedule(1.0).sigmas(7, 0), ceilings)
    found = SOLVERS[solver](lambda number: noise)(velocity, flow.add_noise(clean, noise, ceilings), levels, None)
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_given_tokens_keep_their_bits_whatever_the_velocity(solver: str) -> None:
    state = torch.tensor([[[-0.0, 1.5], [2.0, 3.0]]])
    levels = capped(torch.tensor([1.0, 0.4, 0.0]), torch.tensor([[0.0, 1.0]]))
    found = SOLVERS[solver](unit)(lambda noisy, sigma: torch.full_like(noisy, torch.inf), state, levels, None)
    assert found[:, 0].view(torch.int32).equal(state[:, 0].view(torch.int32))
    assert not found[:, 1].equal(state[:, 1])


def test_the_stochastic_step_is_that_of_diffusers() -> None:
    """Their scheduler draws from a generator: our draws are the same, a tensor a step. Without the option it is Euler's, and
    the result another one."""
    start, sigmas = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)), ShiftedSchedule(3.0).sigmas(6, 0)

    def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
        return noisy.sin() * (1 + flow.broadcast_sigma(sigma, noisy))

    def theirs(**options: bool) -> Tensor:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**options)
        scheduler.set_timesteps(sigmas=sigmas[:-1].numpy())
        state, generator = start, torch.Generator().manual_seed(2)
        for step in scheduler.timesteps:
            predicted = velocity(state, (step / 1000).expand(len(state)))
            state = scheduler.step(predicted, step, state, generator=generator, return_dict=False)[0]
        return state

    generator = torch.Generator().manual_seed(2)
    found = stochastic(lambda number: torch.randn(start.shape, generator=generator))(velocity, start, sigmas)
    torch.testing.assert_close(found, theirs(stochastic_sampling=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(euler(velocity, start, sigmas), theirs(), atol=1e-5, rtol=0)
    assert (found - theirs()).abs().max() > 0.1


def test_a_state_is_prepared_before_every_step() -> None:
    """Each of four steps of exact length 1/4 sees what was prepared: number 0 to 3, and the state that the one before left."""
    seen: list[tuple[int, float]] = []

    def prepare(number: int, state: Tensor) -> Tensor:
        seen.append((number, state.item()))
        return state + 10

    for solver in SOLVERS.values():
        levels = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
        solver(lambda number: torch.zeros(1, 1, 1))(
            lambda noisy, sigma: torch.zeros_like(noisy), torch.zeros(1, 1, 1), levels, None, prepare
        )
    assert seen[:4] == seen[4:8] == [(number, 10.0 * number) for number in range(4)]
    # New noise of 0 and a velocity of 0: the step multiplies the state by 1 - the next level, 0.25 first.
    assert seen[8:10] == [(0, 0.0), (1, 2.5)]


def test_levels_for_all_tokens_alike_are_those_of_the_sample() -> None:
    state, sigmas = torch.randn(2, 5, 3), Schedule().sigmas(6, 5)

    def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
        return noisy * (1 + flow.broadcast_sigma(sigma, noisy))

    assert euler(velocity, state, capped(sigmas, torch.ones(2, 5))).equal(euler(velocity, state, sigmas))


def test_noise_depends_on_seed_and_index_and_is_the_draw_of_one_video() -> None:
    """LTXPipeline draws (1, C, T, H, W) for each generator; the numbers are the same."""
    seeds = [video_seed(0, index) for index in range(3)]
    noise = initial_noise(seeds, (4, 3, 2, 2))
    torch.testing.assert_close(noise[1:], initial_noise(seeds[1:], (4, 3, 2, 2)), rtol=0, atol=0)
    theirs = torch.randn((1, 4, 3, 2, 2), generator=torch.Generator().manual_seed(seeds[2]))
    torch.testing.assert_close(noise[2:], theirs, rtol=0, atol=0)
    second = torch.Generator().manual_seed(seeds[0])
    expected = [torch.randn((4, 3, 2, 2), generator=second) for _ in range(2)][1]
    assert initial_noise(seeds[:1], (4, 3, 2, 2), draw=1)[0].equal(expected)
    assert len({video_seed(0, 0), derived_seed(video_seed(0, 0), "a"), derived_seed(video_seed(0, 0), "b")}) == 3
    # torch's CPU generator reads the low 32 bits of a seed: they must differ.
    assert len({video_seed(seed, index) % 2**32 for seed in range(50) for index in range(50)}) == 2500
