"""Flow-DPO: weights of pairs, ties, labels of segments, and the safeguard of the loser."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.objectives.dpo_by_hand import BETA, ByHand, gradient, loss_of, make
from tests.unit.objectives.paired_batches import Answer, PerToken, pairs, swapped
from videofm.types import Batch


@pytest.fixture
def policy() -> PerToken:
    return PerToken(seed=0)


@pytest.fixture
def other() -> PerToken:
    return PerToken(seed=1)


# --- weights, ties, segments -------------------------------------------------------------------------------------------------


def test_a_weight_multiplies_a_pairs_gradient(policy: PerToken, other: PerToken) -> None:
    """Doubling the weight of one of three pairs adds its gradient once more."""
    each = []
    for weights in ([1.0, 1.0, 1.0], [1.0, 2.0, 1.0], [0.0, 1.0, 0.0]):
        batch = pairs(pair_weights=torch.tensor(weights))
        each.append(gradient(loss_of(make(other), policy, batch).total, policy))
    torch.testing.assert_close(each[1] - each[0], each[2], rtol=1e-4, atol=1e-5)
    assert each[2].norm() > 1e-3


@pytest.mark.parametrize("fields", [{}, {"winner_weight": 2.0, "label_smoothing": 0.1}, {"segments": True}])
def test_ties_add_exactly_nothing(fields: dict[str, Any], policy: PerToken, other: PerToken) -> None:
    ties = {"pair_weights": torch.zeros(3), "pair_ties": torch.ones(3, dtype=torch.bool)}
    batch = pairs(frame_labels=torch.ones(3, 5), **ties)
    found = loss_of(make(other, **fields), policy, batch)
    assert found.total.item() == 0 and not gradient(found.total, policy).any()
    assert found.metrics["tied"] == 3 and found.metrics["implicit_accuracy"] == 1.5


def test_one_segment_is_plain_dpo(policy: PerToken, other: PerToken) -> None:
    for fields in ({}, {"winner_weight": 0.5, "loser_safeguard": 0.8}):
        plain = loss_of(make(other, **fields), policy, pairs())
        dense = loss_of(make(other, segments=True, **fields), policy, pairs(frame_labels=torch.ones(3, 5)))
        torch.testing.assert_close(dense.total, plain.total, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient(dense.total, policy), gradient(plain.total, policy), rtol=1e-4, atol=1e-5)


def test_a_negative_segment_is_the_pair_the_other_way_round(policy: PerToken, other: PerToken) -> None:
    """Pair by pair, as the sides of a pair share their draws: labels of -1 for all frames are the clips changed over."""
    for fields in ({}, {"winner_weight": 0.5, "loser_safeguard": 0.8}):
        objective = make(other, segments=True, **fields)
        turned = loss_of(objective, policy, pairs(frame_labels=-torch.ones(3, 5)))
        changed = loss_of(objective, policy, swapped(pairs(frame_labels=torch.ones(3, 5))))
        torch.testing.assert_close(turned.total, changed.total, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient(turned.total, policy), gradient(changed.total, policy), rtol=1e-5, atol=1e-6)


def test_segments_weigh_latent_frames(policy: PerToken, other: PerToken) -> None:
    """Five frames, two a latent frame: labels 1 | 1 0 | -1 -1 are 1, 1/2 and -1 of the three latent frames; the second pair has
    labels of nothing, and counts nothing."""
    labels = torch.tensor([[1.0, 1, 0, -1, -1], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]])
    batch = pairs(frame_labels=labels)
    found = loss_of(make(other, segments=True), policy, batch)
    latent = torch.tensor([[1.0, 0.5, -1.0], [0, 0, 0], [0, 0, 1]])
    margins = ByHand(batch).margins(policy, other, latent)
    assert found.metrics["margin"].item() == pytest.approx(-margins.sum().item(), rel=1e-4)
    expected = sum(torch.nn.functional.softplus(BETA / 2 * margins[number]) for number in (0, 2))
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient(found.total, policy), gradient(expected, policy).float(), rtol=1e-3, atol=1e-4)


# --- the loser's safeguard ---------------------------------------------------------------------------------------------------


def shared_map(scale: float) -> tuple[Answer, Batch]:
    """A model whose answer is its parameter, the same for both clips, and a pair whose d_l is `scale` times d_w."""
    batch = pairs(1)
    hand = ByHand(batch)
    (winner, noise, _), (loser, _, _) = hand.clip(0), hand.clip(1)
    # With residuals answer - velocity: answer - v_l = scale * (answer - v_w).
    velocities = (noise - winner, noise - loser)
    return Answer(((velocities[1] - scale * velocities[0]) / (1 - scale)).float()), batch


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_the_winner_cannot_get_worse_to_first_order(strength: float) -> None:
    """Clips share the whole map to outputs, so the gradients of errors are the residuals. With d_l = 3 d_w the slope of err_w
    along plain descent is in proportion to -(|d_w|^2 - 3 |d_w|^2) > 0: it rises. The factor is strength / 3, and the slope
    -(1 - strength) |d_w|^2 <= 0. The loss itself does not change."""
    slopes, totals = {}, {}
    policy, batch = shared_map(3.0)
    winner = winner_slope(policy, batch)
    for safeguard in (None, strength):
        found = loss_of(make(copy.deepcopy(policy), loser_safeguard=safeguard), policy, batch)
        slopes[safeguard], totals[safeguard] = -(gradient(found.total, policy) @ winner).item(), found.total.item()
    assert found.metrics["loser_scale"].item() == pytest.approx(strength / 3, rel=1e-4)
    square = winner.square().sum().item()
    assert slopes[None] == pytest.approx(BETA / 4 * 2 * square, rel=1e-3)
    assert slopes[strength] == pytest.approx(-BETA / 4 * (1 - strength) * square, rel=1e-3, abs=1e-5 * BETA * square)
    assert totals[None] == totals[strength]


def test_whatever_the_residuals_are_the_winner_is_guarded() -> None:
    """Thirty random answers, whose residuals meet at any angle and length: some winners would rise, none does."""
    draw = torch.Generator().manual_seed(5)
    rises = {None: 0, 1.0: 0}
    for number in range(30):
        batch = pairs(1, seed=number)
        policy = Answer(3 * torch.rand((), generator=draw) * torch.randn(12, 3, generator=draw))
        winner = winner_slope(policy, batch)
        for safeguard in rises:
            found = loss_of(make(copy.deepcopy(policy), loser_safeguard=safeguard), policy, batch)
            rises[safeguard] += bool(-(gradient(found.total, policy) @ winner) > 1e-4 * BETA * winner.square().sum())
    assert rises[None] >= 5 and rises[1.0] == 0


def winner_slope(policy: Answer, batch: Batch) -> Tensor:
    """The gradient of the winner's error, by hand: 2 / n times its residual."""
    winner, noise, _ = ByHand(batch).clip(0)
    residual = policy.value.detach().double() - (noise - winner)
    return (2 * residual / residual.numel()).flatten().float()


def test_the_safeguard_leaves_alone_what_does_no_harm() -> None:
    """d_l = -2 d_w: lowering the margin lowers the winner's error by itself, and the gradient is that of plain DPO."""
    policy, batch = shared_map(-2.0)
    guarded, plain = (
        gradient(loss_of(make(copy.deepcopy(policy), loser_safeguard=value), policy, batch).total, policy)
        for value in (1.0, None)
    )
    assert torch.equal(guarded, plain)


def test_with_segments_the_safeguard_guards_the_better_side() -> None:
    """Labels of -1 for a pair whose sides are changed over: the loser is the better one, and guarded as the winner was."""
    policy, batch = shared_map(3.0)
    turned = replace(swapped(batch), frame_labels=-torch.ones(1, 5))
    plain = loss_of(make(copy.deepcopy(policy), loser_safeguard=0.5), policy, batch)
    found = loss_of(make(copy.deepcopy(policy), loser_safeguard=0.5, segments=True), policy, turned)
    assert found.metrics["loser_scale"].item() == pytest.approx(1 / 6, rel=1e-4)
    torch.testing.assert_close(gradient(found.total, policy), gradient(plain.total, policy), rtol=1e-3, atol=1e-6)


def test_segments_weigh_what_the_safeguard_compares() -> None:
    """Latent frames with the labels 1, 1/2 and -1, of 4 tokens each: what must not rise is the error of the better sides, each
    token's times the size of its label. The answer lies beyond the better velocity, seen from the worse one, so that what leads
    away from the worse leads away from the better too; at strength 1 its slope becomes zero, by hand."""
    size = torch.tensor([1.0, 0.5, 1.0]).repeat_interleave(4)[:, None]
    turned = torch.tensor([False, False, True]).repeat_interleave(4)[:, None]
    draw = torch.Generator().manual_seed(5)
    for number in range(4):
        batch = pairs(1, seed=number, frame_labels=torch.tensor([[1.0, 1, 0, -1, -1]]))
        (winner, noise, _), (loser, _, _) = (ByHand(batch).clip(row) for row in (0, 1))
        good, bad = noise - torch.where(turned, loser, winner), noise - torch.where(turned, winner, loser)
        beyond = torch.rand(12, 1, generator=draw) * (good - bad) + 0.1 * torch.randn(12, 3, generator=draw)
        policy = Answer((good + beyond).float())
        better, worse = size * (policy.value.detach() - good), size * (policy.value.detach() - bad)
        factor = (better.square().sum() / (better * worse).sum()).item()
        slopes = {}
        for safeguard in (None, 1.0):
            found = loss_of(make(copy.deepcopy(policy), loser_safeguard=safeguard, segments=True), policy, batch)
            slopes[safeguard] = -(gradient(found.total, policy) @ better.flatten().float()).item()
        assert 0.1 < factor < 0.9 and found.metrics["loser_scale"].item() == pytest.approx(factor, rel=1e-4)
        assert slopes[None] > 0 and abs(slopes[1.0]) < 1e-3 * slopes[None]
