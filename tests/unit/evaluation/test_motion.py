"""Smoothness, drift and seams: closed forms on drawn videos, and that rendered clips score well and spoilt ones do not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.demo import render_shot
from videofm import media, shapes
from videofm.errors import DataError
from videofm.evaluation.motion import Drift, drift, frame_differences, motion_smoothness, seam_ratio

Frames = np.ndarray
RED, BLUE = (230, 30, 30), (40, 60, 240)


def blocks(columns: list[int], rows: list[int] | None = None, colour: tuple[int, ...] = RED, grey: int = 60) -> Frames:
    """An 8x8 block at whole pixels in each frame, so that its centre is exact; a column below 0 shows none."""
    frames = np.full((len(columns), 48, 96, 3), grey, np.uint8)
    for frame, x, y in zip(frames, columns, rows or [10] * len(columns), strict=True):
        if x >= 0:
            frame[y : y + 8, x : x + 8] = colour
    return frames


def places(steps: list[int]) -> list[int]:
    return list(np.cumsum([20, *steps]))


def test_constant_velocity_is_smooth() -> None:
    assert motion_smoothness(blocks(places([3] * 9))) == pytest.approx(1.0)
    assert motion_smoothness(blocks(places([2] * 9), [5 + 3 * i for i in range(10)])) == pytest.approx(1.0)


@pytest.mark.parametrize(("large", "small"), [(5, 3), (4, 0), (6, 2)])
def test_uneven_steps_cost_their_unevenness(large: int, small: int) -> None:
    """v (1 + a) and v (1 - a) in turns give 1 - a, with a = (large - small) / (large + small)."""
    assert motion_smoothness(blocks(places([large, small] * 6))) == pytest.approx(2 * small / (large + small))


def test_turning_back_in_each_frame_is_not_smooth_at_all() -> None:
    assert motion_smoothness(blocks(places([6, -6] * 5))) == pytest.approx(0.0)


def test_one_right_angle_costs_once() -> None:
    """Ten steps of 2, five right and five down: 9 pairs of 4 pixels, one of which changes by 2 sqrt(2)."""
    right, down = places([2] * 5 + [0] * 5), [5 + 2 * max(0, i - 5) for i in range(11)]
    assert motion_smoothness(blocks(right, down)) == pytest.approx(1 - 2 * math.sqrt(2) / 36)


def test_frames_without_the_shape_are_left_out() -> None:
    """The gap hides a jump: steps into and out of it are not known."""
    columns = [*places([3] * 4), -1, 60, 63, 66, 69]
    assert motion_smoothness(blocks(columns)) == pytest.approx(1.0)
    assert motion_smoothness(blocks([20, -1, 26, -1, 32])) is None
    assert motion_smoothness(blocks([20] * 6)) is None
    assert motion_smoothness(blocks([-1] * 6)) is None


def test_rendered_clips_are_smooth_and_jittery_ones_are_not(tmp_path: Path) -> None:
    """Also after H.264. Frames shown by twos move at double speed every other frame, which is 0; a jitter of 1 pixel shows."""
    rng = np.random.default_rng(0)
    motif = shapes.motifs()[2]
    clips = [render_shot(motif.colour, motif.shape, direction, 17, 32, rng) for direction in shapes.DIRECTIONS]
    for index, clip in enumerate(clips):
        media.write_video(tmp_path / f"{index}.mp4", clip, 25)
        for frames, least in ((clip, 0.95), (media.read_video(tmp_path / f"{index}.mp4"), 0.85)):
            smoothness = motion_smoothness(frames)
            assert smoothness is not None and smoothness > least
        halting = motion_smoothness(clip[np.arange(17) // 2 * 2])
        assert halting is not None and halting < 0.05
        jitter = np.stack([np.roll(frame, number % 2, axis=(0, 1)) for number, frame in enumerate(clip)])
        shaken = motion_smoothness(jitter)
        assert shaken is not None and shaken < 0.7


def test_drift_of_background_and_hue() -> None:
    """The grey rises by 12 levels from the first three frames to the last three; red turns to blue.

    Grey-free red is (400, -200, -200) / 3, blue (-220, -160, 380) / 3: the cosine of their angle is
    (-88 + 32 - 76) / sqrt(240 * 218.4) in thousands.
    """
    frames = np.concatenate([blocks([20, 22, 24]), blocks([26, 28], grey=90), blocks([30, 32, 34], colour=BLUE, grey=72)])
    found = drift(frames, 3)
    assert found.background == pytest.approx(12.0)
    assert found.hue == pytest.approx(math.degrees(math.acos(-132 / math.sqrt(240 * 218.4))), abs=1e-6)
    same = drift(blocks(places([2] * 9)), 5)
    assert same.background == pytest.approx(0.0) and same.hue == pytest.approx(0.0, abs=1e-4)


def test_drift_of_one_channel_is_a_third_of_it() -> None:
    frames = blocks([20] * 4)
    frames[2:, :, :, 2] = np.where(frames[2:, :, :, 2] == 60, 75, frames[2:, :, :, 2])
    assert drift(frames, 2).background == pytest.approx(5.0)


def test_drift_without_a_shape_has_no_hue() -> None:
    frames = np.concatenate([blocks([20, 20]), blocks([-1, -1], grey=64)])
    assert drift(frames, 2) == Drift(4.0, None)


def test_windows_of_drift_that_do_not_fit_are_refused() -> None:
    for num_frames in (0, 4):
        with pytest.raises(
            DataError, match=f"first {num_frames} frames with the last {num_frames}, and the video has 7: take 1 to 3"
        ):
            drift(blocks([20] * 7), num_frames)


def steps_of(levels: list[int]) -> Frames:
    """Plain grey frames whose neighbours differ by what the levels say."""
    return np.array(levels, np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)


def test_seams_are_measured_against_the_usual_difference() -> None:
    """Differences 2, 4, 2, 6, 2, 2: seams before frames 2 and 4 have 4 and 6, the median of the others is 2."""
    frames = steps_of([10, 12, 16, 18, 24, 22, 20])
    assert frame_differences(frames).tolist() == [2, 4, 2, 6, 2, 2]
    assert seam_ratio(frames, [2, 4]) == pytest.approx(3.0)
    assert seam_ratio(frames, [1]) == pytest.approx(2 / 2)
    assert seam_ratio(frames, [5]) == pytest.approx(2 / 2)
    assert seam_ratio(steps_of([0, 250, 0]), [1]) == pytest.approx(1.0)  # no wrap-around of uint8


def test_seams_of_a_still_video() -> None:
    assert seam_ratio(steps_of([5, 5, 5]), [1]) == 1.0
    assert seam_ratio(steps_of([5, 9, 9]), [1]) == math.inf


@pytest.mark.parametrize("seams", [[], [0], [4], [2, 7]])
def test_seams_outside_of_the_video_are_refused(seams: list[int]) -> None:
    with pytest.raises(
        DataError, match="of a video of 4 frames: a seam is the number of the first new frame of a window, 1 to 3"
    ):
        seam_ratio(steps_of([1, 2, 3, 4]), seams)


def test_nothing_but_seams_is_refused() -> None:
    with pytest.raises(DataError, match="all 2 pairs of neighbouring frames are seams"):
        seam_ratio(steps_of([1, 2, 3]), [1, 2])


def test_a_jump_in_a_rendered_clip_shows() -> None:
    clip = render_shot("red", "circle", "left", 24, 32, np.random.default_rng(0))
    assert seam_ratio(clip, [8, 16]) < 1.3
    cut = np.concatenate([clip[:12], clip[16:]])
    assert seam_ratio(cut, [12]) > 1.5
