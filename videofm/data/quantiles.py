"""Quantiles of columns that are too long to hold: exact up to a number of rows, from a sample of them beyond.

The sample is the rows whose keys have the smallest hashes, so it depends on the set of rows alone: not on their order, nor on
how they came in pieces.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

NUM_EXACT = 1_000_000
"""Rows up to which quantiles are exact; beyond, the size of the sample."""

Columns = dict[str, np.ndarray[Any, np.dtype[np.float64]]]


class RowSample:
    """Rows of named float columns; all of them up to `size`, else those of smallest hash.

    Args:
        names: the columns.
        size: how many rows are kept; twice as many are held for a moment.
    """

    def __init__(self, names: Sequence[str], size: int = NUM_EXACT) -> None:
        self.names, self.size, self.num_rows = list(names), size, 0
        self._hashes: list[np.ndarray[Any, Any]] = []
        self._columns: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in self.names}
        self._held = 0

    def add(self, keys: Iterable[str], columns: Columns) -> None:
        """Take rows: their keys, each different from all others, and their values; NaN where there is none."""
        hashes = np.array([_hash(key) for key in keys], np.uint64)
        self.num_rows += len(hashes)
        self._held += len(hashes)
        self._hashes.append(hashes)
        for name in self.names:
            self._columns[name].append(columns[name])
        if self._held > 2 * self.size:
            self._thin()

    @property
    def exact(self) -> bool:
        """Whether no row was left out."""
        return self.num_rows <= self.size

    @property
    def rank_error(self) -> float:
        """With a probability of 99%, no quantile is further off than this share of the rows (Dvoretzky, Kiefer, Wolfowitz)."""
        return 0.0 if self.exact else math.sqrt(math.log(2 / 0.01) / (2 * self.size))

    def values(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The values of a column in ascending order, without those that are missing."""
        if not self.exact:
            self._thin()
        column = np.concatenate([np.empty(0), *self._columns[name]])
        return np.sort(column[~np.isnan(column)])

    def _thin(self) -> None:
        hashes = np.concatenate(self._hashes)
        if len(hashes) > self.size:
            chosen = np.argpartition(hashes, self.size)[: self.size]
            self._hashes = [hashes[chosen]]
            for name in self.names:
                self._columns[name] = [np.concatenate(self._columns[name])[chosen]]
            self._held = self.size


def lower_bound(values: np.ndarray[Any, np.dtype[np.float64]], quantile: float) -> float:
    """The smallest of the ascending `values` that stays when a share is dropped: of n different ones, floor(quantile n) are."""
    return float(values[math.floor(Fraction(str(quantile)) * len(values))])


def upper_bound(values: np.ndarray[Any, np.dtype[np.float64]], quantile: float) -> float:
    """The largest of the ascending `values` that stays when a share is kept: of n different ones, ceil(quantile n) are."""
    return float(values[math.ceil(Fraction(str(quantile)) * len(values)) - 1])


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
