"""The sigma convention."""

import pytest
import torch

from videofm.errors import DataError
from videofm.ops import flow


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, 4, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))


def test_sigma_zero_is_data_and_one_is_noise(pair):
    clean, noise = pair
    assert torch.equal(flow.add_noise(clean, noise, torch.zeros(2)), clean)
    assert torch.equal(flow.add_noise(clean, noise, torch.ones(2)), noise)


def test_velocity_is_the_derivative_and_gives_both_ends_back(pair):
    clean, noise = pair
    sigma, step = torch.tensor([0.3, 0.8], dtype=torch.float64), 1e-3
    noisy, velocity = flow.add_noise(clean, noise, sigma), flow.velocity(clean, noise)
    torch.testing.assert_close((flow.add_noise(clean, noise, sigma + step) - noisy) / step, velocity, rtol=0, atol=1e-10)
    torch.testing.assert_close(flow.clean_from_velocity(noisy, velocity, sigma), clean)
    torch.testing.assert_close(flow.noise_from_velocity(noisy, velocity, sigma), noise)


@pytest.mark.parametrize("num_steps", [1, 3, 17])
def test_euler_steps_with_the_exact_velocity_end_at_the_data(pair, num_steps):
    clean, noise = pair
    noisy = noise
    for _ in range(num_steps):
        noisy = noisy - flow.velocity(clean, noise) / num_steps
    torch.testing.assert_close(noisy, clean)


def test_a_sigma_for_each_token_equals_one_for_each_sample():
    clean, noise = torch.randn(2, 7, 3), torch.randn(2, 7, 3)
    sigma = torch.tensor([0.1, 0.9])
    assert torch.equal(flow.add_noise(clean, noise, sigma), flow.add_noise(clean, noise, sigma[:, None].expand(2, 7)))


def test_a_sigma_of_another_batch_is_refused():
    with pytest.raises(DataError, match=r"sigma has shape \(3,\), which does not lead \(2, 7, 3\)"):
        flow.broadcast_sigma(torch.rand(3), torch.zeros(2, 7, 3))
