"""Flow-matching loss at fixed noise levels and fixed noise, so that numbers of two models can be compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from videofm.errors import DataError
from videofm.types import Batch

SigmaToErrors = Callable[[Tensor], Tensor]
"""sigma `(B,)` -> `(B,)` mean squared velocity error of each sample of a batch, with noise that is the same at every call."""


@torch.no_grad()
def held_out_loss(
    prepare: Callable[[Batch], SigmaToErrors], batches: Iterable[Batch], sigmas: Sequence[float]
) -> dict[float, float]:
    """The mean over all clips of the velocity error at each of `sigmas`.

    Args:
        prepare: encodes a batch and draws its noise, once.
        batches: the clips.
        sigmas: noise levels.

    Raises:
        DataError: there is no batch.
    """
    totals, count = dict.fromkeys(sigmas, 0.0), 0
    for batch in batches:
        errors, num_clips = prepare(batch), batch.video.shape[0]
        for sigma in sigmas:
            totals[sigma] += float(errors(torch.full((num_clips,), sigma, device=batch.video.device)).double().sum())
        count += num_clips
    if count == 0:
        raise DataError("there are no clips to measure the held-out loss on.")
    return {sigma: total / count for sigma, total in totals.items()}
