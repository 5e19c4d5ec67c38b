"""Long videos in windows. Each window goes on from the last frames of the one before: these are encoded again, so that the
latents of a window look like those of a clip that begins there, and are given at its start. One window that covers the video
is plain sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from videofm.errors import ConfigError
from videofm.sampling.conditioning import AnyCondition


@dataclass(frozen=True)
class Window:
    """`num_frames` that the model makes at once, of which `overlap_frames` are the last of the window before."""

    num_frames: int
    overlap_frames: int


def spans(num_frames: int, window: Window | None) -> list[range]:
    """The frames of each window; the last one may be shorter. Without a window, one of them all.

    Raises:
        ConfigError: windows do not go on, because they overlap as a whole.
    """
    if window is None or num_frames <= window.num_frames:
        return [range(num_frames)]
    step = window.num_frames - window.overlap_frames
    if step < 1 or window.overlap_frames < 1:
        raise ConfigError(
            f"windows of {window.num_frames} frames that share {window.overlap_frames} do not go on: share at least 1 frame, "
            f"and less than {window.num_frames}."
        )
    starts = range(0, num_frames - window.overlap_frames, step)
    return [range(start, min(start + window.num_frames, num_frames)) for start in starts]


def in_window(conditions: Sequence[tuple[AnyCondition, int]], frames: range, overlap_frames: int) -> list[AnyCondition]:
    """What is given in the window of `frames`, with frames counted from its start.

    Args:
        conditions: each with the number of frames that it gives.
        frames: of the window.
        overlap_frames: how many of them the window before has made; what is given there was used there.

    Raises:
        ConfigError: a condition crosses the border of windows.
    """
    found = []
    for condition, num_given in conditions:
        if not frames.start + overlap_frames <= condition.frame < frames.stop:
            continue
        if condition.frame + num_given > frames.stop:
            raise ConfigError(
                f"a condition gives frames {condition.frame} to {condition.frame + num_given - 1}, across the end of a "
                f"window at {frames.stop}: move it, or take other windows."
            )
        found.append(replace(condition, frame=condition.frame - frames.start))
    return found
