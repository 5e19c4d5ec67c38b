"""The classifier on clips of the demo renderer: right also after compression, blur and fading; not fooled by nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipelines.demo import render_shot
from videofm import media, shapes
from videofm.errors import DataError
from videofm.evaluation.caption_following import ShapeClassifier, Sight, caption_following, product_moment
from videofm.evaluation.shape_track import track_shape

CLASSIFIER = ShapeClassifier(shapes.COLOURS, shapes.DIRECTIONS)
Frames = np.ndarray


def render(seed: int, num_frames: int = 24) -> tuple[list[Frames], list[str]]:
    """One clip for each motif, on backgrounds and places that follow from the seed."""
    rng = np.random.default_rng(seed)
    clips = [render_shot(m.colour, m.shape, m.direction, num_frames, 32, rng) for m in shapes.motifs()]
    return clips, shapes.captions()


def blurred(clip: Frames) -> Frames:
    """What a weak VAE does: blur of one pixel in space and over neighbouring frames, and some noise."""
    soft = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in clip]).astype(np.float64)
    soft[1:] = 0.7 * soft[1:] + 0.3 * soft[:-1]
    return (soft + np.random.default_rng(0).normal(0, 6, soft.shape)).clip(0, 255).astype(np.uint8)


def faded(clip: Frames) -> Frames:
    """Half of the contrast, and lighter."""
    return (clip * 0.55 + 60).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("change", [lambda clip: clip, blurred, faded], ids=["rendered", "blurred", "faded"])
@pytest.mark.parametrize("start", [0, 8, 15])
def test_rendered_clips_score_100_percent(change: Callable[[Frames], Frames], start: int) -> None:
    """Whole shots, and the windows of 9 frames that a model is trained on, wherever in the shot they lie."""
    for seed in range(4):
        clips, captions = render(seed)
        window = slice(start, start + 9) if start else slice(None)
        found = caption_following([change(clip[window]) for clip in clips], captions, CLASSIFIER)
        assert (found.colour, found.direction, found.both, found.num_videos) == (1.0, 1.0, 1.0, 48)
        assert (found.shape, found.all) == (1.0, 1.0)


def test_clips_score_100_percent_after_h264(tmp_path: Path) -> None:
    clips, captions = render(7, num_frames=12)
    for index, clip in enumerate(clips):
        media.write_video(tmp_path / f"{index}.mp4", clip, 25)
    read = [media.read_video(tmp_path / f"{index}.mp4") for index in range(48)]
    found = caption_following(read, captions, CLASSIFIER)
    assert (found.both, found.shape, found.all) == (1.0, 1.0, 1.0)


def test_wrong_videos_are_counted_as_wrong() -> None:
    """A clip played backwards has the right colour and the wrong direction; another colour the other way round."""
    clips, captions = render(0)
    backwards = caption_following([clip[::-1] for clip in clips], captions, CLASSIFIER)
    assert (backwards.colour, backwards.direction, backwards.both) == (1.0, 0.0, 0.0)
    assert (backwards.shape, backwards.all) == (1.0, 0.0)
    swapped = caption_following([clip[..., ::-1] for clip in clips], captions, CLASSIFIER)  # red <-> blue, yellow <-> cyan
    assert swapped.colour == pytest.approx(2 / 6)
    assert swapped.direction == 1.0
    exchanged = [text.replace("circle", "X").replace("square", "circle").replace("X", "square") for text in captions]
    other = caption_following(clips, exchanged, CLASSIFIER)
    assert (other.both, other.shape, other.all) == (1.0, 0.0, 0.0)


def test_nothing_to_see_is_nothing_seen() -> None:
    rng = np.random.default_rng(0)
    grey_noise = rng.integers(0, 255, (9, 32, 32, 1)).astype(np.uint8).repeat(3, axis=3)
    assert CLASSIFIER.look(grey_noise) == Sight(None, None)
    still = render(0)[0][0][:1].repeat(9, axis=0)
    assert CLASSIFIER.look(still) == Sight("red", None, "circle")


def test_captions_outside_the_vocabulary_are_refused() -> None:
    assert CLASSIFIER.named("a cyan square moving up") == Sight("cyan", "up", "square")
    assert CLASSIFIER.named("something cyan moving up") == Sight("cyan", "up", None)
    for text in ("a dog", "a red circle", "a red blue circle moving left", "a red circle or square moving up"):
        with pytest.raises(DataError, match="must name one colour .* and one direction .* at most one shape"):
            CLASSIFIER.named(text)
    with pytest.raises(DataError, match="got 1 and 0"):
        caption_following([np.zeros((2, 8, 8, 3), np.uint8)], [], CLASSIFIER)


def test_shares_of_shape_count_the_captions_that_name_one() -> None:
    """Of three right clips one caption names no shape and one the wrong one: 1/2 of those that do, 2/3 with all right."""
    clips, captions = render(1)
    texts = [captions[0], captions[1].replace("circle", "thing"), captions[2].replace("circle", "square")]
    found = caption_following(clips[:3], texts, CLASSIFIER)
    assert (found.both, found.shape, found.all) == (1.0, 0.5, pytest.approx(2 / 3))
    assert caption_following(clips[1:2], texts[1:2], CLASSIFIER).shape is None


def painted(mask: Frames) -> Frames:
    """Three frames of a red area `(H, W)` on grey."""
    return np.where(mask[None, :, :, None], (230, 30, 30), (60, 60, 60)).astype(np.uint8).repeat(3, axis=0)


def test_the_product_moment_is_that_of_the_area() -> None:
    """1 for any upright rectangle, 2/3 for any upright ellipse; a plus is neither shape.

    A thin ring of radius 1 has E[x^2] = 1/2 and E[x^2 y^2] = 1/8, hence 1/2; a thin plus has E[x^2 y^2] near 0.
    """
    y, x = np.mgrid[:97, :97] - 48.0
    areas = {
        "square": (abs(y) < 20) & (abs(x) < 20),
        "rectangle": (abs(y) < 12) & (abs(x) < 30),
        "circle": y**2 + x**2 < 25**2,
        "ellipse": (y / 2) ** 2 + x**2 < 15**2,
        "ring": (y**2 + x**2 < 40**2) & (y**2 + x**2 > 38**2),
        "plus": ((abs(y) < 3) | (abs(x) < 3)) & (abs(y) < 30) & (abs(x) < 30),
    }
    moments = {}
    for name, area in areas.items():
        track = track_shape(painted(area))
        assert track is not None
        moments[name] = product_moment(track)
    assert [moments[name] for name in ("square", "rectangle")] == pytest.approx([1.0, 1.0], abs=1e-6)
    assert [moments[name] for name in ("circle", "ellipse")] == pytest.approx([2 / 3, 2 / 3], abs=0.02)  # of whole pixels
    assert moments["ring"] == pytest.approx(0.5, abs=0.02) and moments["plus"] < 0.1
    seen = [CLASSIFIER.look(painted(areas[name])).shape for name in ("square", "rectangle", "circle", "ellipse", "plus")]
    assert seen == ["square", "square", "circle", "circle", None]


def test_shapes_are_told_apart_with_room_to_spare() -> None:
    """Also blurred by 2 pixels, slow, and cut off at the border for most of the clip: nobody comes near the middle, 5/6."""
    rng = np.random.default_rng(3)
    moments: dict[str, list[float]] = {name: [] for name in shapes.SHAPES}
    for motif in shapes.motifs():
        clip = render_shot(motif.colour, motif.shape, motif.direction, 24, 32, rng)
        for frames in (clip, clip[-6:], np.stack([cv2.GaussianBlur(frame, (0, 0), 2.0) for frame in clip])):
            track = track_shape(frames)
            assert track is not None
            moments[motif.shape].append(product_moment(track))
    assert max(moments["circle"]) < 5 / 6 - 0.03 and min(moments["square"]) > 5 / 6 + 0.03
    assert min(moments["circle"]) > 2 / 3 - 0.1 and max(moments["square"]) < 1.05
