"""How a scalar becomes a vector: the sinusoid of diffusion models and the small MLP behind it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

NUM_SINUSOID_CHANNELS = 256


def sinusoid(values: Tensor, num_channels: int = NUM_SINUSOID_CHANNELS, max_period: float = 10000.0) -> Tensor:
    """Cosines then sines of `values` at falling frequencies; `(...,)` -> `(..., num_channels)` float32."""
    angles = values.float()[..., None] * wave_frequencies(num_channels, max_period, values.device)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def wave_frequencies(
    num_channels: int = NUM_SINUSOID_CHANNELS, max_period: float = 10000.0, device: torch.device | str | None = None
) -> Tensor:
    """The frequencies of `sinusoid`, from 1 down to nearly `1 / max_period`, `(num_channels // 2,)` float32."""
    half = num_channels // 2
    exponents = torch.arange(half, dtype=torch.float32, device=device) / half
    return torch.exp(-math.log(max_period) * exponents)


class ScalarEmbedding(nn.Module):
    """Sinusoid, Linear, SiLU, Linear: values `(...,)` on a scale of 0 to 1000 -> `(..., width)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(NUM_SINUSOID_CHANNELS, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, values: Tensor) -> Tensor:
        """`(...,)` -> `(..., width)` in the dtype of the weights."""
        waves = sinusoid(values).to(self.linear1.weight.dtype)
        return self.linear2(nn.functional.silu(self.linear1(waves)))
