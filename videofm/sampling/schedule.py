"""The noise levels that a sampler visits: a list from 1 to 0 (LTX-Video; spec C.5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from videofm.errors import CheckpointError, ConfigError

_FIXED = {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": True, "time_shift_type": "exponential"}
_FIXED |= {"invert_sigmas": False, "stochastic_sampling": False}
_FIXED |= {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}


@dataclass(frozen=True)
class Schedule:
    """Evenly spaced levels, shifted towards noise for long sequences, stretched so that the last one above 0 is `terminal`.

    The shift mu is linear in the token count: `base_shift` at `base_tokens`, `max_shift` at `max_tokens`.
    """

    base_tokens: int = 1024
    max_tokens: int = 4096
    base_shift: float = 0.95
    max_shift: float = 2.05
    terminal: float = 0.1

    def shift(self, num_tokens: int) -> float:
        """mu for a sequence of `num_tokens` latent tokens; the line goes on beyond both ends."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return self.base_shift + slope * (num_tokens - self.base_tokens)

    def sigmas(self, num_steps: int, num_tokens: int) -> Tensor:
        """`(num_steps + 1,)` float32, falling from 1 to 0.

        `s = linspace(1, 1/N, N)`; shifted `s' = e^mu / (e^mu + 1/s - 1)`; stretched
        `1 - (1 - s') (1 - terminal) / (1 - s'_last)`; then 0.
        One step alone goes straight from 1 to 0 (the stretch is 0/0 there, and diffusers returns NaN).

        Raises:
            ConfigError: `num_steps` is not positive.
        """
        if num_steps < 1:
            raise ConfigError(f"num_steps is {num_steps}, and sampling takes at least 1 step.")
        if num_steps == 1:
            return torch.tensor([1.0, 0.0])
        even = torch.linspace(1.0, 1.0 / num_steps, num_steps, dtype=torch.float64)
        factor = math.exp(self.shift(num_tokens))
        shifted = factor / (factor + 1.0 / even - 1.0)
        stretched = 1.0 - (1.0 - shifted) * (1.0 - self.terminal) / (1.0 - shifted[-1])
        return torch.cat([stretched, stretched.new_zeros(1)]).float()

    def public_config(self) -> dict[str, Any]:
        """The fields of diffusers' FlowMatchEulerDiscreteScheduler that make it follow this schedule."""
        return _FIXED | {
            "base_image_seq_len": self.base_tokens,
            "max_image_seq_len": self.max_tokens,
            "base_shift": self.base_shift,
            "max_shift": self.max_shift,
            "shift_terminal": self.terminal,
        }

    @classmethod
    def from_public(cls, config: Mapping[str, Any]) -> Schedule:
        """The inverse of `public_config`.

        Raises:
            CheckpointError: the scheduler config asks for something that this schedule does not do.
        """
        other = {name: config[name] for name, value in _FIXED.items() if config.get(name, value) != value}
        fields = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift", "shift_terminal")
        missing = [name for name in fields if not config.get(name)]
        if other or missing:
            raise CheckpointError(
                f"this scheduler config is not one of LTX-Video 0.9: {other or 'unset ' + ', '.join(missing)}. "
                "videofm samples with dynamic shifting and a terminal level; use the diffusers sampler for this folder."
            )
        return cls(*(config[name] for name in fields))
