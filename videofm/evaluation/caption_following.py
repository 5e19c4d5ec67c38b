"""Does a video show what its caption says? An analytic classifier for the coloured moving shapes of the demo set.

There is nothing learned in it, so its verdict does not drift: rendered clips score 100%, also after H.264 and mild blur. The
vocabulary (colours, directions) is an argument; it lives with the renderer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from videofm.errors import DataError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sight:
    """What was seen in a video, or is named by a caption; None where nothing qualifies."""

    colour: str | None
    direction: str | None


@dataclass(frozen=True)
class CaptionFollowing:
    """Shares, 0 to 1, of videos with the right colour, the right direction, and both; over `num_videos`."""

    colour: float
    direction: float
    both: float
    num_videos: int


@dataclass(frozen=True)
class ShapeClassifier:
    """Sees the colour and the direction of one saturated shape before a nearly grey background.

    Attributes:
        colours: name -> RGB, 0 to 255.
        directions: name -> unit step (dy, dx) in pixels; y grows downwards.
        min_chroma: largest minus smallest channel (0 to 255) that the shape must reach; less is an empty video.
        min_motion: how far, in pixels from first to last frame, the shape must move.
    """

    colours: Mapping[str, tuple[int, int, int]]
    directions: Mapping[str, tuple[int, int]]
    min_chroma: float = 60.0
    min_motion: float = 1.0

    def look(self, frames: Array) -> Sight:
        """Classify uint8 frames `(T, H, W, 3)`."""
        pixels = frames.astype(np.float64)
        chroma = pixels.max(axis=3) - pixels.min(axis=3)  # (T, H, W)
        peak = np.percentile(chroma, 99.5)
        if peak < self.min_chroma:
            return Sight(None, None)
        # Weights fall to 0 at half of the peak: soft edges and the tint of the background do not count.
        weights = np.clip(chroma - 0.5 * peak, 0.0, None)
        return Sight(self._colour(pixels, weights), self._direction(weights))

    def named(self, caption: str) -> Sight:
        """The colour and the direction that a caption names.

        Raises:
            DataError: it does not name exactly one of each.
        """
        words = caption.lower().split()
        colours = [name for name in self.colours if name in words]
        directions = [name for name in self.directions if name in words]
        if len(colours) != 1 or len(directions) != 1:
            raise DataError(
                f"caption {caption!r} must name one colour ({', '.join(self.colours)}) and one direction "
                f"({', '.join(self.directions)}): caption following is measured on videos of the demo set only."
            )
        return Sight(colours[0], directions[0])

    def _colour(self, pixels: Array, weights: Array) -> str:
        # The part of the mean colour that is not grey; its angle (the hue) survives blur and mixing with a grey background.
        seen = _chromatic(np.tensordot(weights, pixels, axes=3) / weights.sum())
        likeness = {name: float(seen @ _chromatic(np.array(rgb, dtype=np.float64))) for name, rgb in self.colours.items()}
        return max(likeness, key=lambda name: likeness[name])

    def _direction(self, weights: Array) -> str | None:
        mass = weights.sum(axis=(1, 2))  # (T,)
        seen = mass > 0.1 * mass.max()
        if seen.sum() < 2:
            return None
        rows, columns = np.arange(weights.shape[1]), np.arange(weights.shape[2])
        centre_y = (weights.sum(axis=2)[seen] @ rows) / mass[seen]
        centre_x = (weights.sum(axis=1)[seen] @ columns) / mass[seen]
        time = np.flatnonzero(seen).astype(np.float64)
        time -= time.mean()
        # Least-squares velocity over all frames, times the span: the displacement from first to last frame.
        moved = np.array([time @ centre_y, time @ centre_x]) / (time @ time) * (len(weights) - 1)
        along = {name: float(moved @ np.array(step)) for name, step in self.directions.items()}
        best = max(along, key=lambda name: along[name])
        return best if along[best] >= self.min_motion else None


def caption_following(videos: Sequence[Array], captions: Sequence[str], classifier: ShapeClassifier) -> CaptionFollowing:
    """The shares of `videos`, each uint8 `(T, H, W, 3)`, that show what their caption names.

    Raises:
        DataError: no videos, not one caption for each, or a caption without a colour and a direction.
    """
    if not videos or len(videos) != len(captions):
        raise DataError(f"caption following needs videos and one caption for each: got {len(videos)} and {len(captions)}.")
    pairs = [(classifier.look(video), classifier.named(text)) for video, text in zip(videos, captions, strict=True)]
    colour = [seen.colour == named.colour for seen, named in pairs]
    direction = [seen.direction == named.direction for seen, named in pairs]
    both = [one and other for one, other in zip(colour, direction, strict=True)]
    count = len(pairs)
    return CaptionFollowing(sum(colour) / count, sum(direction) / count, sum(both) / count, count)


def _chromatic(rgb: Array) -> Array:
    grey_free = rgb - rgb.mean()
    return grey_free / max(float(np.linalg.norm(grey_free)), 1e-9)
