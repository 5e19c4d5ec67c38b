"""Whose turn it is when several datasets are read together: exact shares at every moment, from counts alone.

The next turn goes to the dataset with the earliest deadline among those that are behind. A dataset with share w is behind at
turn n if it has had fewer than w * n turns, and its turn number c + 1 is due by ceil((c + 1) / w). Serving deadlines in this
order meets all of them (Baruah et al., "Proportionate progress", 1996), so after n turns each dataset has had w * n to within
one. Taking the dataset that is furthest behind, the plain form of error diffusion, does not keep to one: weights of 876, 168,
33, 5, 4, 4, 4 and 1 are off by 1.19.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the proportions of decimals, exactly as they were written."""
    exact = [Fraction(str(weight)) for weight in weights]
    unit = lcm(*(value.denominator for value in exact))
    return [int(value * unit) for value in exact]


def next_turn(weights: Sequence[int], counts: Sequence[int]) -> int:
    """Who is next, after `counts` turns of each."""
    total, turn = sum(weights), sum(counts) + 1
    behind = [i for i, count in enumerate(counts) if count * total < weights[i] * turn]
    return min(behind, key=lambda i: (-(-(counts[i] + 1) * total // weights[i]), i))
