"""Long videos in windows. Each window goes on from the last frames of the one before: these are encoded again, so that the
latents of a window look like those of a clip that begins there, and are given at its start. One window that covers the video
is plain sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from videofm.errors import ConfigError
from videofm.sampling.conditioning import AnyCondition


@dataclass(frozen=True)
class Window:
    """`num_frames` that the model makes at once, of which `overlap_frames` are the last of the window before.

    `fade_frames`: over how many new frames `faded` lets go of what the decoder made of the shared ones.
    """

    num_frames: int
    overlap_frames: int
    fade_frames: int = 0


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


def new_frames(windows: Sequence[range]) -> list[range]:
    """What each of `windows`, as `spans` gives them, makes anew: all but what the one before has made."""
    return [range(before.stop if before else 0, window.stop) for before, window in zip((None, *windows), windows, strict=False)]


def faded(video: Tensor, tail: Tensor, num_frames: int) -> Tensor:
    """The new frames of a window, moved towards the video before it: without a jump where both meet.

    A decoder does not give back the shared frames bit for bit. By what the last of them lacks the first new frames are changed
    too, less and less: frame k of them, from 1, by `1 - k / (num_frames + 1)` of it.

    Args:
        video: all frames of the window, `(B, 3, T, H, W)` in [-1, 1]; the first are those of `tail` as the decoder made them.
        tail: the shared frames, `(B, 3, overlap, H, W)`.
        num_frames: how many are changed; 0 changes none.
    """
    overlap = tail.shape[2]
    new, lacks = video[:, :, overlap:], tail[:, :, -1:] - video[:, :, overlap - 1 : overlap]
    count = min(num_frames, new.shape[2])
    if count == 0:
        return new
    share = 1 - torch.arange(1, count + 1, device=video.device) / (num_frames + 1)
    moved = (new[:, :, :count] + lacks * share[:, None, None]).clamp(-1, 1)
    return torch.cat([moved, new[:, :, count:]], dim=2)


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
