"""Work shared out by size: which rank writes which tensor of a checkpoint, which one hashes which file. No torch."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def balance(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """The rank of each piece: the largest first, each to the rank that has the least so far, of several the first.

    The most and the least that ranks get differ by the largest piece at most. The same on every rank.
    """
    loads = [(0, rank) for rank in range(num_ranks)]
    found = [0] * len(sizes)
    for piece in sorted(range(len(sizes)), key=lambda piece: (-sizes[piece], piece)):
        load, found[piece] = loads[0]
        heapq.heapreplace(loads, (load + sizes[piece], found[piece]))
    return found
