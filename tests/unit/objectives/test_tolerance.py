"""Laws of uncertainty sampling and token corruption (spec F-B 6): what they keep, and what they change in the mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from videofm.objectives.tolerance import ChannelStatistics, Spreads, channel_statistics, corrupt, sample_uncertainty, spreads
from videofm.parallel.rng import KeyedRng


def some_features(size: int = 4, seed: int = 0) -> Tensor:
    """`(B, 3, 2, 3, 4)`, with channels and samples of other means and spreads."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(size, 3, 2, 3, 4, generator=draw)
    scale, shift = (torch.rand(size, 3, 1, 1, 1, generator=draw) + 0.5 for _ in range(2))
    return values * scale + 2 * shift


def uncertain(features: Tensor, draws: Tensor, over: Spreads | None = None) -> Tensor:
    statistics = channel_statistics(features)
    return sample_uncertainty(features, statistics, over or spreads([statistics]), draws)


def test_statistics_are_those_of_the_population() -> None:
    """A channel of 0 and 2 in equal parts has mean 1 and std 1; samples with means 1 and 3 have a spread of 1 around 2."""
    features = torch.tensor([0.0, 2.0, 0.0, 2.0]).view(1, 1, 1, 2, 2)
    batch = torch.cat([features, 3 * features])
    statistics = channel_statistics(batch)
    assert statistics.mean.tolist() == [[1.0], [3.0]] and statistics.std.tolist() == [[1.0], [3.0]]
    over = spreads([statistics])
    assert over.mean.tolist() == [1.0] and over.std.tolist() == [1.0]


def test_spreads_are_over_all_sizes_of_a_micro_batch() -> None:
    whole = channel_statistics(some_features(5))
    parts = [ChannelStatistics(whole.mean[rows], whole.std[rows]) for rows in (slice(0, 1), slice(1, 5))]
    assert torch.equal(spreads(parts).mean, spreads([whole]).mean) and torch.equal(spreads(parts).std, spreads([whole]).std)


def test_the_formula() -> None:
    """Written out as in the paper's reading (spec B6), where no std is 0."""
    features = some_features()
    draws = KeyedRng(0, 0, list("abcd")).normal("e", (2, 3))
    mean, std = features.mean(dim=(2, 3, 4), keepdim=True), features.std(dim=(2, 3, 4), keepdim=True, correction=0)
    spread_mean, spread_std = (of.std(dim=0, keepdim=True, correction=0) for of in (mean, std))
    e1, e2 = (of.view(4, 3, 1, 1, 1) for of in draws.unbind(1))
    expected = (std + e2 * spread_std) * (features - mean) / std + (mean + e1 * spread_mean)
    torch.testing.assert_close(uncertain(features, draws), expected, rtol=1e-5, atol=1e-5)
    assert (expected - features).abs().max() > 0.1


def test_identity_without_draws_and_without_spread() -> None:
    """Bit for bit: draws of 0, one sample, or one sample repeated; another sample beside it changes it."""
    features = some_features()
    assert torch.equal(uncertain(features, torch.zeros(4, 2, 3)), features)
    one = features[:1]
    assert torch.equal(uncertain(one, torch.ones(1, 2, 3)), one)
    repeated = one.expand(3, -1, -1, -1, -1)
    assert torch.equal(uncertain(repeated, torch.randn(3, 2, 3)), repeated)
    assert not torch.equal(uncertain(features, torch.ones(4, 2, 3))[:1], one)


def test_the_mean_over_draws_is_the_feature() -> None:
    """F' - F is linear in unit Gaussian draws, so its mean over n draws has a standard error of its own std / sqrt(n).

    The std of F' at a point is sqrt(S_mean^2 + (x * S_std)^2) with x = (F - mean) / std; 5 standard errors are allowed.
    """
    features, count = some_features(), 4000
    statistics = channel_statistics(features)
    over = spreads([statistics])
    draws = torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(0))
    moved = torch.stack([sample_uncertainty(features, statistics, over, e.expand(4, 2, 3)) for e in draws])
    normalised = (features - statistics.mean[..., None, None, None]) / statistics.std[..., None, None, None]
    width = (over.mean[:, None, None, None].square() + (normalised * over.std[:, None, None, None]).square()).sqrt()
    error = (moved.mean(dim=0) - features).abs()
    assert (error < 5 * width / count**0.5).all()
    torch.testing.assert_close(moved.std(dim=0), width, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_normalised_map_stays_while_the_spread_is_positive(sign: float) -> None:
    """(F' - mean') / std' is that of F, or its negative where std + e2 * S_std lies below 0."""
    features = some_features()
    statistics = channel_statistics(features)
    over = Spreads(torch.tensor([0.3, 1.0, 2.0]), torch.full((3,), 1.0))
    draws = torch.full((4, 2, 3), 0.7)
    draws[:, 1] = 0.5 if sign > 0 else -3.0
    moved = sample_uncertainty(features, statistics, over, draws)

    def normalised(values: Tensor) -> Tensor:
        of = channel_statistics(values)
        return (values - of.mean[..., None, None, None]) / of.std[..., None, None, None]

    assert (statistics.std.max() < 3) and ((statistics.std + draws[:, 1]) * sign > 0).all()
    torch.testing.assert_close(normalised(moved), sign * normalised(features), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(channel_statistics(moved).mean, statistics.mean + 0.7 * over.mean)
    torch.testing.assert_close(channel_statistics(moved).std, (statistics.std + draws[:, 1]).abs())


def test_a_constant_channel_only_moves_its_mean() -> None:
    features = some_features()
    features[0, 1] = 1.1
    draws = torch.full((4, 2, 3), 2.0)
    over = spreads([channel_statistics(features)])
    moved = uncertain(features, draws)
    assert moved.isfinite().all()
    torch.testing.assert_close(moved[0, 1], features[0, 1] + 2 * over.mean[1])


def test_half_precision_features_keep_their_statistics() -> None:
    features = some_features().bfloat16()
    draws = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1))
    moved = uncertain(features, draws)
    assert moved.dtype == torch.float32
    assert torch.equal(moved, uncertain(features.float(), draws))


@pytest.mark.parametrize("vocab_size", [2, 7])
def test_corruption_changes_just_what_is_marked_into_every_other_id(vocab_size: int) -> None:
    """3000 ids: all that are marked change, none that is not; each of the V - 1 others comes about as often."""
    draw = torch.Generator().manual_seed(0)
    indices = torch.randint(vocab_size, (1, 30, 10, 10), generator=draw)
    replaced = torch.rand(indices.shape, generator=draw) < 0.5
    changed = corrupt(indices, vocab_size, replaced, torch.rand(indices.shape, generator=draw))
    assert torch.equal(changed != indices, replaced)
    assert changed.min() == 0 and changed.max() == vocab_size - 1
    steps = ((changed - indices) % vocab_size)[replaced].bincount(minlength=vocab_size)
    expected = replaced.sum() / (vocab_size - 1)
    assert steps[0] == 0 and (steps[1:] - expected).abs().max() < 5 * expected.sqrt()


def test_corruption_reaches_no_id_beyond_the_codebook() -> None:
    """The draw next to 1, at the largest id, of a codebook where float32 would round up."""
    size = 2**24 + 3
    indices = torch.tensor([0, 1, size - 1]).view(1, 1, 1, 3)
    draws = torch.full(indices.shape, 1 - 2**-24)
    changed = corrupt(indices, size, torch.ones_like(indices, dtype=torch.bool), draws)
    assert (changed >= 0).all() and (changed < size).all() and (changed != indices).all()
    assert torch.equal(corrupt(indices, size, torch.zeros_like(indices, dtype=torch.bool), draws), indices)
