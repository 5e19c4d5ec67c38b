"""Weights of pairs by rarity, against the formula worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from videofm.data.pair_weights import rarity_weights
from videofm.errors import ConfigError, DataError


def test_rare_differences_weigh_more() -> None:
    """Bins of width 1 from 0 to 4 hold 4, 3, 0 and 1 of eight pairs (4.0 is the upper edge of the last): p = 1/2, 3/8, 1/8."""
    differences = [0.0, 0.1, 0.2, 0.9, 1.0, 1.5, 1.9, 4.0]
    expected = [(0.72 / p) ** 0.5 for p in [0.5] * 4 + [0.375] * 3 + [0.125]]
    np.testing.assert_allclose(rarity_weights(differences, 0.5, 4), expected, rtol=1e-12)
    assert rarity_weights(differences, 0.5, 4)[-1] > 1 > rarity_weights([1.0, 1.0], 0.5, 4)[0]


def test_laws_of_the_weights() -> None:
    """alpha 0 weighs all alike; order, offset and unit of the differences do not matter; alpha is an exponent."""
    values = np.random.default_rng(0).normal(size=200)
    weights = np.array(rarity_weights(values, 0.7, 10))
    assert rarity_weights(values, 0.0, 10) == [1.0] * 200
    np.testing.assert_allclose(rarity_weights(values[::-1], 0.7, 10)[::-1], weights)
    np.testing.assert_allclose(rarity_weights(8 * values, 0.7, 10), weights)
    np.testing.assert_allclose(rarity_weights(values, 1.4, 10), weights**2)
    assert rarity_weights([0.3] * 5, 1.0, 10) == pytest.approx([0.72] * 5), "one bin has them all"
    assert rarity_weights([], 1.0, 10) == []


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"alpha of rarity weights is -1; it must be finite and at least 0"):
        rarity_weights([1.0], -1.0, 4)
    with pytest.raises(ConfigError, match=r"num_bins of rarity weights is 0; a histogram has at least 1 bin"):
        rarity_weights([1.0], 1.0, 0)
    with pytest.raises(DataError, match=r"difference 1 of 2 is nan; leave out pairs without finite scores"):
        rarity_weights([1.0, float("nan")], 1.0, 4)
