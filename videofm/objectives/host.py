"""Between host and device without waiting: what the host has to know is never read from the device."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from videofm.types import SampleRng


def on_host(rng: SampleRng) -> SampleRng:
    """`rng` with draws that stay on the CPU, the same numbers: to decide with them, without waiting for the device."""
    twin = copy.copy(rng)
    twin.device = "cpu"
    return twin


def from_host(values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A few numbers as a tensor `(N,)` on `device`, without waiting until it has got there; `dtype` as in `torch.tensor`."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
