"""The Fréchet distance between two sets of features, each taken for a Gaussian (Heusel et al. 2017; for clips, Unterthiner et
al. 2018), in float64.

The estimate is biased upwards, the more so the fewer clips there are: with no more clips than features the covariance has not
even full rank. Numbers compare only at equal counts, so `num_clips` and the number of features belong next to every distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from videofm.errors import DataError


@dataclass(frozen=True)
class FeatureStatistics:
    """What is kept of the features of any number of clips; statistics of parts merge into those of the whole.

    Attributes:
        mean: `(D,)` float64.
        scatter: `(D, D)` float64, the sum of outer products of deviations from the mean.
        num_clips: how many clips.
    """

    mean: Tensor
    scatter: Tensor
    num_clips: int

    @staticmethod
    def of(features: Tensor) -> FeatureStatistics:
        """Of features `(B, D)`, B at least 1.

        Raises:
            DataError: not a matrix with a row, or not finite.
        """
        if features.ndim != 2 or features.shape[0] == 0:
            raise DataError(f"features must be (B, D) with at least one row, not {tuple(features.shape)}.")
        if not torch.isfinite(features).all():
            raise DataError("features are not finite: a clip, or the network that read it, is broken.")
        wide = features.detach().double().cpu()
        mean = wide.mean(dim=0)
        centred = wide - mean
        return FeatureStatistics(mean, centred.T @ centred, wide.shape[0])

    def merged(self, other: FeatureStatistics) -> FeatureStatistics:
        """The statistics of both sets together (Chan et al. 1979, which loses no digits to a large mean).

        Raises:
            DataError: another number of features.
        """
        _check_widths(self, other)
        count = self.num_clips + other.num_clips
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.num_clips / count)
        between = torch.outer(apart, apart) * (self.num_clips * other.num_clips / count)
        return FeatureStatistics(mean, self.scatter + other.scatter + between, count)

    @property
    def covariance(self) -> Tensor:
        """`(D, D)` float64, unbiased.

        Raises:
            DataError: fewer than two clips.
        """
        if self.num_clips < 2:
            raise DataError(f"a covariance needs at least 2 clips, not {self.num_clips}.")
        return self.scatter / (self.num_clips - 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """`|mean_a - mean_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)` for covariances A and B; biased for few clips (see above).

    The trace of that root is the sum of the singular values of `A^1/2 B^1/2`, which keeps its digits where covariances are
    singular. Equal statistics give 0 up to rounding.

    Raises:
        DataError: fewer than two clips on a side, or different numbers of features.
    """
    _check_widths(a, b)
    root_a, root_b = _root(a.covariance), _root(b.covariance)
    overlap = torch.linalg.svdvals(root_a @ root_b).sum()
    apart = (a.mean - b.mean).square().sum()
    # Traces of the roots' squares, so that what _root cut off is missing on both sides.
    return float((apart + root_a.square().sum() + root_b.square().sum() - 2 * overlap).clamp_min(0))


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite matrix; eigenvalues below zero are rounding and count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _check_widths(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if a.mean.shape != b.mean.shape:
        raise DataError(f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot meet: use one network for both.")
