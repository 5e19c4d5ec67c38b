"""Ranks that share samples: a follower takes the leader's sums, and holds its codebook to the last bit (`Replicated`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.models.test_quantizers import latents, small, state
from videofm.models.quantizers import Quantizer, ema
from videofm.types import OneRank


class Leader(OneRank):
    """What it sums and gathers is kept for its followers."""

    def __init__(self) -> None:
        self.told: list[Tensor] = []

    def sum(self, value: Tensor) -> Tensor:
        self.told.append(value.clone())
        return value

    gather = sum


class Follower(OneRank):
    """Gets what the leader got, in the same order."""

    def __init__(self, leader: Leader) -> None:
        self.told = iter(leader.told)

    def sum(self, value: Tensor) -> Tensor:
        told = next(self.told)
        assert told.shape == value.shape and told.dtype == value.dtype
        return told.clone()

    gather = sum


def train(quantizer: Quantizer, ranks: Any, noise: float) -> list[dict[str, Tensor]]:
    """The state after each of 8 updates, past the start of a book and past a revival; vectors are off by `noise`."""
    states = []
    for step in range(8):
        z = latents(quantizer, step)
        quantizer(z + noise * torch.randn(z.shape, generator=torch.Generator().manual_seed(step)))
        quantizer.update(ranks)
        states.append({name: tensor.clone() for name, tensor in state(quantizer).items()})
    return states


@pytest.mark.parametrize("kind", ["vq_ema", "rvq"])
def test_a_follower_keeps_the_book_of_its_leader(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own vectors, and what k-means makes of the same ones, differ in the last bits, as on a GPU. Alone, it drifts."""
    leader = Leader()
    wanted = train(small(kind, dead_share=0.8), leader, 0.0)
    exact = ema.kmeans

    def off(*args: Any) -> Any:
        found = exact(*args)
        return type(found)(found.centres * (1 + 1e-6), found.counts)

    monkeypatch.setattr(ema, "kmeans", off)
    found = train(small(kind, dead_share=0.8), Follower(leader), 1e-6)
    assert int(wanted[-1]["counters"][3]) > 0 and bool(wanted[-1]["counters"][4]) and int(wanted[-1]["counters"][5]) > 0
    for step, (own, theirs) in enumerate(zip(found, wanted, strict=True)):
        differ = [name for name in theirs if not own[name].equal(theirs[name])]
        assert not differ, (step, differ)
    alone = train(small(kind, dead_share=0.8), OneRank(), 1e-6)
    assert not alone[-1]["books"].equal(wanted[-1]["books"])
