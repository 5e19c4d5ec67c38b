"""Storyboards: a video whose prompt changes on the way.

```yaml
- {start: 0, stop: 129, prompt: a red circle moving left}       # frames 0 to 128
- {start: 129, stop: 257, prompt: a red circle moving right}    # frames 129 to 256, the last of the video
```
Several videos are `videos: [[segments], [segments]]`. Segments tile the frames of the video. A video is made in windows, and a
window has one prompt, that of its first new frame: so each segment must hold the first new frame of some window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from videofm.config.source import Path_, Source, parse, read_text
from videofm.errors import ConfigError
from videofm.registry import nearest

SUFFIXES = (".yaml", ".yml")
"""A file of prompts that ends like this is a storyboard."""
_FIELDS = {"start": int, "stop": int, "prompt": str}
_SHOWN = 40
"""Letters of a prompt that a message shows."""


@dataclass(frozen=True)
class Segment:
    """Frames `start` to `stop - 1` and their prompt. `where` is the line it was read from, for messages."""

    start: int
    stop: int
    prompt: str
    where: str = field(default="", compare=False)

    def __str__(self) -> str:
        prompt = self.prompt if len(self.prompt) <= _SHOWN else self.prompt[:_SHOWN] + "..."
        return f"{self.where + ': ' if self.where else ''}segment [{self.start}, {self.stop}) {prompt!r}"


@dataclass(frozen=True)
class Storyboard:
    """The prompts of one video, in order.

    Raises:
        ConfigError: segments that do not tile the video from frame 0 on, or one without a prompt.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not self.segments:
            raise ConfigError("a storyboard has no segments: give at least one, {start: 0, stop: NUM_FRAMES, prompt: ...}.")
        for segment in self.segments:
            if segment.stop <= segment.start:
                raise ConfigError(f"{segment} has no frames: `stop` is the number behind its last frame, more than `start`.")
            if not segment.prompt.strip():
                raise ConfigError(
                    f"{segment} has an empty prompt: write what is to be seen, or give its frames to its neighbour."
                )
        if self.segments[0].start != 0:
            raise ConfigError(f"{self.segments[0]} is the first, and a video begins at frame 0: write `start: 0`.")
        for before, after in pairwise(self.segments):
            _check_neighbours(before, after)

    @property
    def num_frames(self) -> int:
        """Frames of the video."""
        return self.segments[-1].stop

    def at(self, frame: int) -> Segment:
        """The segment that holds `frame`."""
        return next(segment for segment in self.segments if segment.start <= frame < segment.stop)


Prompt = str | Storyboard
"""What a video is told: one prompt, or several."""


def prompt_at(prompt: Prompt, frame: int) -> str:
    """The text for what begins at `frame`."""
    return prompt if isinstance(prompt, str) else prompt.at(frame).prompt


def texts_of(prompt: Prompt) -> list[str]:
    """All texts of a video, in order."""
    return [prompt] if isinstance(prompt, str) else [segment.prompt for segment in prompt.segments]


def check_storyboards(prompts: Sequence[Prompt], num_frames: int, windows: Sequence[range]) -> None:
    """Refuse storyboards that do not fit a video of `num_frames`, whose new frames are made in `windows`.

    Raises:
        ConfigError: another length, a prompt that changes although the video is made at once, or one that no window has.
    """
    for board in prompts:
        if isinstance(board, str):
            continue
        last = board.segments[-1]
        if last.stop != num_frames:
            raise ConfigError(
                f"{last} is the last and stops at {last.stop}, but the video has {num_frames} frames: write "
                f"`stop: {num_frames}`, or make {last.stop} frames (--frames {last.stop})."
            )
        used = [board.at(window.start) for window in windows]
        for segment in board.segments:
            if segment not in used:
                raise ConfigError(_unused(segment, board.segments[0], windows))


def read_storyboards(path: str | Path) -> list[Storyboard]:
    """The videos of a storyboard file.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, missing or of another type, or segments do not tile.
    """
    path = Path(path)
    source = parse(read_text(path), str(path))
    if isinstance(source.values, list):
        return [_storyboard(source.values, (), source)]
    if isinstance(source.values, dict) and list(source.values) == ["videos"] and isinstance(source.values["videos"], list):
        videos = source.values["videos"]
        if videos:
            return [_storyboard(segments, ("videos", number), source) for number, segments in enumerate(videos)]
    raise ConfigError(
        f"{path}: a storyboard is a list of segments, `- {{start: 0, stop: 129, prompt: ...}}`, or `videos:` with a list of "
        "such lists, one a video."
    )


def _storyboard(segments: Any, path: Path_, source: Source) -> Storyboard:
    if not isinstance(segments, list):
        raise ConfigError(f"{source.origin(path)}: a video is a list of segments, `- {{start: 0, stop: 129, prompt: ...}}`.")
    return Storyboard(tuple(_segment(values, (*path, number), source) for number, values in enumerate(segments)))


def _segment(values: Any, path: Path_, source: Source) -> Segment:
    where, shape = source.origin(path), "a segment is {start: 0, stop: 129, prompt: ...}"
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {shape}, not {values!r}")
    for name in values:
        if name not in _FIELDS:
            raise ConfigError(f"{source.origin((*path, name))}: unknown key {name!r}{nearest(name, _FIELDS) or ''}; {shape}")
    for name, kind in _FIELDS.items():
        if name not in values:
            raise ConfigError(f"{where}: `{name}` is missing; {shape}")
        if type(values[name]) is not kind:
            wanted = "text" if kind is str else "a whole number"
            raise ConfigError(f"{source.origin((*path, name))}: {name} = {values[name]!r} must be {wanted}; {shape}")
    return Segment(values["start"], values["stop"], values["prompt"], where)


def _check_neighbours(before: Segment, after: Segment) -> None:
    if after.start < before.start:
        raise ConfigError(f"{after} stands behind {before}, but begins earlier: write segments in order of their frames.")
    if after.start < before.stop:
        raise ConfigError(
            f"{before} and {after} overlap in frames {after.start} to {min(before.stop, after.stop) - 1}: let the first stop "
            f"at {after.start}, or the second start at {before.stop}."
        )
    if after.start > before.stop:
        raise ConfigError(
            f"frames {before.stop} to {after.start - 1} lie between {before} and {after}, and have no prompt: let the first "
            f"stop at {after.start}, or the second start at {before.stop}."
        )


def _unused(segment: Segment, first: Segment, windows: Sequence[range]) -> str:
    """Why `segment` has no window, and what to do."""
    if len(windows) == 1:
        return (
            f"{segment} changes the prompt of {first}, but the video is made at once: give windows that are shorter than the "
            "video, 'window={num_frames: N, overlap_frames: K}', or one segment."
        )
    starts = [window.start for window in windows]
    near = min(starts, key=lambda start: abs(start - segment.start))
    return (
        f"{segment} has no window: a window has the prompt of its first new frame, and these are "
        f"{', '.join(map(str, starts))}. Let it hold frame {near}."
    )
