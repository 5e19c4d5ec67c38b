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
