"""The canonical form of a stored clip: H.264, yuv420p, constant rate, closed GOPs, no B-frames, no edit list, no audio.

The index stands at the front. One encoder thread, so that the bytes are the same on every run.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter


@dataclass(frozen=True)
class ClipFormat:
    """How a clip is stored: frames a second, height and width in pixels (even), x264's rate factor (0 is lossless) and preset,
    frames between key frames."""

    fps: Fraction
    height: int
    width: int
    crf: int
    preset: str
    gop: int


class ClipWriter:
    """Writes the clip at `path` image by image, as a context; it is whole when the context ends without an exception."""

    def __init__(self, path: Path, form: ClipFormat) -> None:
        options = {"crf": str(form.crf), "preset": form.preset, "bf": "0", "threads": "1"}
        # x264's macroblock tree reads memory it did not set when frames are tiny (32x32: 3 encodes of 100 differed), and the
        # bytes must be the same on every run.
        options["x264-params"] = "open-gop=0:scenecut=0:mbtree=0"
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "faststart", "use_editlist": "0"})
        self._stream: Any = self._container.add_stream("libx264", rate=form.fps, options=options)
        self._stream.height, self._stream.width, self._stream.pix_fmt = form.height, form.width, "yuv420p"
        self._stream.codec_context.gop_size = form.gop
        self._converter = VideoReformatter()  # one, on one thread: the encoder's own starts threads for each frame

    def __enter__(self) -> ClipWriter:
        return self

    def write(self, image: np.ndarray[Any, Any], count: int = 1) -> None:
        """Append an image, uint8 `(H, W, 3)`, so many times."""
        for _ in range(count):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            self._container.mux(self._stream.encode(self._converter.reformat(frame, format="yuv420p", threads=1)))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._container:
            if kind is None:
                self._container.mux(self._stream.encode(None))


def check_clip(path: Path, num_frames: int, height: int, width: int) -> str | None:
    """What is wrong with a clip that was written: decoded, it must have that many frames of that size, in order."""
    with av.open(str(path)) as container:
        frames = [(frame.pts, frame.height, frame.width, frame.is_corrupt) for frame in container.decode(video=0)]
    times = [-1 if pts is None else pts for pts, *_ in frames]
    sound = all((h, w) == (height, width) and not corrupt for _, h, w, corrupt in frames)
    if len(frames) == num_frames and sound and all(a < b for a, b in itertools.pairwise(times)):
        return None
    return f"wrote {num_frames} frames of {(height, width)}, read back {len(frames)}: {frames[:1]}"


def constant_rate(fps: float) -> Fraction:
    """Frames a second as a fraction that a container can hold: `24000/1001` for 23.976."""
    return Fraction(fps).limit_denominator(1001)
