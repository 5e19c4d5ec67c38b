"""Decoding by PyAV, which brings its own FFmpeg. Seeks by a table of presentation times and applies rotation itself."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from videofm.data.decode import VideoInfo, check_indices, describe
from videofm.errors import DataError

OPTIONS = {"protocol_whitelist": "file"}
"""A playlist that calls itself a video opens no network connection."""


@dataclass(frozen=True)
class _Table:
    """Presentation times of all frames in order, and of the key frames, in units of the stream's time base."""

    pts: list[int]
    keys: list[int]


class PyAVDecoder:
    """See `videofm.data.decode.Decoder`."""

    name = "pyav"

    def unavailable(self) -> str | None:
        try:
            import av  # noqa: F401
        except ImportError as error:
            return f"the package av does not import ({error}); install it with `pip install av`"
        return None

    def probe(self, source: bytes | Path) -> VideoInfo:
        with _open(source) as (container, stream):
            table = _table(container, stream)
            rotation = _first_rotation(container, stream)
            sides = (stream.height, stream.width) if rotation % 180 == 0 else (stream.width, stream.height)
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            span = float((table.pts[-1] - table.pts[0]) * stream.time_base)
            return VideoInfo(len(table.pts), fps, *sides, duration=span + (1 / fps if fps else 0.0))

    def read(self, source: bytes | Path, indices: Sequence[int]) -> np.ndarray[Any, Any]:
        with _open(source) as (container, stream):
            table = _table(container, stream)
            wanted = check_indices(indices, len(table.pts))
            frames = _images(container, stream, table, wanted)
        if frames is None:
            with _open(source) as (container, stream):
                frames = _images(container, stream, replace(table, keys=[]), wanted)
        if frames is None:
            raise DataError(f"{describe(source)}: frames are missing that its packets promise; it is damaged")
        if len({frame.shape for frame in frames.values()}) > 1:
            raise DataError(f"{describe(source)}: the size of the frames changes within the video")
        return np.stack([frames[index] for index in wanted])


class Converter:
    """Turns PyAV frames into RGB uint8 `(H, W, 3)`, rotated as their metadata says (counted in degrees counter-clockwise).

    It keeps one scaler on one thread: a fresh one for each frame, as `frame.to_ndarray` makes, starts threads and costs more
    than decoding a small frame.
    """

    def __init__(self) -> None:
        from av.video.reformatter import VideoReformatter

        self.reformatter = VideoReformatter()

    def __call__(self, frame: Any) -> np.ndarray[Any, Any]:
        image: np.ndarray[Any, Any] = self.reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        quarter_turns, rest = divmod(int(frame.rotation), 90)
        if rest:
            raise DataError(f"the video is rotated by {frame.rotation} degrees; only multiples of 90 can be applied")
        return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns % 4 else image


def _images(container: Any, stream: Any, table: _Table, wanted: list[int]) -> dict[int, np.ndarray[Any, Any]] | None:
    """RGB frames by index; None where one did not come. Without `table.keys`, all is decoded from where the container stands:
    some files (MPEG-TS) cannot be entered at a key frame."""
    to_rgb = Converter()
    frames = {index: to_rgb(frame) for index, frame in _decode(container, stream, table, sorted(set(wanted)))}
    return frames if len(frames) == len(set(wanted)) else None


@contextmanager
def _open(source: bytes | Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream, on one thread; errors of the library become DataError."""
    import av

    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        with av.open(file, options={} if isinstance(source, bytes) else OPTIONS) as container:
            if not container.streams.video:
                raise DataError(f"{describe(source)} has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, OSError, EOFError) as error:
        raise DataError(f"PyAV cannot decode {describe(source)}: {error}") from None


def _table(container: Any, stream: Any) -> _Table:
    """Presentation times by demuxing alone. Frames that an edit list hides are left out."""
    import av

    packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and not p.is_discard]
    if not packets or any(pts is None for pts, _ in packets):
        raise DataError("the video has no frames" if not packets else "frames without a presentation time")
    try:
        container.seek(min(pts for pts, _ in packets), stream=stream)
    except av.FFmpegError:
        container.seek(0)
    return _Table(sorted(pts for pts, _ in packets), sorted(pts for pts, is_key in packets if is_key))


def _first_rotation(container: Any, stream: Any) -> int:
    for frame in container.decode(stream):
        return int(frame.rotation)
    raise DataError("the video has no frame that decodes")


def _decode(container: Any, stream: Any, table: _Table, wanted: list[int]) -> Iterator[tuple[int, Any]]:
    """The frames `wanted` (ascending), up to the first that is missing: forward from where the reader stands, or from a later
    key frame where there is one."""
    position: int | None = None  # presentation time of the frame that came last
    frames = container.decode(stream)
    for index in wanted:
        target = table.pts[index]
        key = max((pts for pts in table.keys if pts <= target), default=None)
        if key is not None and (key > position if position is not None else key > table.pts[0]):
            container.seek(key, stream=stream)
            frames = container.decode(stream)
        found = next((frame for frame in frames if frame.pts is not None and frame.pts >= target), None)
        if found is None or found.pts > target:
            return
        position = found.pts
        yield index, found


DECODER = PyAVDecoder()
