"""What a plan refuses; that it splits and gathers right is proven on ranks (tests/distributed/test_layouts.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from videofm.attention.strategies import SequencePlace
from videofm.errors import ParallelError
from videofm.models.bind import choose_strategy
from videofm.parallel.sequence_plan import SequencePlan


class Model(nn.Module):
    def forward(self, latent_tokens: Tensor, sigma: Tensor) -> Tensor:
        return latent_tokens


def test_arguments_with_different_numbers_of_tokens_are_refused() -> None:
    model = Model()
    SequencePlan(split={"latent_tokens": 1, "sigma": 1}, gather=1).apply(model, SequencePlace())
    with pytest.raises(ParallelError, match="over context ranks: latent_tokens 7 along dim 1, sigma 5 along dim 1"):
        model(torch.zeros(1, 7, 2), sigma=torch.zeros(1, 5))


class Guided(nn.Module):
    def forward(self, latent_tokens: Tensor, features: Tensor | None = None) -> Tensor:
        return latent_tokens


def test_optional_arguments_count_where_they_are_there() -> None:
    """Left out or None, the tokens alone say how many there are; the layout of 7 tokens is at hand when attention runs."""
    model, place = Guided(), SequencePlace()
    SequencePlan(split={"latent_tokens": 1, "features": 1}, gather=1).apply(model, place)
    model._forward_hooks.clear()  # one process has nothing to gather from
    for optional in ({}, {"features": None}, {"features": torch.zeros(1, 7, 3)}):
        assert model(torch.zeros(1, 7, 2), **optional).shape == (1, 7, 2)
        assert place.layout is not None and place.layout.length == 7
    with pytest.raises(ParallelError, match="latent_tokens 7 along dim 1, features 5 along dim 1"):
        model(torch.zeros(1, 7, 2), torch.zeros(1, 5, 3))


@pytest.mark.parametrize(
    ("name", "degrees", "chosen"),
    [
        ("auto", (1, 1), "none"),
        ("ring", (1, 1), "none"),
        ("auto", (4, 4), "ulysses"),
        ("auto", (4, 2), "unified"),
        ("auto", (4, 1), "allgather_kv"),
        ("ring", (4, 1), "ring"),
    ],
)
def test_auto_follows_who_exchanges_heads(name: str, degrees: tuple[int, int], chosen: str) -> None:
    """`degrees` are those of context and, among these, of Ulysses."""
    context, ulysses = degrees
    mesh = type("Mesh", (), {"context_degree": context, "ulysses_degree": ulysses, "ring_degree": context // ulysses})
    assert choose_strategy(name, mesh) == chosen
