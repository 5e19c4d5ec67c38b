"""The Fréchet distance against closed forms, its streaming statistics, and rFVD on top of a network."""

import numpy as np
import pytest
import torch
from torch import nn

from videofm.errors import DataError
from videofm.evaluation.frechet import FeatureStatistics, frechet_distance
from videofm.evaluation.perceptual import ReconstructionFVD, lpips_per_frame


def gaussian(mean, covariance, num_clips=1000):
    """Statistics of exactly this mean and covariance."""
    return FeatureStatistics(mean.double(), covariance.double() * (num_clips - 1), num_clips)


def random_covariance(seed, size=5):
    factor = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T


def test_equal_statistics_are_at_distance_zero():
    """Also where there are fewer clips than features and the covariance is singular."""
    for num_clips in (3, 400):
        features = torch.randn(num_clips, 50, generator=torch.Generator().manual_seed(0)) * 10 + 100
        statistics = FeatureStatistics.of(features)
        scale = statistics.covariance.trace().item()
        assert frechet_distance(statistics, statistics) <= 1e-10 * scale


def test_a_shift_costs_its_squared_length():
    """|d|^2 = 9 + 16 + 0 for d = (3, -4, 0) added to every clip."""
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifted = features + torch.tensor([3.0, -4.0, 0.0])
    assert frechet_distance(FeatureStatistics.of(features), FeatureStatistics.of(shifted)) == pytest.approx(25.0, abs=1e-9)


def test_diagonal_gaussians():
    """Independent features: the sum of (m1 - m2)^2 + (s1 - s2)^2, here (1 + 0 + 4) + (4 + 1 + 0) = 10."""
    a = gaussian(torch.tensor([0.0, 1.0, 2.0]), torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    b = gaussian(torch.tensor([1.0, 1.0, 0.0]), torch.diag(torch.tensor([9.0, 1.0, 9.0])))
    assert frechet_distance(a, b) == pytest.approx(10.0, abs=1e-9)


def test_scaling_by_a_factor():
    """Covariances S and 4 S commute: tr(S + 4 S - 2 * 2 S) = tr S, whatever S is."""
    covariance, mean = random_covariance(0), torch.zeros(5)
    distance = frechet_distance(gaussian(mean, covariance), gaussian(mean, 4 * covariance))
    assert distance == pytest.approx(covariance.trace().item(), rel=1e-9)


def test_covariances_that_do_not_commute():
    """tr (A^1/2 B A^1/2)^1/2 is the sum of the roots of the eigenvalues of the plain product A B, which needs no root of A."""
    a, b, mean = random_covariance(1), random_covariance(2), torch.zeros(5)
    roots = np.sqrt(np.linalg.eigvals((a @ b).numpy()).real).sum()
    expected = a.trace().item() + b.trace().item() - 2 * roots
    assert (a @ b - b @ a).abs().max() > 1
    assert frechet_distance(gaussian(mean, a), gaussian(mean, b)) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(gaussian(mean, b), gaussian(mean, a)) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("sizes", [[30], [1, 29], [7, 1, 22], [1] * 30])
def test_any_split_into_batches_gives_the_statistics_of_the_whole(sizes):
    """With a mean of 1e6 and a spread of 1, sums of squares in float64 would keep 4 digits; merging keeps them."""
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    first, *others = [FeatureStatistics.of(part) for part in features.split(sizes)]
    for other in others:
        first = first.merged(other)
    assert first.num_clips == 30
    np.testing.assert_allclose(first.mean.numpy(), features.mean(0).numpy(), rtol=1e-14)
    np.testing.assert_allclose(first.covariance.numpy(), np.cov(features.numpy() - 1e6, rowvar=False), rtol=1e-7, atol=1e-8)


def test_few_clips_are_biased_upwards():
    """Two samples of one Gaussian are at distance zero in truth; the estimate falls with the number of clips."""
    generator = torch.Generator().manual_seed(0)

    def estimate(num_clips):
        a, b = (FeatureStatistics.of(torch.randn(num_clips, 10, generator=generator)) for _ in range(2))
        return frechet_distance(a, b)

    assert estimate(8) > 3 * estimate(100) > 9 * estimate(2000) > 0


def test_refusals():
    one, two = FeatureStatistics.of(torch.randn(1, 4)), FeatureStatistics.of(torch.randn(2, 4))
    with pytest.raises(DataError, match="a covariance needs at least 2 clips, not 1"):
        frechet_distance(one, two)
    assert frechet_distance(one.merged(one), two) > 0
    with pytest.raises(DataError, match="statistics of 4 and of 3 features cannot meet"):
        frechet_distance(two, FeatureStatistics.of(torch.randn(2, 3)))
    with pytest.raises(DataError, match="features are not finite"):
        FeatureStatistics.of(torch.tensor([[float("nan")]]))
    with pytest.raises(DataError, match=r"features must be \(B, D\) with at least one row, not \(0, 4\)"):
        FeatureStatistics.of(torch.zeros(0, 4))


class MeanColour(nn.Module):
    """A network whose features are the three mean colours of a clip."""

    def forward(self, video):
        return video.mean(dim=(2, 3, 4))


def test_rfvd_over_batches():
    """Brightening every clip by 0.2 shifts three features by 0.2: 3 * 0.04. Identity is at zero."""
    clips = torch.rand(6, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    brighter, same = ReconstructionFVD(MeanColour()), ReconstructionFVD(MeanColour())
    with pytest.raises(DataError, match="rFVD needs at least 2 clips, not 0"):
        brighter.distance()
    for batch in clips.split(4):
        brighter.update(batch + 0.2, batch)
        same.update(batch, batch)
    assert brighter.num_clips == 6
    assert brighter.distance() == pytest.approx(0.12, abs=1e-6)
    assert same.distance() == pytest.approx(0, abs=1e-12)


class FrameDistance(nn.Module):
    """Stands for LPIPS and notes how many frames it sees at once."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, a, b):
        self.seen.append(a.shape[2])
        return (a - b).abs().mean(dim=(1, 3, 4))


def test_lpips_per_frame_takes_a_few_frames_at_once():
    a, b, network = torch.rand(2, 3, 7, 4, 4), torch.rand(2, 3, 7, 4, 4), FrameDistance()
    torch.testing.assert_close(lpips_per_frame(network, a, b, frames_at_once=3), FrameDistance()(a, b))
    assert network.seen == [3, 3, 1]
