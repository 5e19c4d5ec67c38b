"""A pack as a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from videofm.types import Batch


def pack(parts: Sequence[Batch]) -> Batch:
    """One batch of clips of several sizes, out of a batch of each size, of one step (see `Batch.parts`)."""
    first, captions = parts[0], [caption for part in parts for caption in part.captions]
    return Batch(
        video=first.video.new_zeros(len(captions), 3, 0, 0, 0),
        captions=captions,
        fps=torch.cat([part.fps for part in parts]),
        sample_ids=[name for part in parts for name in part.sample_ids],
        step=first.step,
        num_step_samples=first.num_step_samples,
        parts=tuple(parts),
    )
