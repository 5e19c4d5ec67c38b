"""The vocabulary of the demo set: six colours, two shapes, four directions, and the captions that name them.

The renderer (`data_pipelines/demo.py`) and the classifier of caption following both read these constants. Backgrounds are
nearly grey (no channel differs from another by more than `MAX_TINT`), so the shape is what is saturated.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 30, 30),
    "green": (30, 210, 30),
    "blue": (40, 60, 240),
    "yellow": (235, 225, 30),
    "magenta": (225, 40, 225),
    "cyan": (30, 220, 225),
}
"""Name -> RGB, 0 to 255."""

SHAPES: tuple[str, ...] = ("circle", "square")

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Name -> unit step (dy, dx); y grows downwards, x to the right."""

BACKGROUND_LEVELS: tuple[int, int] = (20, 100)
"""Darkest and lightest grey of a background, 0 to 255."""

MAX_TINT = 12
"""Largest difference between two channels of a background pixel before compression, 0 to 255."""


@dataclass(frozen=True)
class Motif:
    """What a shot of the demo set shows."""

    colour: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        """For example `a red circle moving left`."""
        return caption(self.colour, self.shape, self.direction)


def caption(colour: str, shape: str, direction: str) -> str:
    """The caption of a shot."""
    return f"a {colour} {shape} moving {direction}"


def motifs() -> list[Motif]:
    """All 48 combinations, in a fixed order: colours, then shapes, then directions."""
    return [Motif(*names) for names in itertools.product(COLOURS, SHAPES, DIRECTIONS)]


def captions() -> list[str]:
    """The captions of `motifs()`, in that order."""
    return [motif.caption for motif in motifs()]


def parse(text: str) -> Motif:
    """The motif of a caption.

    Raises:
        ValueError: the text is not one of `captions()`.
    """
    for motif in motifs():
        if motif.caption == text:
            return motif
    raise ValueError(f"{text!r} is not a caption of the demo set, such as {captions()[0]!r}")
