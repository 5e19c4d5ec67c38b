"""Euler's method and guidance, against cases with known answers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from videofm.ops import flow
from videofm.sampling import Schedule
from videofm.sampling.guidance import guided_velocity
from videofm.sampling.noise import initial_noise, video_seed
from videofm.sampling.solvers import euler
from videofm.types import Conditioning


@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_exact_velocity_recovers_the_clean_tokens(num_steps: int) -> None:
    """The path is straight, so Euler has no error whatever the number of steps."""
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 12, 4), torch.randn(2, 12, 4)
    steps = []

    def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
        torch.testing.assert_close(noisy, flow.add_noise(clean, noise, sigma), atol=1e-5, rtol=0)
        return flow.velocity(clean, noise)

    found = euler(velocity, noise, Schedule().sigmas(num_steps, 12), lambda: steps.append(1))
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=0)
    assert len(steps) == num_steps


def test_state_stays_float32_for_a_model_in_bfloat16() -> None:
    found = euler(lambda noisy, sigma: noisy.bfloat16(), torch.randn(1, 2, 3), torch.tensor([1.0, 0.5, 0.0]))
    assert found.dtype == torch.float32


class FromText(nn.Module):
    """The velocity is the embedding; counts calls and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def forward(self, tokens: Tensor, sigma: Tensor, conditioning: Conditioning, coordinates: Tensor) -> Tensor:
        assert len(tokens) == len(sigma) == len(conditioning.mask) == len(coordinates)
        self.rows.append(len(tokens))
        return conditioning.embeddings.expand_as(tokens)


def text(value: float) -> Conditioning:
    return Conditioning(torch.full((2, 1, 1), value), torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.parametrize(("scale", "expected", "rows"), [(1.0, 5.0, 2), (3.0, 11.0, 4), (0.0, 2.0, 4)])
def test_guidance_goes_on_from_the_empty_prompt(scale: float, expected: float, rows: int) -> None:
    """2 + scale * (5 - 2); without guidance the empty prompt is not evaluated."""
    dit = FromText()
    velocity = guided_velocity(dit, text(5.0), text(2.0), torch.zeros(2, 3, 4), scale)
    assert velocity(torch.zeros(2, 4, 3), torch.ones(2)).unique().tolist() == [expected]
    assert dit.rows == [rows]


def test_noise_depends_on_seed_and_index_and_is_the_draw_of_one_video() -> None:
    """LTXPipeline draws (1, C, T, H, W) for each generator; the numbers are the same."""
    seeds = [video_seed(0, index) for index in range(3)]
    noise = initial_noise(seeds, (4, 3, 2, 2))
    torch.testing.assert_close(noise[1:], initial_noise(seeds[1:], (4, 3, 2, 2)), rtol=0, atol=0)
    theirs = torch.randn((1, 4, 3, 2, 2), generator=torch.Generator().manual_seed(seeds[2]))
    torch.testing.assert_close(noise[2:], theirs, rtol=0, atol=0)
    # torch's CPU generator reads the low 32 bits of a seed: they must differ.
    assert len({video_seed(seed, index) % 2**32 for seed in range(50) for index in range(50)}) == 2500
