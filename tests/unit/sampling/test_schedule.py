"""The schedule against diffusers' scheduler as LTXPipeline drives it, and against the numbers of spec C.5."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule
from pydantic import TypeAdapter

from videofm.config.sample import ScheduleConfig
from videofm.errors import CheckpointError, ConfigError
from videofm.sampling import LinearQuadraticSchedule, Schedule, ShiftedSchedule
from videofm.sampling.schedule import SigmaSchedule, build_schedule


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


@pytest.mark.parametrize("schedule", [Schedule(), LinearQuadraticSchedule(), ShiftedSchedule(13.0)])
def test_what_all_schedules_are(schedule: SigmaSchedule) -> None:
    for num_steps in (1, 2, 3, 9, 40):
        sigmas = schedule.sigmas(num_steps, 48)
        assert sigmas.shape == (num_steps + 1,)
        assert (sigmas[0], sigmas[-1]) == (1, 0)
        assert (sigmas.diff() < 0).all()
    with pytest.raises(ConfigError, match="num_steps is 0, and sampling takes at least 1 step"):
        schedule.sigmas(0, 48)


@pytest.mark.parametrize("num_steps", [2, 3, 8, 20, 41])
def test_linear_quadratic_equals_that_of_the_condition_pipeline(num_steps: int) -> None:
    theirs = torch.cat([linear_quadratic_schedule(num_steps), torch.zeros(1)])
    torch.testing.assert_close(LinearQuadraticSchedule().sigmas(num_steps, 0), theirs, rtol=0, atol=1e-6)


def test_linear_quadratic_has_its_even_part_and_one_slope_where_the_parts_meet() -> None:
    """4 even steps of 8 to 0.04: 0.01 each. Removed noise 0.04 + 0.01 j + 0.92 (j / 4)^2: 0.1075 one step on, then 0.29."""
    removed = 1 - LinearQuadraticSchedule(0.04, 4).sigmas(8, 0)
    torch.testing.assert_close(removed[:7], torch.tensor([0, 0.01, 0.02, 0.03, 0.04, 0.1075, 0.29]), rtol=0, atol=1e-6)


def test_linear_quadratic_refuses_what_does_not_fall() -> None:
    with pytest.raises(ConfigError, match="num_steps is 4, and the schedule has 4 even steps: take more than 4 steps"):
        LinearQuadraticSchedule(linear_steps=4).sigmas(4, 0)
    with pytest.raises(ConfigError, match="1 even steps to 0.9 are too steep for 20 steps"):
        LinearQuadraticSchedule(0.9, 1).sigmas(20, 0)


def test_step_videos_shift() -> None:
    """Spec A4: with s = 13 and 50 steps the first step covers t in [0, 0.0016] and half of them lie below t = 0.071."""
    time = 1 - ShiftedSchedule(13.0).sigmas(50, 0)
    assert time[1].item() == pytest.approx(0.0016, abs=5e-5)
    assert time[25].item() == pytest.approx(0.0714, abs=5e-4)


def test_shifts_compose_and_one_is_even() -> None:
    """Spec F-A 6: shift(a) after shift(b) is shift(a b)."""
    even = ShiftedSchedule(1.0).sigmas(10, 0)
    torch.testing.assert_close(even, torch.linspace(1, 0, 11), rtol=0, atol=1e-6)
    once = ShiftedSchedule(3.0).sigmas(10, 0)
    torch.testing.assert_close(4 * once / (1 + 3 * once), ShiftedSchedule(12.0).sigmas(10, 0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"kind": "ltx", "terminal": 0.2, "base_tokens": 16}, Schedule(base_tokens=16, terminal=0.2)),
        ({"kind": "linear_quadratic", "threshold": 0.1, "linear_steps": 3}, LinearQuadraticSchedule(0.1, 3)),
        ({"kind": "shifted", "shift": 17.0}, ShiftedSchedule(17.0)),
        ({"kind": "linear"}, ShiftedSchedule(1.0)),
    ],
)
def test_each_kind_of_config_builds_its_schedule(section: dict[str, object], expected: SigmaSchedule) -> None:
    config: ScheduleConfig = TypeAdapter(ScheduleConfig).validate_python(section)
    assert build_schedule(config) == expected


def test_public_config_round_trips_and_foreign_ones_are_refused() -> None:
    schedule = Schedule(base_shift=0.5, terminal=0.05)
    public = schedule.public_config() | {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    assert Schedule.from_public(public) == schedule
    with pytest.raises(CheckpointError, match="not one of LTX-Video 0.9: {'use_dynamic_shifting': False}"):
        Schedule.from_public(public | {"use_dynamic_shifting": False})
    with pytest.raises(CheckpointError, match="unset shift_terminal"):
        Schedule.from_public(public | {"shift_terminal": None})
