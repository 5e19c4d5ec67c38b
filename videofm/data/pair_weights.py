"""Weights of pairs by how rare their difference is (VideoDPO, spec C2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from videofm.errors import ConfigError, DataError

TYPICAL = 0.72
"""Share of the pairs that a bin has whose pairs get the weight 1; a constant of the paper."""


def rarity_weights(differences: Sequence[float], alpha: float, num_bins: int) -> list[float]:
    """The weight `(0.72 / p)^alpha` of each pair, where `p` is the share of the pairs whose difference falls into the same of
    `num_bins` equal bins between the smallest and the largest.

    Args:
        differences: score of the winner less that of the loser, one a pair; of one unit.
        alpha: how much rare pairs count; 0 gives every pair the weight 1.
        num_bins: bins of the histogram.

    Raises:
        ConfigError: `alpha` is negative or not finite, or there is no bin.
        DataError: a difference is not finite.
    """
    if not math.isfinite(alpha) or alpha < 0:
        raise ConfigError(f"alpha of rarity weights is {alpha:g}; it must be finite and at least 0 (0 weighs all pairs alike)")
    if num_bins < 1:
        raise ConfigError(f"num_bins of rarity weights is {num_bins}; a histogram has at least 1 bin")
    values = np.asarray(differences, np.float64)
    if not np.isfinite(values).all():
        number = int(np.flatnonzero(~np.isfinite(values))[0])
        raise DataError(f"difference {number} of {len(values)} is {values[number]}; leave out pairs without finite scores")
    if not len(values):
        return []
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    bins = np.minimum((scaled * num_bins).astype(int), num_bins - 1)  # the largest belongs to the last bin
    shares = np.bincount(bins, minlength=num_bins)[bins] / len(values)
    weights: list[float] = ((TYPICAL / shares) ** alpha).tolist()
    return weights
