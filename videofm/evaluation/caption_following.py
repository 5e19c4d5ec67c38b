"""Does a video show what its caption says? An analytic classifier for the coloured moving shapes of the demo set.

There is nothing learned in it, so its verdict does not drift: rendered clips score 100%, also after H.264 and mild blur. The
vocabulary (colours, directions) is an argument; it lives with the renderer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from videofm.errors import DataError
from videofm.evaluation.shape_track import MIN_CHROMA, Array, ShapeTrack, grey_free, shape_colour, track_shape

PRODUCT_MOMENTS = {"circle": 2 / 3, "square": 1.0}
"""Name of a shape -> `E[x^2 y^2] / (E[x^2] E[y^2])` over its area, x and y from its centre: its `product_moment`.

A square's x and y are independent, hence 1. A disc of radius 1 has E[x^2] = 1/4 and E[x^2 y^2] = 1/24, hence 2/3. The size
does not enter, and blur moves both values towards 1 slowly: of shapes as large as the demo set's (radius 7), by 0.06 and -0.09
for a blur of 2 pixels.
"""


@dataclass(frozen=True)
class Sight:
    """What was seen in a video, or is named by a caption; None where nothing qualifies."""

    colour: str | None
    direction: str | None
    shape: str | None = None


@dataclass(frozen=True)
class CaptionFollowing:
    """Shares, 0 to 1, of videos with the right colour, the right direction, and both; over `num_videos`.

    `shape` is the share with the right shape, of those whose caption names one (None where none does); `all` is that of all
    videos with everything right that their caption names.
    """

    colour: float
    direction: float
    both: float
    num_videos: int
    shape: float | None = None
    all: float = 0.0


@dataclass(frozen=True)
class ShapeClassifier:
    """Sees colour, direction and outline of one saturated shape before a nearly grey background.

    Attributes:
        colours: name -> RGB, 0 to 255.
        directions: name -> unit step (dy, dx) in pixels; y grows downwards.
        min_chroma: largest minus smallest channel (0 to 255) that the shape must reach; less is an empty video.
        min_motion: how far, in pixels from first to last frame, the shape must move.
        shapes: name -> product moment.
        max_moment_error: how far the product moment of what is seen may be from a shape's.
    """

    colours: Mapping[str, tuple[int, int, int]]
    directions: Mapping[str, tuple[int, int]]
    min_chroma: float = MIN_CHROMA
    min_motion: float = 1.0
    shapes: Mapping[str, float] = field(default_factory=lambda: dict(PRODUCT_MOMENTS))
    max_moment_error: float = 1 / 6

    def look(self, frames: Array) -> Sight:
        """Classify uint8 frames `(T, H, W, 3)`."""
        track = track_shape(frames, self.min_chroma)
        if track is None:
            return Sight(None, None)
        return Sight(self._colour(frames, track), self._direction(track), self._shape(track))

    def named(self, caption: str) -> Sight:
        """The colour, the direction and, where it names one, the shape of a caption.

        Raises:
            DataError: it does not name exactly one colour and one direction, or names several shapes.
        """
        words = caption.lower().split()
        colours = [name for name in self.colours if name in words]
        directions = [name for name in self.directions if name in words]
        outlines = [name for name in self.shapes if name in words]
        if len(colours) != 1 or len(directions) != 1 or len(outlines) > 1:
            raise DataError(
                f"caption {caption!r} must name one colour ({', '.join(self.colours)}) and one direction "
                f"({', '.join(self.directions)}), and at most one shape ({', '.join(self.shapes)}): caption following is "
                "measured on videos of the demo set only."
            )
        return Sight(colours[0], directions[0], outlines[0] if outlines else None)

    def _colour(self, frames: Array, track: ShapeTrack) -> str:
        seen = shape_colour(frames, track)
        likeness = {name: float(seen @ grey_free(np.array(rgb, dtype=np.float64))) for name, rgb in self.colours.items()}
        return max(likeness, key=lambda name: likeness[name])

    def _direction(self, track: ShapeTrack) -> str | None:
        if track.seen.sum() < 2:
            return None
        time = np.flatnonzero(track.seen).astype(np.float64)
        time -= time.mean()
        # Least-squares velocity over all frames, times the span: the displacement from first to last frame.
        moved = (time @ track.centres) / (time @ time) * (len(track.seen) - 1)
        along = {name: float(moved @ np.array(step)) for name, step in self.directions.items()}
        best = max(along, key=lambda name: along[name])
        return best if along[best] >= self.min_motion else None

    def _shape(self, track: ShapeTrack) -> str | None:
        found = product_moment(track)
        nearest = min(self.shapes, key=lambda name: abs(self.shapes[name] - found))
        return nearest if abs(self.shapes[nearest] - found) <= self.max_moment_error else None


def product_moment(track: ShapeTrack) -> float:
    """`E[x^2 y^2] / (E[x^2] E[y^2])` of the shape around its centre: the median over the third of the frames in which the least
    of it lies on the frame's border, since a shape that is cut off is another one."""
    weights = track.weights[track.seen]
    border = weights[:, [0, -1]].sum(axis=(1, 2)) + weights[:, :, [0, -1]].sum(axis=(1, 2))
    whole = np.argsort(border / weights.sum(axis=(1, 2)), kind="stable")[: -(-len(weights) // 3)]
    share = weights[whole] / weights[whole].sum(axis=(1, 2), keepdims=True)  # (N, H, W)
    y = np.arange(share.shape[1]) - track.centres[whole, :1]  # (N, H)
    x = np.arange(share.shape[2]) - track.centres[whole, 1:]  # (N, W)
    both = np.einsum("nhw,nh,nw->n", share, y**2, x**2)
    apart = np.einsum("nhw,nh->n", share, y**2) * np.einsum("nhw,nw->n", share, x**2)
    return float(np.median(both / np.maximum(apart, 1e-9)))


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
    shape = [named.shape is None or seen.shape == named.shape for seen, named in pairs]
    everything = [one and other for one, other in zip(both, shape, strict=True)]
    asked = [right for right, (_, named) in zip(shape, pairs, strict=True) if named.shape is not None]
    count = len(pairs)
    return CaptionFollowing(
        sum(colour) / count,
        sum(direction) / count,
        sum(both) / count,
        count,
        sum(asked) / len(asked) if asked else None,
        sum(everything) / count,
    )
