"""A reward without a person and without a model, for videos of the demo set: does the shape do what its caption says?

The axes, each from 0 to 1:

- `direction`, `colour`, `shape`: 1 where the video shows what the caption names, else 0 (`evaluation/caption_following.py`);
  `shape` only where the caption names one;
- `smoothness`: how evenly the shape moves (`evaluation/motion.py`); 0 where it does not.

`overall` is their mean, weighted by the config.
"""

from __future__ import annotations

from collections.abc import Sequence

from videofm import shapes
from videofm.config.rank import MovingShapesReward
from videofm.errors import DataError
from videofm.evaluation.caption_following import ShapeClassifier
from videofm.evaluation.motion import motion_smoothness
from videofm.media import Frames
from videofm.reward.base import OVERALL


class MovingShapes:
    """See `MovingShapesReward` and the head of this file."""

    def __init__(self, config: MovingShapesReward) -> None:
        weights = config.weights
        self._weights = {
            "direction": weights.direction,
            "colour": weights.colour,
            "shape": weights.shape,
            "smoothness": weights.smoothness,
        }
        self._classifier = ShapeClassifier(shapes.COLOURS, shapes.DIRECTIONS)

    def score(self, videos: Sequence[Frames], captions: Sequence[str]) -> list[dict[str, float]]:
        """See `Reward.score`.

        Raises:
            DataError: a caption does not name one colour and one direction, or names no axis that has a weight.
        """
        return [self._score(video, caption) for video, caption in zip(videos, captions, strict=True)]

    def _score(self, video: Frames, caption: str) -> dict[str, float]:
        named, seen = self._classifier.named(caption), self._classifier.look(video)
        axes = {"direction": float(seen.direction == named.direction), "colour": float(seen.colour == named.colour)}
        if named.shape is not None:
            axes["shape"] = float(seen.shape == named.shape)
        axes["smoothness"] = motion_smoothness(video) or 0.0
        total = sum(self._weights[axis] for axis in axes)
        if total == 0:
            raise DataError(
                f"caption {caption!r} names no shape, and reward.weights gives no other axis a weight: raise one of "
                "direction, colour, smoothness, or rank videos whose captions name their shape."
            )
        return {OVERALL: sum(self._weights[axis] * value for axis, value in axes.items()) / total, **axes}
