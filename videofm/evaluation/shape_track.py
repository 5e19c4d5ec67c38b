"""One saturated shape before a nearly grey background: how much of each pixel is it, and where does it stand in each frame?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MIN_CHROMA = 60.0
"""Largest minus smallest channel (0 to 255) that a shape must reach; less is an empty video."""
_MIN_CUT = 20.0
"""No cut lies below this chroma: the tint of a background and what compression adds to it."""
_MIN_MASS = 0.1
"""A frame shows the shape where it has this share of the most that any frame has."""


@dataclass(frozen=True)
class ShapeTrack:
    """Where a video shows its shape.

    Attributes:
        weights: `(T, H, W)`, 0 off the shape, else chroma (0 to 255) above the cut.
        seen: `(T,)` bool, the frames that show enough of it.
        centres: `(N, 2)` its centre (y, x) in pixels, in each of the N frames of `seen`.
    """

    weights: Array
    seen: Array
    centres: Array


def chroma(frames: Array) -> Array:
    """Largest minus smallest channel of uint8 frames `(T, H, W, 3)`, float64 `(T, H, W)`."""
    return np.asarray(frames.max(axis=3).astype(np.float64) - frames.min(axis=3))


def track_shape(frames: Array, min_chroma: float = MIN_CHROMA, cut: float = 0.5) -> ShapeTrack | None:
    """The shape in uint8 frames `(T, H, W, 3)`, or None where nothing is saturated enough.

    Args:
        frames: the video.
        min_chroma: what its most saturated pixels must reach.
        cut: share of the peak chroma at which weights fall to 0. At a half, soft edges and whatever is off the shape do not
            count. Lower, a pixel counts by how much of it is shape, so that centres are right within a pixel too.
    """
    saturation = chroma(frames)
    peak = np.percentile(saturation, 99.5)
    if peak < min_chroma:
        return None
    weights = np.clip(saturation - max(cut * peak, _MIN_CUT), 0.0, None)
    mass = weights.sum(axis=(1, 2))  # (T,)
    seen = mass > _MIN_MASS * mass.max()
    rows, columns = np.arange(weights.shape[1]), np.arange(weights.shape[2])
    centre_y = (weights.sum(axis=2)[seen] @ rows) / mass[seen]
    centre_x = (weights.sum(axis=1)[seen] @ columns) / mass[seen]
    return ShapeTrack(weights, seen, np.stack([centre_y, centre_x], axis=1))


def shape_colour(frames: Array, track: ShapeTrack) -> Array:
    """The part of the shape's mean colour that is not grey, `(3,)`, of length 1 (or 0): its angle is the hue, which survives
    blur and mixing with a grey background."""
    return grey_free(np.tensordot(track.weights, frames.astype(np.float64), axes=3) / track.weights.sum())


def grey_free(rgb: Array) -> Array:
    """`rgb` `(3,)` without its grey part, of length 1; of length 0 where it is grey."""
    difference = rgb - rgb.mean()
    return np.asarray(difference / max(float(np.linalg.norm(difference)), 1e-9))
