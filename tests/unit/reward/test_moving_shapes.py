"""The rule reward: full marks for rendered clips, also after H.264, and for each damage the axis falls that it concerns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipelines.demo import render_shot
from videofm import media, shapes
from videofm.config.rank import AxisWeights, ModelReward, MovingShapesReward
from videofm.errors import ConfigError, DataError
from videofm.reward import reward_of

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def clip(motif: shapes.Motif, num_frames: int = 17) -> media.Frames:
    return render_shot(motif.colour, motif.shape, motif.direction, num_frames, 32, np.random.default_rng(3))


def score(frames: media.Frames, caption: str, **weights: float) -> dict[str, float]:
    config = MovingShapesReward(kind="moving_shapes", weights=AxisWeights(**weights))
    return reward_of(config).score([frames], [caption])[0]


@pytest.mark.parametrize("motif", shapes.motifs()[::7], ids=lambda motif: motif.caption)
def test_what_the_caption_says_has_full_marks(motif: shapes.Motif, tmp_path: Path) -> None:
    frames = clip(motif)
    media.write_video(tmp_path / "clip.mp4", frames, 25)
    for video, smooth in ((frames, 0.95), (media.read_video(tmp_path / "clip.mp4"), 0.75)):  # tiny frames: H.264 shakes them
        found = score(video, motif.caption)
        assert (found["direction"], found["colour"], found["shape"]) == (1, 1, 1)
        assert found["smoothness"] > smooth and found["overall"] > (3 + smooth) / 4


@pytest.mark.parametrize("motif", shapes.motifs()[::11], ids=lambda motif: motif.caption)
def test_each_damage_costs_its_own_axis(motif: shapes.Motif) -> None:
    """Played backwards the shape moves the other way, as smoothly; shuffled frames jump; another colour or outline is that."""
    frames, right = clip(motif), score(clip(motif), motif.caption)
    backwards = score(frames[::-1], motif.caption)
    assert backwards["direction"] == 0 and backwards["smoothness"] == pytest.approx(right["smoothness"])
    shuffled = score(frames[np.random.default_rng(0).permutation(len(frames))], motif.caption)
    assert shuffled["smoothness"] < 0.6 < right["smoothness"] and shuffled["colour"] == shuffled["shape"] == 1
    for axis, name in (("colour", motif.colour), ("shape", motif.shape), ("direction", motif.direction)):
        words = {"colour": shapes.COLOURS, "shape": shapes.SHAPES, "direction": OPPOSITE}[axis]
        other = motif.caption.replace(name, next(word for word in words if word != name and word != OPPOSITE.get(name)))
        wrong = score(frames, other)
        assert wrong[axis] == 0 and {key for key in right if key != "overall" and wrong[key] < right[key]} == {axis}
    for spoilt in (backwards, shuffled, wrong):
        assert spoilt["overall"] < right["overall"]


def test_the_backwards_clip_is_right_for_the_opposite_caption() -> None:
    motif = shapes.motifs()[5]
    caption = motif.caption.replace(motif.direction, OPPOSITE[motif.direction])
    assert score(clip(motif)[::-1], caption)["direction"] == 1


def test_nothing_to_see_has_no_marks() -> None:
    """Grey frames, and a shape that stands still: not smooth either, so that no video wins by standing still."""
    grey = np.full((9, 32, 32, 3), 70, np.uint8)
    assert score(grey, "a red circle moving left") == dict.fromkeys(
        ("overall", "direction", "colour", "shape", "smoothness"), 0.0
    )
    still = clip(shapes.motifs()[0])[:1].repeat(9, axis=0)
    found = score(still, shapes.motifs()[0].caption)
    assert found["direction"] == found["smoothness"] == 0 and found["colour"] == found["shape"] == 1
    assert found["overall"] == 0.5


def test_overall_is_the_mean_by_weight() -> None:
    """Backwards: direction 0, the others 1 but for smoothness s. (3 x 0 + 1 + 0 + 0.5 s) / (3 + 1 + 0.5)."""
    motif = shapes.motifs()[1]
    found = score(clip(motif)[::-1], motif.caption, direction=3.0, colour=1.0, shape=0.0, smoothness=0.5)
    assert found["overall"] == pytest.approx((1 + 0.5 * found["smoothness"]) / 4.5)
    assert score(clip(motif)[::-1], motif.caption, colour=0.0, shape=0.0, smoothness=0.0)["overall"] == 0


def test_a_caption_without_a_shape_is_judged_by_the_other_axes() -> None:
    motif = shapes.motifs()[1]
    found = score(clip(motif), f"a {motif.colour} thing moving {motif.direction}")
    assert "shape" not in found and found["overall"] == pytest.approx((2 + found["smoothness"]) / 3)
    with pytest.raises(DataError, match="names no shape, and reward.weights gives no other axis a weight"):
        score(clip(motif), f"a {motif.colour} thing moving {motif.direction}", direction=0.0, colour=0.0, smoothness=0.0)


def test_a_score_is_of_its_own_video_alone() -> None:
    motifs = shapes.motifs()[::9]
    reward = reward_of(MovingShapesReward(kind="moving_shapes"))
    videos, captions = [clip(motif) for motif in motifs], [motif.caption for motif in motifs]
    together = reward.score(videos, captions)
    assert together == [reward.score([video], [text])[0] for video, text in zip(videos, captions, strict=True)]


def test_wrong_requests() -> None:
    with pytest.raises(DataError, match="must name one colour"):
        score(clip(shapes.motifs()[0]), "a dog on a beach")
    with pytest.raises(ValueError, match="all weights are 0"):
        AxisWeights(direction=0.0, colour=0.0, shape=0.0, smoothness=0.0)
    with pytest.raises(ConfigError, match="no reward is called 'none'"):
        reward_of(ModelReward.model_construct(kind="none", run="x"))
