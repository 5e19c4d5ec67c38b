"""The schedule against diffusers' scheduler as LTXPipeline drives it, and against the numbers of spec C.5."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

from videofm.errors import CheckpointError, ConfigError
from videofm.sampling import Schedule


@pytest.mark.parametrize("num_tokens", [12, 48, 1024, 4096, 6144])
@pytest.mark.parametrize("num_steps", [2, 7, 30])
def test_equals_diffusers(num_tokens: int, num_steps: int) -> None:
    schedule = Schedule()
    theirs = FlowMatchEulerDiscreteScheduler(**schedule.public_config())
    c = theirs.config
    mu = calculate_shift(num_tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    ours = schedule.sigmas(num_steps, num_tokens)
    torch.testing.assert_close(ours, theirs.sigmas, rtol=0, atol=1e-6)
    assert ours[-2].item() == pytest.approx(0.1, abs=1e-6)


def test_numbers_of_the_spec() -> None:
    """Spec C.5, 6144 tokens, 20 steps: 1, .9946, .9886, ... .7393, .6696, .5677, .4043, .1, 0; mu at the ends."""
    sigmas = Schedule().sigmas(20, 6144)
    torch.testing.assert_close(sigmas[:3], torch.tensor([1.0, 0.9946, 0.9886]), rtol=0, atol=5e-5)
    torch.testing.assert_close(sigmas[-6:], torch.tensor([0.7393, 0.6696, 0.5677, 0.4043, 0.1, 0.0]), rtol=0, atol=5e-5)
    assert Schedule().shift(1024) == pytest.approx(0.95)
    assert Schedule().shift(4096) == pytest.approx(2.05)


def test_one_step_goes_from_noise_to_data() -> None:
    assert Schedule().sigmas(1, 48).tolist() == [1.0, 0.0]


def test_no_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_steps is 0, and sampling takes at least 1 step"):
        Schedule().sigmas(0, 48)


def test_public_config_round_trips_and_foreign_ones_are_refused() -> None:
    schedule = Schedule(base_shift=0.5, terminal=0.05)
    public = schedule.public_config() | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert Schedule.from_public(public) == schedule
    with pytest.raises(CheckpointError, match="not one of LTX-Video 0.9: {'use_dynamic_shifting': False}"):
        Schedule.from_public(public | {"use_dynamic_shifting": False})
    with pytest.raises(CheckpointError, match="unset shift_terminal"):
        Schedule.from_public(public | {"shift_terminal": None})
