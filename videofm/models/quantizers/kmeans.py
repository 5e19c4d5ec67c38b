"""K-means, for the start of a codebook: Lloyd's iterations in float32 from a start that is spread over the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from videofm.models.quantizers.search import nearest, sum_codes

NUM_ROUNDS = 16
"""Rounds of `_spread`; all together they cost about two iterations."""


@dataclass(frozen=True)
class Clusters:
    """`centres` `(V, D)` and how many vectors are nearest to each, `counts` `(V,)`, float32."""

    centres: Tensor
    counts: Tensor


@torch.no_grad()
def kmeans(x: Tensor, num_centres: int, num_iterations: int, draws: torch.Generator) -> Clusters:
    """Clusters of the rows of `x` `(N, D)`, `N >= num_centres`. A cluster that is empty keeps its centre.

    `draws` is a CPU generator: the same on every rank, so that all find the same.
    """
    x = x.float()
    centres = _spread(x, num_centres, draws)
    for _ in range(num_iterations):
        found = sum_codes(x, nearest(x, centres), num_centres)
        means = found.sums / found.counts.clamp(min=1).unsqueeze(1)
        centres = torch.where(found.counts.unsqueeze(1) > 0, means, centres)
    return Clusters(centres, sum_codes(x, nearest(x, centres), num_centres).counts)


def _spread(x: Tensor, num: int, draws: torch.Generator) -> Tensor:
    """`num` different rows of `x`, a part a round, with odds that grow with the squared distance to those of earlier rounds.

    K-means++ (one row a round) would be too slow for large books; this is k-means|| (arXiv 1203.6402) with exact counts.
    """
    part = math.ceil(num / NUM_ROUNDS)
    first = torch.randperm(len(x), generator=draws, device="cpu")[:part].to(x.device)
    centres, distance = x[first], torch.full((len(x),), torch.inf, device=x.device)
    distance[first] = 0.0
    newest = centres
    while len(centres) < num:
        distance = torch.minimum(distance, (x - newest[nearest(x, newest)]).square().sum(1))
        uniform = torch.rand(len(x), generator=draws, device="cpu").to(x.device)
        # The largest of log(weight) + Gumbel noise are a draw without replacement with odds by weight.
        odds = distance.log() - torch.log(-torch.log(uniform.clamp(1e-12, 1 - 1e-7)))
        newest = x[odds.topk(min(part, num - len(centres))).indices]
        centres = torch.cat([centres, newest])
    return centres
