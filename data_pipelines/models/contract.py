"""What a score model is.

To add one: a class as below in a file of this folder, its section in `videofm/config/curation_models.py` (also in
`ScoreModelSection`), and a line `kind -> "module:Class"` in `videofm.registry.SCORE_MODELS`. A config names a kind of that
table and nothing else: a module name in a config would be code from data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scored:
    """What a model says of one clip.

    Attributes:
        frames: name of a score -> its values for the frames, `(T,)`; the stage reduces them to one.
        clip: name -> a score of the clip as a whole.
        features: name -> a small vector, `(D,)`, in the number format in which it is kept.
    """

    frames: dict[str, Array] = field(default_factory=dict)
    clip: dict[str, float] = field(default_factory=dict)
    features: dict[str, Array] = field(default_factory=dict)


class ScoreModel(Protocol):
    """Built from its section of the config, which must check the files without reading weights; `load` reads them."""

    frame_size: tuple[int, int]
    """Height and width of the frames that it wants, in pixels."""

    def __init__(self, config: Any, dtype: str, batch_size: int) -> None:
        """Raises: CheckpointError: its files are missing, damaged or of another model; ConfigError: an option does not fit."""
        ...

    def weights_hash(self) -> str:
        """SHA-256 (hex) over the files that determine its answers."""
        ...

    def load(self, device: str) -> None:
        """Read the weights onto `device`.

        Raises:
            CheckpointError: they are not all there, or of other sizes than the folder's config says.
        """
        ...

    def score(self, clips: Sequence[Array], captions: Sequence[str]) -> list[Scored]:
        """One answer a clip; `clips` are RGB uint8 `(T, H, W, 3)` of `frame_size`, T may differ; `captions` may be empty."""
        ...


def passes(frames: Array, size: int) -> Iterator[tuple[Array, int]]:
    """`frames` `(N, ...)` in parts of exactly `size`, each with how many of it count: the last one is filled up with its own.

    All forward passes have one shape, so that an answer does not depend on which clips came along: kernels are chosen by shape.
    """
    for start in range(0, len(frames), size):
        part = frames[start : start + size]
        yield part if len(part) == size else np.concatenate([part, np.repeat(part[-1:], size - len(part), 0)]), len(part)
