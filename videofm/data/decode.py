"""Frames out of video files: one interface over PyAV, torchcodec and decord, and a test that each must pass before use.

A frame is identified by its place in presentation order. A reader is opened for a call and closed with it: nothing is kept, so
no decoder can keep decoding in the background or stay broken after an error.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np

from videofm import registry
from videofm.errors import ConfigError, DataError

ORDER = ("pyav", "torchcodec", "decord")
"""`auto` takes the first that works. PyAV costs what torchcodec costs (docs/benchmarks.md), needs no FFmpeg of the system, and
alone returns the right frames of any file."""

OWN_CLIPS_ONLY = ("torchcodec", "decord")
"""Decoders that return wrong frames, without a word, of some files that were not re-encoded by us: torchcodec 0.13 of those
with an edit list and of MPEG-TS (also in its exact seek mode), decord of many more."""


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video. `duration` is in seconds; `height` and `width` are those of the frames that `read` returns."""

    num_frames: int
    fps: float
    height: int
    width: int
    duration: float


class Decoder(Protocol):
    """A library that decodes video."""

    name: str

    def unavailable(self) -> str | None:
        """Why the library cannot be used here, with how to install it; None where it can."""
        ...

    def probe(self, source: bytes | Path) -> VideoInfo:
        """Facts about a video file, given as its bytes or its path.

        Raises:
            DataError: it is no video that this library reads.
        """
        ...

    def read(self, source: bytes | Path, indices: Sequence[int]) -> np.ndarray[Any, Any]:
        """The frames `indices` (any order, repeats allowed), RGB uint8 `(len(indices), H, W, 3)`, rotated as the file says.

        Raises:
            DataError: an index is outside of the video, or it cannot be decoded.
        """
        ...


def get(name: str) -> Decoder:
    """The decoder registered as `name`, whether it works here or not."""
    decoder: Decoder = registry.lookup(registry.DECODERS, name, "decoder")
    return decoder


def choose(name: str = "auto", canonical: bool = True) -> Decoder:
    """A decoder that works here, proved by `conformance`.

    Args:
        name: a registered name, or `auto` for the first of `ORDER` that works.
        canonical: whether it reads only clips that we encoded; others are not for the decoders in `OWN_CLIPS_ONLY`.

    Raises:
        ConfigError: the named library cannot be used here, or not for clips of others.
        DataError: the named library returns wrong frames, or with `auto` none works.
    """
    if name != "auto":
        decoder = get(name)
        if name in OWN_CLIPS_ONLY and not canonical:
            raise ConfigError(
                f"decoder {name!r} returns wrong frames of files that `videofm curate` did not encode (edit lists, open "
                "groups, variable rates), and the dataset holds such files. Take `decoder: auto`"
            )
        reason = decoder.unavailable()
        if reason is not None:
            raise ConfigError(f"decoder {name!r} cannot be used here: {reason}. Or take `decoder: auto`")
        problem = conformance(name)
        if problem is not None:
            raise DataError(f"decoder {name!r} failed its self-test: {problem}. Take another of {', '.join(ORDER)}")
        return decoder
    reasons = []
    for candidate in ORDER:
        reason = get(candidate).unavailable() or conformance(candidate)
        if candidate in OWN_CLIPS_ONLY and not canonical:
            reason = "not for files that `videofm curate` did not encode"
        if reason is None:
            return get(candidate)
        reasons.append(f"{candidate}: {reason}")
    raise DataError("no video decoder works here. " + "; ".join(reasons))


@cache
def conformance(name: str) -> str | None:
    """Decode a built-in clip whose frames carry their index, and compare; what is wrong, or None. Measured once a process."""
    decoder = get(name)
    clip = bar_code_clip()
    wanted = [_NUM_FRAMES - 1, 0, 7, 8, 8, 13, 3, _NUM_FRAMES - 2]
    try:
        info = decoder.probe(clip)
        if (info.num_frames, info.height, info.width) != (_NUM_FRAMES, _SIDE, _SIDE):
            return f"a clip of {_NUM_FRAMES} frames of {_SIDE}x{_SIDE} is reported as {info}"
        found = [bar_code(frame) for frame in decoder.read(clip, wanted)]
    except DataError as error:
        return str(error)
    return None if found == wanted else f"asked for frames {wanted}, got {found}"


_SIDE, _BITS, _NUM_FRAMES = 64, 5, 24


@cache
def bar_code_clip() -> bytes:
    """An H.264 MP4 file of 24 frames, 64x64, with B-frames and key frames every 8, whose frame i shows i as a bar code."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "18", "g": "8", "bf": "2", "threads": "1"})
        stream.width = stream.height = _SIDE
        stream.pix_fmt = "yuv420p"
        for index in range(_NUM_FRAMES):
            bits = [(index >> bit) & 1 for bit in range(_BITS)]
            columns = np.repeat(np.array([*bits, 1 - (index & 1)], np.uint8) * 160 + 40, 11)
            frame = np.full((_SIDE, _SIDE, 3), 40, np.uint8)
            frame[:, : min(len(columns), _SIDE)] = columns[None, :_SIDE, None]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def bar_code(frame: np.ndarray[Any, Any]) -> int:
    """The index that a frame `(H, W, 3)` of `bar_code_clip` shows."""
    return sum(int(frame[:, bit * 11 + 3 : bit * 11 + 8].mean() > 120) << bit for bit in range(_BITS))


def check_indices(indices: Sequence[int], num_frames: int) -> list[int]:
    """`indices` as ints.

    Raises:
        DataError: one lies outside of [0, num_frames).
    """
    outside = [int(index) for index in indices if not 0 <= index < num_frames]
    if outside:
        raise DataError(f"frames {outside[:5]} were asked for, but the video has {num_frames} (0 to {num_frames - 1})")
    return [int(index) for index in indices]


def describe(source: bytes | Path) -> str:
    """A name for a source in messages."""
    return f"{len(source)} bytes of video" if isinstance(source, bytes) else str(source)
