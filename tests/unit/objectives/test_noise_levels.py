"""Noise levels against the percentiles of spec C.4, and against the laws they claim to be."""

import pytest
import torch

from videofm.config.train import LogitNormalNoiseLevels, ShiftedLogitNormalNoiseLevels, UniformNoiseLevels
from videofm.objectives.noise_levels import NoiseLevelLaw

SHIFTED = NoiseLevelLaw(ShiftedLogitNormalNoiseLevels(kind="shifted_logit_normal"))
GRID = (torch.arange(20_000) + 0.5) / 20_000
"""Evenly spread probabilities: what endless draws look like."""


@pytest.mark.parametrize(
    ("num_tokens", "low", "median", "high"),
    [(1024, 0.164, 0.721, 0.983), (4096, 0.372, 0.886, 0.994), (6144, 0.552, 0.942, 0.997)],
)
def test_shifted_quantiles_are_those_of_the_spec(num_tokens: int, low: float, median: float, high: float) -> None:
    """Spec C.4 lists the 0.5, 50 and 99.9 percentiles for three token counts."""
    found = SHIFTED.quantile(torch.tensor([0.005, 0.5, 0.999]), num_tokens)
    torch.testing.assert_close(found, torch.tensor([low, median, high]), rtol=0.01, atol=0)


@pytest.mark.parametrize(("num_tokens", "shift"), [(1024, 0.95), (4096, 2.05), (6144, 2.7833), (48, 0.6005)])
def test_shift_is_linear_in_tokens(num_tokens: int, shift: float) -> None:
    """0.95 + (L - 1024) * 1.1 / 3072: for 6144 that is 0.95 + 1.8333, for 48 it is 0.95 - 0.3495."""
    assert SHIFTED.location(num_tokens) == pytest.approx(shift, abs=1e-4)


def test_logits_of_draws_are_normal() -> None:
    law = NoiseLevelLaw(LogitNormalNoiseLevels(kind="logit_normal", mean=-0.5, std=1.7))
    logits = torch.logit(law.sample(GRID, num_tokens=7).double())
    assert logits.mean().item() == pytest.approx(-0.5, abs=1e-3)
    assert logits.std().item() == pytest.approx(1.7, rel=1e-2)


def test_draws_are_a_function_of_the_uniform_and_increase_with_it() -> None:
    for config in (UniformNoiseLevels(kind="uniform"), LogitNormalNoiseLevels(kind="logit_normal"), SHIFTED.config):
        law = NoiseLevelLaw(config)
        sigma = law.sample(GRID, 100)
        assert torch.equal(sigma, law.sample(GRID, 100))
        assert (sigma.diff() >= 0).all()
        assert sigma.dtype == torch.float32


def test_every_uniform_draw_gives_a_level_between_0_and_1() -> None:
    """0 and the largest float32 below 1 are what a generator can return at the ends."""
    ends = torch.tensor([0.0, 1 - 2**-24])
    for config in (UniformNoiseLevels(kind="uniform"), SHIFTED.config):
        sigma = NoiseLevelLaw(config).sample(ends, 48)
        assert sigma[0] == 0
        assert 0.9 < sigma[1] <= 1


def test_uniform_is_the_draw_itself() -> None:
    assert torch.equal(NoiseLevelLaw(UniformNoiseLevels(kind="uniform")).sample(GRID, 5), GRID)
