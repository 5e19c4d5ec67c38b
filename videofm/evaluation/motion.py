"""Does a video move as a camera would have seen it? Smoothness, drift over its length, and jumps where windows meet.

`seam_ratio` is for any video. The others are analytic, for one saturated shape before a nearly grey background (the demo set),
in the place of VBench's learned measures of motion smoothness and of subject and background consistency (arXiv 2311.17982).
Frames are uint8 `(T, H, W, 3)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from videofm.errors import DataError
from videofm.evaluation.shape_track import MIN_CHROMA, Array, chroma, shape_colour, track_shape

_SOFT_CUT = 0.15
"""Where `track_shape` cuts for steps of less than a pixel: with a cut at a half, a square's centre moves by fits and starts."""
_BACKGROUND = 0.25
"""Share of the shape's peak chroma below which a pixel is background."""


@dataclass(frozen=True)
class Drift:
    """How a video's end differs from its beginning.

    Attributes:
        background: mean absolute difference of the background's mean colour, over the channels, in levels of 0 to 255.
        hue: angle between the shape's colours without their grey part, in degrees, 0 to 180; None where either end shows none.
    """

    background: float
    hue: float | None


def motion_smoothness(frames: Array, min_chroma: float = MIN_CHROMA) -> float | None:
    """How evenly the shape's centre moves, 0 to 1: `1 - sum |step' - step| / sum (|step'| + |step|)` over pairs of steps.

    A step is the move of the centre from one frame to the next, a pair two steps in a row, all frames of which show the shape.
    Constant velocity gives 1; steps that alternate between v (1 + a) and v (1 - a), with a at most 1, give 1 - a; a shape that
    turns back in each frame gives 0. None where no three frames in a row show a shape that moves.
    """
    track = track_shape(frames, min_chroma, cut=_SOFT_CUT)
    if track is None:
        return None
    centres = np.full((len(track.seen), 2), np.nan)
    centres[track.seen] = track.centres
    steps = np.diff(centres, axis=0)
    changes = np.linalg.norm(np.diff(steps, axis=0), axis=1)
    lengths = np.linalg.norm(steps, axis=1)
    pairs = lengths[1:] + lengths[:-1]
    known = np.isfinite(pairs)
    moved = pairs[known].sum()
    return None if moved < 1e-6 else float(1 - changes[known].sum() / moved)


def drift(frames: Array, num_frames: int, min_chroma: float = MIN_CHROMA) -> Drift:
    """The first `num_frames` frames against the last.

    Raises:
        DataError: the video is shorter than both together.
    """
    if num_frames < 1 or 2 * num_frames > len(frames):
        raise DataError(
            f"drift compares the first {num_frames} frames with the last {num_frames}, and the video has {len(frames)}: take "
            f"1 to {len(frames) // 2}."
        )
    first, last = frames[:num_frames], frames[-num_frames:]
    background = float(np.abs(_background(first) - _background(last)).mean())
    tracks = [(part, track_shape(part, min_chroma)) for part in (first, last)]
    colours = [shape_colour(part, track) for part, track in tracks if track is not None]
    hue = None if len(colours) < 2 else math.degrees(math.acos(min(1.0, max(-1.0, float(colours[0] @ colours[1])))))
    return Drift(background, hue)


def seam_ratio(frames: Array, seams: Sequence[int]) -> float:
    """The largest difference between neighbouring frames at the seams, over the median of all others; of any video.

    The difference is the mean absolute one over pixels and channels. A video that is still but for its seams gives infinity,
    one that is still there too 1.

    Args:
        frames: the whole video.
        seams: for each window but the first, the number of the first frame that is new in it.

    Raises:
        DataError: no seams, one outside of the video, or no other pair of frames.
    """
    unfit = [seam for seam in seams if not 1 <= seam < len(frames)]
    if not seams or unfit:
        raise DataError(
            f"seams {', '.join(map(str, unfit)) or '(none)'} of a video of {len(frames)} frames: a seam is the number of the "
            f"first new frame of a window, 1 to {len(frames) - 1}."
        )
    differences = frame_differences(frames)
    is_seam = np.isin(np.arange(1, len(frames)), list(seams))
    if is_seam.all():
        raise DataError(
            f"all {len(differences)} pairs of neighbouring frames are seams: there is nothing to compare them with."
        )
    largest, usual = float(differences[is_seam].max()), float(np.median(differences[~is_seam]))
    if usual == 0:
        return 1.0 if largest == 0 else math.inf
    return largest / usual


def frame_differences(frames: Array) -> Array:
    """Mean absolute difference (0 to 255) of each frame but the first from the one before, `(T - 1,)`."""
    pairs = zip(frames[1:], frames[:-1], strict=True)  # one pair at a time: long videos are not copied
    return np.array([np.abs(after.astype(np.int16) - before).mean() for after, before in pairs])


def _background(frames: Array) -> Array:
    """Mean colour `(3,)` of the pixels that the shape leaves free; of all where nothing is saturated."""
    saturation = chroma(frames)
    peak = np.percentile(saturation, 99.5)
    free = saturation <= _BACKGROUND * peak
    return np.asarray((frames[free] if peak >= MIN_CHROMA and free.any() else frames.reshape(-1, 3)).mean(axis=0))
