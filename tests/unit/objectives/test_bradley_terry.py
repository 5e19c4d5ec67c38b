"""Bradley-Terry with ties against its formula in float64 (spec C2, oracle F-C 10)."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from videofm.objectives.bradley_terry import log_outcomes, outcome_nll

THETAS = [1.0, 1.0 + 1e-6, 1.5, 5.0, 1e3]
GAPS = torch.tensor([-6.0, -1.3, -0.01, 0.0, 0.4, 2.0, 7.5], dtype=torch.float64)


def by_formula(a: float, b: float, theta: float) -> tuple[float, float, float]:
    """P(A > B), P(B > A), P(tie) as they stand in spec C2, in Python's floats."""
    x, y = math.exp(a), math.exp(b)
    tie = (theta**2 - 1) * x * y / ((x + theta * y) * (theta * x + y))
    return x / (x + theta * y), y / (y + theta * x), tie


@pytest.mark.parametrize("theta", THETAS)
def test_probabilities_are_those_of_the_formula(theta):
    """For scores around 0.7, a shift that changes nothing; at theta 1 + 1e-6 too, where theta^2 - 1 is tiny."""
    found = log_outcomes(GAPS, theta)
    for index, gap in enumerate(GAPS.tolist()):
        wanted = by_formula(0.7 + gap, 0.7, theta)
        for name, value in zip(("first", "second", "tie"), wanted, strict=True):
            assert float(getattr(found, name)[index].exp()) == pytest.approx(value, rel=1e-9, abs=1e-300), (name, gap)


@pytest.mark.parametrize("theta", THETAS)
def test_the_three_sum_to_one(theta):
    found = log_outcomes(GAPS, theta)
    total = found.first.exp() + found.second.exp() + found.tie.exp()
    torch.testing.assert_close(total, torch.ones_like(GAPS), rtol=1e-12, atol=0)


@pytest.mark.parametrize("theta", THETAS)
def test_swapping_the_two_swaps_the_outcomes(theta):
    found, swapped = log_outcomes(GAPS, theta), log_outcomes(-GAPS, theta)
    assert torch.equal(found.first, swapped.second) and torch.equal(found.second, swapped.first)
    torch.testing.assert_close(found.tie, swapped.tie, rtol=0, atol=1e-14)


def test_theta_one_is_plain_bradley_terry():
    found = log_outcomes(GAPS, 1.0)
    assert torch.equal(found.first, logsigmoid(GAPS)) and torch.equal(found.tie.exp(), torch.zeros_like(GAPS))
    assert torch.equal(outcome_nll(GAPS, torch.ones_like(GAPS), 1.0), -logsigmoid(GAPS))
    assert torch.isinf(outcome_nll(GAPS, torch.zeros_like(GAPS), 1.0)).all()


def test_equal_scores_tie_with_the_probability_that_the_config_names():
    """(theta - 1) / (theta + 1): at theta 5 two of three."""
    tie = log_outcomes(torch.zeros(1, dtype=torch.float64), 5.0).tie.exp()
    assert float(tie) == pytest.approx(4 / 6)


@pytest.mark.parametrize("theta", [1.0 + 1e-6, 5.0])
def test_the_nll_is_finite_and_right_at_any_gap_in_float32(theta):
    """Up to gaps of 1e4, where e^gap has no number. Against float64, and at the far ends against the slopes by hand:
    a wrong order costs |gap| + k, a tie |gap| + k - log(theta^2 - 1), with k = log theta."""
    gap = torch.tensor([-1e4, -200.0, -30.0, -1.0, 0.0, 1.0, 30.0, 200.0, 1e4], requires_grad=True)
    for sign in (-1.0, 0.0, 1.0):
        signs = torch.full_like(gap, sign)
        found = outcome_nll(gap, signs, theta)
        wanted = outcome_nll(gap.detach().double(), signs.double(), theta)
        assert found.dtype == torch.float32 and found.isfinite().all() and (found >= 0).all()
        torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-6)
        (slope,) = torch.autograd.grad(found.sum(), gap)
        assert slope.isfinite().all() and (slope.abs() <= 1).all()
        far, k = 1e4, math.log(theta)
        ends = {-1.0: far + k, 1.0: 0.0, 0.0: far + k - math.log((theta - 1) * (theta + 1))}
        assert float(found[-1].detach()) == pytest.approx(ends[sign], rel=1e-6)


@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
def test_gradient_is_that_of_finite_differences(sign):
    gap, step = GAPS.clone().requires_grad_(), 1e-6
    signs = torch.full_like(GAPS, sign)
    (slope,) = torch.autograd.grad(outcome_nll(gap, signs, 5.0).sum(), gap)
    wanted = (outcome_nll(GAPS + step, signs, 5.0) - outcome_nll(GAPS - step, signs, 5.0)) / (2 * step)
    torch.testing.assert_close(slope, wanted, rtol=1e-7, atol=1e-8)


def test_a_tie_pulls_scores_together_and_is_indifferent_where_they_are_equal():
    gap = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    (slope,) = torch.autograd.grad(outcome_nll(gap, torch.zeros(3), 5.0).sum(), gap)
    assert slope[0] < 0 < slope[2] and abs(float(slope[1])) < 1e-7


def test_the_size_of_a_sign_says_nothing():
    signs = torch.tensor([3.0, -0.2, 0.0])
    gap = torch.tensor([0.3, 0.3, 0.3])
    assert torch.equal(outcome_nll(gap, signs, 5.0), outcome_nll(gap, signs.sign(), 5.0))


def test_ties_at_theta_one_do_not_spoil_the_gradient_of_others():
    """An infinite nll that is masked out, as for pairs without a vote, leaves 0 and no NaN."""
    gap = torch.tensor([0.5, 0.5], requires_grad=True)
    nll = outcome_nll(gap, torch.tensor([0.0, 1.0]), 1.0)
    torch.where(torch.tensor([False, True]), nll, 0.0).sum().backward()
    assert gap.grad is not None and gap.grad[0] == 0 and gap.grad[1] == pytest.approx(-torch.sigmoid(torch.tensor(-0.5)).item())
