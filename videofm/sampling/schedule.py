"""The noise levels that a sampler visits: a list from 1 to 0 (LTX-Video, spec C.5; Step-Video, spec A4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from videofm.config.sample import (
    LinearQuadraticScheduleConfig,
    LinearScheduleConfig,
    LTXScheduleConfig,
    ScheduleConfig,
    ShiftedScheduleConfig,
)
from videofm.errors import CheckpointError, ConfigError

_FIXED = {"num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": True, "time_shift_type": "exponential"}
_FIXED |= {"invert_sigmas": False, "stochastic_sampling": False}
_FIXED |= {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}


class SigmaSchedule(Protocol):
    """Where a sampler evaluates the model."""

    def sigmas(self, num_steps: int, num_tokens: int) -> Tensor:
        """`(num_steps + 1,)` float32, falling from 1 to 0, for a sequence of `num_tokens` latent tokens.

        Raises:
            ConfigError: a number of steps that the schedule does not have.
        """
        ...


@dataclass(frozen=True)
class Schedule:
    """LTX-Video: evenly spaced levels, shifted towards noise for long sequences, stretched so that the last one above 0 is
    `terminal`.

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
        _check_steps(num_steps)
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
                f"this scheduler config is not one of LTX-Video 0.9: {other or 'unset ' + ', '.join(missing)}. It has dynamic "
                "shifting and a terminal level; for another model say which schedule it takes (schedule: {kind: ...})."
            )
        return cls(*(config[name] for name in fields))


@dataclass(frozen=True)
class LinearQuadraticSchedule:
    """Even steps that take `threshold` of the noise away, then steps that grow quadratically (LTX-Video 0.9.5, spec C.5).

    `linear_steps` of the steps are even; None takes half of them.
    """

    threshold: float = 0.025
    linear_steps: int | None = None

    def sigmas(self, num_steps: int, num_tokens: int) -> Tensor:
        """`(num_steps + 1,)` float32, falling from 1 to 0, whatever `num_tokens`.

        With M even steps of N, the noise taken away is `threshold * i / M` up to step M; behind it is the parabola
        that goes on with the same slope and reaches 1 at step N: with `j = i - M` and `Q = N - M`,
        `threshold + threshold * j / M + (1 - threshold - threshold * Q / M) * (j / Q) ** 2`.
        One step alone goes straight from 1 to 0.

        Raises:
            ConfigError: `num_steps` is not positive, not more than `linear_steps`, or so much more that levels would rise.
        """
        _check_steps(num_steps)
        if num_steps == 1:
            return torch.tensor([1.0, 0.0])
        even = num_steps // 2 if self.linear_steps is None else self.linear_steps
        if even >= num_steps:
            raise ConfigError(f"num_steps is {num_steps}, and the schedule has {even} even steps: take more than {even} steps.")
        quadratic = num_steps - even
        index = torch.arange(num_steps + 1, dtype=torch.float64)
        slope = self.threshold / even
        beyond = (index - even).clamp(min=0) / quadratic
        removed = slope * index + (1 - slope * num_steps) * beyond**2
        if removed.diff().min() <= 0:
            raise ConfigError(
                f"{even} even steps to {self.threshold:g} are too steep for {num_steps} steps: the levels would rise again. "
                "Lower threshold, or take more even steps."
            )
        return (1.0 - removed).float()


@dataclass(frozen=True)
class ShiftedSchedule:
    """Even levels through `s * sigma / (1 + (s - 1) * sigma)` with s = `shift` (Step-Video, spec A4); 1 leaves them even."""

    shift: float = 1.0

    def sigmas(self, num_steps: int, num_tokens: int) -> Tensor:
        """`(num_steps + 1,)` float32, falling from 1 to 0, whatever `num_tokens`.

        Raises:
            ConfigError: `num_steps` is not positive.
        """
        _check_steps(num_steps)
        even = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
        return (self.shift * even / (1.0 + (self.shift - 1.0) * even)).float()


def build_schedule(config: ScheduleConfig) -> SigmaSchedule:
    """The schedule that a config section describes."""
    match config:
        case LTXScheduleConfig():
            return Schedule(config.base_tokens, config.max_tokens, config.base_shift, config.max_shift, config.terminal)
        case LinearQuadraticScheduleConfig(threshold=threshold, linear_steps=linear_steps):
            return LinearQuadraticSchedule(threshold, linear_steps)
        case ShiftedScheduleConfig(shift=shift):
            return ShiftedSchedule(shift)
        case LinearScheduleConfig():
            return ShiftedSchedule(1.0)


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ConfigError(f"num_steps is {num_steps}, and sampling takes at least 1 step.")
