"""What passes between the windows of a batch of videos: what is asked for, what one window leaves to the next, what it made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from videofm.sampling.conditioning import AnyCondition, rows
from videofm.sampling.settings import SamplingSettings
from videofm.sampling.storyboard import Prompt
from videofm.types import Conditioning


@dataclass(frozen=True)
class MadeWindow:
    """What one window adds to a batch of videos.

    `video` `(B, 3, t, H, W)` float32 in [-1, 1] on the CPU are the new `frames`, numbered in the whole video; `prompts` are
    the B texts they were made of. A guide drew the `indices` `(B, T', H', W')` of the whole window, its head too, in
    `ar_seconds`; `dit_seconds` are those of all steps of the DiT.
    """

    frames: range
    video: Tensor
    prompts: tuple[str, ...]
    dit_seconds: float
    ar_seconds: float = 0.0
    indices: Tensor | None = None


@dataclass(frozen=True)
class Hooks:
    """What is called while videos are made, and may raise to stop: after each step of the DiT, before each token of a guide."""

    on_step: Callable[[], None] | None = None
    on_token: Callable[[], None] | None = None


@dataclass(frozen=True)
class Request:
    """What to make, checked: for each window its frames and what is given in it, frames counted from its start."""

    prompts: Sequence[Prompt]
    windows: Sequence[tuple[range, list[AnyCondition]]]
    settings: SamplingSettings

    def rows(self, part: slice) -> Request:
        """The request for the videos of `part`."""
        windows = [(frames, [rows(condition, part) for condition in given]) for frames, given in self.windows]
        return Request(self.prompts[part], windows, self.settings)


@dataclass
class Reached:
    """What one window leaves to the next, and nothing else: the last frames, and the encoded texts in case they stay."""

    tail: Tensor | None = None
    texts: list[str] = field(default_factory=list)
    positive: Conditioning | None = None
    negative: Conditioning | None = None
