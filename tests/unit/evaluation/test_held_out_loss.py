"""The held-out loss: a mean over clips, at each level, with the batch prepared once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from videofm.errors import DataError
from videofm.evaluation.held_out_loss import held_out_loss
from videofm.types import Batch


def batch(*values: float) -> Batch:
    video = torch.tensor(values).view(-1, 1, 1, 1, 1)
    return Batch(video, [""] * len(values), torch.ones(len(values)), [str(value) for value in values], 0, len(values))


def test_mean_over_clips_at_each_level() -> None:
    """The error of a clip of value v at sigma is v * sigma: the mean of 1, 2, 6 is 3, so the losses are 3 * sigma."""
    prepared = []

    def prepare(one: Batch) -> Callable[[Tensor], Tensor]:
        prepared.append(one)
        return lambda sigma: one.video.flatten() * sigma

    losses = held_out_loss(prepare, [batch(1.0, 2.0), batch(6.0)], [0.1, 0.5])
    assert losses == pytest.approx({0.1: 0.3, 0.5: 1.5})
    assert len(prepared) == 2


def test_no_clips_are_refused() -> None:
    with pytest.raises(DataError, match="no clips to measure the held-out loss on"):
        held_out_loss(lambda one: lambda sigma: sigma, [], [0.5])
