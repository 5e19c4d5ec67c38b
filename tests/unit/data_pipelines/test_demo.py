"""The demo set: the same bytes on every run, balanced, and drawn as its captions say."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from data_pipelines import demo
from videofm import shapes
from videofm.config import DemoDataConfig
from videofm.errors import Interrupted
from videofm.run_dir import RunDirectory

CONFIG = DemoDataConfig(kind="demo_data", num_videos=3, shots_per_video=2, num_frames=12)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_same_bytes_twice_and_others_for_another_seed(tmp_path):
    results = [demo.run(config, RunDirectory(tmp_path / name)) for name, config in
               (("a", CONFIG), ("b", CONFIG), ("c", CONFIG.model_copy(update={"seed": 1})))]  # fmt: skip
    assert results[0] == {"num_videos": 3, "num_shots": 6, "num_broken": 8}
    first, second = (digests(tmp_path / name / "videos") for name in "ab")
    assert not {name for name in first | second if first.get(name) != second.get(name)}
    assert digests(tmp_path / "a/videos")["demo-00000.mp4"] != digests(tmp_path / "c/videos")["demo-00000.mp4"]
    assert (tmp_path / "a/prompts.txt").read_text().splitlines() == shapes.captions()


def test_sidecar_covers_every_frame(tmp_path):
    demo.run(CONFIG.model_copy(update={"broken": False}), RunDirectory(tmp_path))
    spans = json.loads((tmp_path / "videos/demo-00001.json").read_text())["captions"]
    assert [(span["start_frame"], span["end_frame"]) for span in spans] == [(0, 12), (12, 24)]
    assert {span["caption"] for span in spans} <= set(shapes.captions())
    assert not list((tmp_path / "videos").glob("odd-*"))


def test_captions_are_balanced():
    plan = demo.plan_shots(CONFIG.model_copy(update={"num_videos": 192, "shots_per_video": 4}))
    counts = Counter(motif.caption for shots in plan for motif in shots)
    assert len(shapes.captions()) == len(set(shapes.captions())) == 48
    assert set(counts.values()) == {16} and len(counts) == 48  # 768 shots over 48 captions
    assert shapes.parse("a cyan square moving up") == shapes.Motif("cyan", "square", "up")


@pytest.mark.parametrize("motif", shapes.motifs(), ids=lambda motif: motif.caption)
def test_shot_shows_its_caption(motif):
    """The saturated pixels have the colour of the caption, and their centre moves its way by about a pixel a frame, in view."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        frames = demo.render_shot(motif.colour, motif.shape, motif.direction, 24, 32, rng).astype(float)
        assert frames.shape == (24, 32, 32, 3)
        spread = frames.max(-1) - frames.min(-1)  # (T, H, W)
        weights = np.where(spread > 60, spread, 0)
        colour = (frames * weights[..., None]).sum((0, 1, 2)) / weights.sum()
        nearest = min(shapes.COLOURS, key=lambda name: np.abs(np.array(shapes.COLOURS[name]) - colour).sum())
        assert nearest == motif.colour
        ys, xs = np.mgrid[:32, :32]
        total = weights.sum((1, 2))
        centres = np.stack([(weights * ys).sum((1, 2)) / total, (weights * xs).sum((1, 2)) / total], -1)  # (T, 2)
        step = (centres[16] - centres[8]) / 8
        assert step @ np.array(shapes.DIRECTIONS[motif.direction]) == pytest.approx(0.9, abs=0.2)
        assert np.abs(step).min() < 0.15
        assert total.min() > 0.7 * total.max()


def test_background_is_nearly_grey():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        frame = demo.render_shot("red", "circle", "left", 2, 32, rng)[0].astype(int)
        spread = frame.max(-1) - frame.min(-1)
        assert np.median(spread) <= shapes.MAX_TINT + 1
        low, high = shapes.BACKGROUND_LEVELS
        assert low - 1 <= np.median(frame) <= high + 1


def test_stop_request_ends_it(tmp_path):
    run = RunDirectory(tmp_path)
    run.request_stop()
    with pytest.raises(Interrupted, match="stopped at video 0 of 3; run it again"):
        demo.run(CONFIG, run)


def test_a_second_attempt_renders_only_what_is_missing(tmp_path):
    """A video counts as done once its sidecar, which is written last, is there."""
    settings, run = DemoDataConfig(kind="demo_data", num_videos=3, shots_per_video=1, broken=False), RunDirectory(tmp_path)
    demo.run(settings, run)
    videos = sorted((tmp_path / "videos").glob("*.mp4"))
    before, contents = [path.stat().st_mtime_ns for path in videos], [path.read_bytes() for path in videos]
    videos[1].with_suffix(".json").unlink()
    demo.run(settings, run)
    after = [path.stat().st_mtime_ns for path in videos]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert [path.read_bytes() for path in videos] == contents


def test_speed_is_that_of_the_config():
    """Pixels a frame at size 32, in twice the size twice as many; the centre of a mask moves by as much between its ends."""
    for size in (32, 64):
        frames = demo.render_shot("red", "circle", "right", 12, size, np.random.default_rng(0), speeds=(0.4, 0.4)).astype(float)
        weights = np.where(frames.max(-1) - frames.min(-1) > 60, 1.0, 0.0).sum(axis=1)  # (T, W)
        centre = weights @ np.arange(size) / weights.sum(axis=1)
        assert (centre[-1] - centre[0]) / 11 == pytest.approx(0.4 * size / 32, rel=0.15)
    with pytest.raises(ValueError, match="speed is"):
        DemoDataConfig(kind="demo_data", speed=[1.0, 0.5])


def test_a_share_of_the_captions_tells_another_direction_and_the_pixels_do_not():
    """Of 480 shots with a share of a half, 4 standard deviations are 4 * sqrt(480) / 2 = 44 shots; of the 240 that are wrong,
    each of the three other turns has 80, with 4 standard deviations of 4 * sqrt(240 * 2 / 9) = 29."""
    config = CONFIG.model_copy(update={"num_videos": 40, "shots_per_video": 12, "wrong_direction": 0.5})
    plan = demo.plan_shots(config)
    assert plan == demo.plan_shots(config.model_copy(update={"wrong_direction": 0.0}))
    pairs = [pair for index, shots in enumerate(plan) for pair in zip(shots, demo.told(config, index, shots), strict=True)]
    wrong = [(shown, said) for shown, said in pairs if shown != said]
    assert abs(len(wrong) - 240) < 44
    names, turns = list(shapes.DIRECTIONS), [0, 0, 0, 0]
    for shown, said in wrong:
        assert (said.colour, said.shape) == (shown.colour, shown.shape)
        turns[(names.index(said.direction) - names.index(shown.direction)) % 4] += 1
    assert turns[0] == 0 and all(abs(count - len(wrong) / 3) < 29 for count in turns[1:])
    whole = config.model_copy(update={"wrong_direction": 1.0})
    assert all(a.direction != b.direction for a, b in zip(plan[0], demo.told(whole, 0, plan[0]), strict=True))
    assert demo.told(CONFIG, 0, plan[0]) == plan[0]
