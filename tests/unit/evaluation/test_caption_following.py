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
from videofm.evaluation.caption_following import ShapeClassifier, Sight, caption_following

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


def test_clips_score_100_percent_after_h264(tmp_path: Path) -> None:
    clips, captions = render(7, num_frames=12)
    for index, clip in enumerate(clips):
        media.write_video(tmp_path / f"{index}.mp4", clip, 25)
    read = [media.read_video(tmp_path / f"{index}.mp4") for index in range(48)]
    assert caption_following(read, captions, CLASSIFIER).both == 1.0


def test_wrong_videos_are_counted_as_wrong() -> None:
    """A clip played backwards has the right colour and the wrong direction; another colour the other way round."""
    clips, captions = render(0)
    backwards = caption_following([clip[::-1] for clip in clips], captions, CLASSIFIER)
    assert (backwards.colour, backwards.direction, backwards.both) == (1.0, 0.0, 0.0)
    swapped = caption_following([clip[..., ::-1] for clip in clips], captions, CLASSIFIER)  # red <-> blue, yellow <-> cyan
    assert swapped.colour == pytest.approx(2 / 6)
    assert swapped.direction == 1.0


def test_nothing_to_see_is_nothing_seen() -> None:
    rng = np.random.default_rng(0)
    grey_noise = rng.integers(0, 255, (9, 32, 32, 1)).astype(np.uint8).repeat(3, axis=3)
    assert CLASSIFIER.look(grey_noise) == Sight(None, None)
    still = render(0)[0][0][:1].repeat(9, axis=0)
    assert CLASSIFIER.look(still) == Sight("red", None)


def test_captions_outside_the_vocabulary_are_refused() -> None:
    assert CLASSIFIER.named("a cyan square moving up") == Sight("cyan", "up")
    for text in ("a dog", "a red circle", "a red blue circle moving left"):
        with pytest.raises(DataError, match="must name one colour .* and one direction"):
            CLASSIFIER.named(text)
    with pytest.raises(DataError, match="got 1 and 0"):
        caption_following([np.zeros((2, 8, 8, 3), np.uint8)], [], CLASSIFIER)
