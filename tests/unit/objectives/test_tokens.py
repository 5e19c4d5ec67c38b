"""Tokens of a micro-batch: means over those that bear loss, random subsets, weights by noise level."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

from videofm.errors import DataError
from videofm.objectives.tokens import TokenBatch, draw_subset, loss_weight
from videofm.parallel.rng import KeyedRng


def make_tokens(given: Tensor | None = None, per_token: bool = True) -> TokenBatch:
    """Three samples of 10 tokens with 4 channels; every number tells its place."""
    clean = torch.arange(120.0).view(3, 10, 4)
    sigma = torch.arange(30.0).view(3, 10) / 30 if per_token else torch.tensor([0.1, 0.2, 0.3])
    return TokenBatch(clean, -clean, sigma, torch.arange(90.0).view(3, 3, 10), given)


def rng(num_samples: int = 3, first: int = 0) -> KeyedRng:
    return KeyedRng(0, 1, [f"clip{index}" for index in range(first, first + num_samples)])


def test_means_do_not_depend_on_how_much_is_given() -> None:
    """Errors that are 2 for every token that bears loss have the mean 2, whether 1 or 9 of 10 bear loss; given ones are not
    looked at, even where they are not finite."""
    given = torch.arange(10) < torch.tensor([[1], [5], [9]])
    values = torch.full((3, 10, 4), 2.0).masked_fill(given[:, :, None], float("inf"))
    assert make_tokens(given).means(values).tolist() == [2, 2, 2]
    assert make_tokens().means(torch.full((3, 10, 4), 2.0)).tolist() == [2, 2, 2]


def test_means_are_weighted_by_token_or_by_sample() -> None:
    """Values 0 to 9 with tokens 0 to 4 given: plain mean 7; weight 2 for the last token adds 9 / 5; weight 3 of a sample
    triples."""
    values = torch.arange(10.0)[None, :, None].expand(3, 10, 4)
    given = (torch.arange(10) < 5).expand(3, 10)
    last_twice = torch.ones(3, 10).index_fill(1, torch.tensor(9), 2.0)
    for tokens, plain, weighted in ((make_tokens(given), 7, 8.8), (make_tokens(), 4.5, 5.4)):
        assert tokens.means(values).tolist() == [plain] * 3
        assert tokens.means(values, last_twice).tolist() == pytest.approx([weighted] * 3)
        assert tokens.means(values, torch.tensor([1.0, 3.0, 0.0])).tolist() == [plain, 3 * plain, 0]


@pytest.mark.parametrize("per_token", [True, False])
def test_a_subset_takes_all_that_belongs_to_a_token(per_token: bool) -> None:
    given = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = make_tokens(given, per_token)
    index = torch.tensor([[0, 3, 9], [1, 2, 3], [4, 6, 8]])
    part = whole.subset(index)
    assert part.given is not None
    for sample, kept in enumerate(index):
        assert torch.equal(part.clean[sample], whole.clean[sample, kept])
        assert torch.equal(part.noise[sample], whole.noise[sample, kept])
        assert torch.equal(part.coordinates[sample], whole.coordinates[sample][:, kept])
        assert torch.equal(part.given[sample], given[sample, kept])
        if per_token:
            assert torch.equal(part.sigma[sample], whole.sigma[sample, kept])
    assert per_token or part.sigma is whole.sigma
    assert make_tokens().subset(index).given is None


def test_subsets_are_random_keyed_by_sample_and_rising() -> None:
    index = draw_subset(50, None, 40, rng(200))
    assert index.shape == (200, 40)
    assert (index.diff(dim=1) > 0).all()
    assert torch.equal(draw_subset(50, None, 40, rng(1, first=7))[0], index[7])
    # Each token stays in 80% of the samples: of 200, 160 with a standard deviation of 5.7.
    counts = torch.bincount(index.flatten(), minlength=50)
    assert counts.min() > 160 - 5 * 5.7
    assert counts.max() < 160 + 5 * 5.7


def test_a_subset_keeps_a_token_that_bears_loss() -> None:
    """Of 100 tokens one bears loss and two stay: by chance it would be in one sample out of 50."""
    given = torch.ones(60, 100, dtype=torch.bool)
    alone = torch.arange(60) % 100
    given[torch.arange(60), alone] = False
    index = draw_subset(100, given, 2, rng(60))
    assert (index == alone[:, None]).any(dim=1).all()
    by_chance = draw_subset(100, None, 2, rng(60))
    assert (by_chance == alone[:, None]).any(dim=1).float().mean() < 0.2


def test_given_tokens_change_no_subset_that_has_another() -> None:
    given = (torch.arange(10) < 2).expand(30, 10)
    assert torch.equal(draw_subset(10, given, 5, rng(30)), draw_subset(10, None, 5, rng(30)))


def test_all_tokens_of_a_clip_can_stay() -> None:
    assert torch.equal(draw_subset(7, None, 7, rng()), torch.arange(7).expand(3, 7))


def test_too_small_a_clip_is_refused_with_the_rule() -> None:
    with pytest.raises(
        DataError, match=r"num_tokens is 11, but these clips have 10 latent tokens.*or set num_tokens to at most 10"
    ):
        draw_subset(10, None, 11, rng())


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_weights_are_those_of_diffusers(weighting: str) -> None:
    sigma = torch.linspace(0.01, 1.0, 50)
    torch.testing.assert_close(loss_weight(weighting, sigma), compute_loss_weighting_for_sd3(weighting, sigma))


def test_weights_are_finite_at_level_zero() -> None:
    zero = torch.zeros(2, 3)
    assert loss_weight("none", zero) is None
    torch.testing.assert_close(loss_weight("sigma_sqrt", zero), torch.full((2, 3), 1e6))
    torch.testing.assert_close(loss_weight("cosmap", zero), torch.full((2, 3), 2 / torch.pi))
