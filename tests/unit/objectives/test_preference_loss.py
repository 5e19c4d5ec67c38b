"""The losses of pairs as closed forms: expected numbers are derived beside each test."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from videofm.errors import DataError
from videofm.objectives.preference_loss import (
    Sides,
    frame_errors,
    implicit_accuracy,
    inner_margin,
    loser_scale,
    margin_loss,
    reward_weight,
    scale_gradient,
    scheduled_beta,
)
from videofm.objectives.segments import latent_labels
from videofm.types import Compression


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def slope(margin: float, beta: float, label_smoothing: float = 0.0) -> float:
    """d loss / d m."""
    m = torch.tensor([margin], requires_grad=True)
    margin_loss(m, torch.tensor([beta]), label_smoothing).sum().backward()
    assert m.grad is not None
    return m.grad.item()


# --- the log-sigmoid ---------------------------------------------------------------------------------------------------------


def test_two_scalars() -> None:
    """err 0.3 and 0.4, of the reference 0.5 and 0.2: m = (0.3 - 0.5) - (0.4 - 0.2) = -0.4. With beta 5, -(beta / 2) m = 1, and
    the loss is log(1 + e^-1)."""
    margin = inner_margin(Sides(column(0.3), column(0.4)), Sides(column(0.5), column(0.2)))
    assert margin.item() == pytest.approx(-0.4)
    assert margin_loss(margin, torch.tensor([5.0])).item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_smoothing_mixes_both_directions() -> None:
    """-(1 - e) log sigmoid(-z) - e log sigmoid(z) at z = -1, e = 0.1: softplus(-1) + 0.1 * 1 after log s(z) = log s(-z) + z."""
    found = margin_loss(torch.tensor([-0.4]), torch.tensor([5.0]), label_smoothing=0.1)
    assert found.item() == pytest.approx(math.log(1 + math.exp(-1)) + 0.1)


def test_at_equal_models_it_is_log_two_and_has_a_slope() -> None:
    for label_smoothing in (0.0, 0.2):
        assert margin_loss(torch.zeros(1), torch.tensor([500.0]), label_smoothing).item() == torch.tensor(2.0).log().item()
        # sigmoid(0) - e, times beta / 2
        assert slope(0.0, 500.0, label_smoothing) == pytest.approx(250 * (0.5 - label_smoothing))


@pytest.mark.parametrize("margin", [-2.0, -0.01, 0.0, 0.3, 1.7])
def test_both_orders_of_a_pair_share_one(margin: float) -> None:
    """Changing winner and loser over changes the sign of m: sigmoid(-z) + sigmoid(z) = 1, and the slopes point against each
    other, by beta / 2 in all."""
    beta = torch.tensor([4.0])
    chances = [(-margin_loss(torch.tensor([m]), beta)).exp().item() for m in (margin, -margin)]
    assert sum(chances) == pytest.approx(1.0)
    ahead, back = slope(margin, 4.0), -slope(-margin, 4.0)  # d loss(-m) / dm = -loss'(-m)
    assert ahead > 0 > back and ahead - back == pytest.approx(4.0 / 2)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_it_is_finite_far_out_and_its_slope_is_bounded(label_smoothing: float) -> None:
    """|m| beta = 1e4: z is 5000 either way, where exp overflows; the loss is 5000 or 0 (with smoothing shares of it)."""
    for sign, wanted in ((1.0, 1 - label_smoothing), (-1.0, label_smoothing)):
        found = margin_loss(torch.tensor([2.0 * sign]), torch.tensor([5000.0]), label_smoothing).item()
        assert found == pytest.approx(5000 * wanted, abs=1e-6)
        assert slope(2.0 * sign, 5000.0, label_smoothing) == pytest.approx(sign * 2500 * wanted, abs=1e-6)
    for margin in (-1e-3, 1e-4, 0.5):
        assert abs(slope(margin, 5000.0, label_smoothing)) <= 2500


def test_half_precision_margins_are_compared_in_float32() -> None:
    assert margin_loss(torch.tensor([0.1], dtype=torch.bfloat16), torch.tensor([1.0])).dtype == torch.float32


def test_schedules_agree_at_the_data_and_part_with_the_noise() -> None:
    sigma = torch.tensor([0.0, 0.5, 1.0])
    assert scheduled_beta(8.0, "constant", sigma).tolist() == [8.0, 8.0, 8.0]
    assert scheduled_beta(8.0, "quadratic", sigma).tolist() == [8.0, 2.0, 0.0]


# --- errors ------------------------------------------------------------------------------------------------------------------


def test_errors_are_means_over_every_dim_but_the_batch() -> None:
    """Two clips of 3 frames with 2 tokens of 2 channels, against loops; runs are latent frames, which lie one by one."""
    residuals = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(0))
    whole, frames = frame_errors(residuals, 1), frame_errors(residuals, 3)
    assert whole.shape == (2, 1) and frames.shape == (2, 3)
    for clip in range(2):
        squares = [[residuals[clip, token, channel].item() ** 2 for channel in range(2)] for token in range(6)]
        assert whole[clip, 0].item() == pytest.approx(sum(map(sum, squares)) / 12)
        for frame in range(3):
            own = squares[2 * frame : 2 * frame + 2]
            assert frames[clip, frame].item() == pytest.approx(sum(map(sum, own)) / 4)


def test_labels_choose_runs_and_turn_them() -> None:
    """Gaps of three runs are 1, 2 and 4; labels 1, 0, -1 leave 1 - 4, a third of it. The sides changed over say the same."""
    policy, reference = Sides(torch.tensor([[1.0, 2.0, 4.0]]), torch.zeros(1, 3)), Sides(torch.zeros(1, 3), torch.zeros(1, 3))
    labels = torch.tensor([[1.0, 0.0, -1.0]])
    assert inner_margin(policy, reference, labels).item() == pytest.approx(-1.0)
    turned = inner_margin(policy.preferred(labels), reference.preferred(labels), labels.abs())
    assert turned.item() == pytest.approx(-1.0)
    assert inner_margin(policy, reference, torch.ones(1, 3)) == inner_margin(policy, reference)


def test_accuracy_counts_a_draw_by_half() -> None:
    margin = torch.tensor([-1.0, 1.0, 0.0, -1.0])
    ties = torch.tensor([False, False, False, True])
    assert implicit_accuracy(margin, ties).tolist() == [1.0, 0.0, 0.5, 0.5]


# --- the safeguard -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loser", "strength", "factor"),
    [
        ([3.0, 0.0], 1.0, 1 / 3),  # along the winner's residual, three times as long: |d_w|^2 / <d_w, d_l> = 1 / 3
        ([3.0, 0.0], 0.5, 1 / 6),
        ([0.5, 0.0], 1.0, 1.0),  # 2, cut
        ([0.0, 9.0], 1.0, 1.0),  # across it: the loser does not touch the winner
        ([-9.0, 0.0], 1.0, 1.0),  # against it: both lead the winner down
        ([2.0, 5.0], 1.0, 0.5),  # only what lies along counts
    ],
)
def test_the_losers_factor(loser: list[float], strength: float, factor: float) -> None:
    sides = Sides(torch.tensor([[1.0, 0.0]]), torch.tensor([loser]))
    assert loser_scale(sides, strength).item() == pytest.approx(factor)


def test_a_winner_without_an_error_has_nothing_to_lose_to_first_order() -> None:
    sides = Sides(torch.zeros(1, 4), torch.ones(1, 4))
    assert loser_scale(sides, 1.0).item() == 1.0


def test_a_scaled_gradient_leaves_the_value() -> None:
    values = torch.tensor([[1.1], [2.3]], requires_grad=True)
    scaled = scale_gradient(values, torch.tensor([[0.25], [1.0]]))
    assert torch.equal(scaled, values)
    scaled.sum().backward()
    assert values.grad is not None and values.grad.flatten().tolist() == [0.25, 1.0]


# --- rewards -----------------------------------------------------------------------------------------------------------------


def test_a_reward_weighs_by_its_distance_to_the_offset() -> None:
    """exp((r - 1) / 0.5) at 1, 0.5, 1.5 is 1, 1/e and e; 1000 would overflow, and is cut at 20."""
    found = reward_weight(torch.tensor([1.0, 0.5, 1.5, 1000.0]), 0.5, 1.0, 20.0)
    torch.testing.assert_close(found, torch.tensor([1.0, math.exp(-1), math.e, 20.0]))
    for limit in (7.0, 15.0, 100.0):  # whose logarithm, rounded, has another exponential
        cut = reward_weight(torch.linspace(0, 2000, 9), 0.5, 1.0, limit)
        assert cut.max() == limit and (cut == limit).sum() == 8


# --- segments ----------------------------------------------------------------------------------------------------------------


def test_a_latent_frame_has_the_mean_label_of_its_pixel_frames() -> None:
    """Nine frames at 4 a latent frame: the first alone, then 1 to 4 and 5 to 8. Of 1, 1, 1, 0 the mean is 3/4; of 0, 0, -1, -1
    it is -1/2; a segment that changes its mind in the middle says nothing."""
    labels = torch.tensor([[1, 1, 1, 1, 0, 0, 0, -1, -1], [-1, 1, 1, -1, -1, 1, 1, 1, 1]])
    found = latent_labels(labels, 3, Compression(4, 8, 8))
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.75, -0.5], [-1.0, 0.0, 1.0]]))


def test_chunks_of_a_vae_that_restarts_are_labelled_by_themselves() -> None:
    """Step-Video: 34 frames are 2 chunks of 17, each of 3 latent frames (1, 8 and 8 frames). Frame 17 begins the second."""
    labels = torch.zeros(1, 34)
    labels[:, 17] = 1
    labels[:, 1:9] = -1
    found = latent_labels(labels, 6, Compression(8, 16, 16))
    assert found.tolist() == [[0.0, -1.0, 0.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize(("num_frames", "num_latent_frames", "time"), [(1, 1, 8), (5, 5, 1), (17, 3, 8), (51, 9, 8), (9, 3, 4)])
def test_one_label_for_all_frames_is_that_of_all_latent_frames(num_frames: int, num_latent_frames: int, time: int) -> None:
    found = latent_labels(torch.ones(2, num_frames), num_latent_frames, Compression(time, 8, 8))
    torch.testing.assert_close(found, torch.ones(2, num_latent_frames))


def test_frames_of_another_clip_are_refused() -> None:
    with pytest.raises(DataError, match="label 8 frames a clip, and the clips have 3 latent frames"):
        latent_labels(torch.ones(1, 8), 3, Compression(4, 8, 8))
