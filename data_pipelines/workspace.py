"""The source that a child process works on: its facts, one scan of all its frames, and a reader that goes forward.

All stages of a source share one `Workspace`, so that a source is demuxed once for its facts, decoded once for cuts and scores
(at small size, frame by frame) and decoded once more for the clips: memory does not grow with the length of a video.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from data_pipelines.rows import SourceInfo, Unusable
from videofm.data.decoders.pyav import Converter

FORMATS = "mov,mp4,m4a,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,ivf,h264,hevc"
"""Containers that are opened. Playlists (hls, dash, concat) are not among them: they read other files."""

OPTIONS = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
SCAN_WIDTH = 256
"""Frames are scanned at most this wide, in pixels."""
_LUMINANCE = np.array([0.114, 0.587, 0.299])  # of blue, green, red (BT.601)


@dataclass(frozen=True)
class Scan:
    """What one pass over the T decoded frames gave.

    `times` (T,) are presentation times in seconds from the first frame; `motion` (T,) the mean absolute change since the frame
    before, over pixels and colour channels, and `brightness` (T,) the mean luminance, both in [0, 1]; `cuts` are the indices of
    the first frames of new shots.
    """

    times: np.ndarray[Any, Any]
    motion: np.ndarray[Any, Any]
    brightness: np.ndarray[Any, Any]
    cuts: list[int]


class CutDetector(Protocol):
    """Finds cuts in a stream of frames."""

    def observe(self, index: int, frame: np.ndarray[Any, Any]) -> list[int]:
        """Take frame `index`, BGR uint8 `(H, W, 3)`; the cuts found with it."""
        ...


class Workspace:
    """The source at `path`, with a scratch folder for clips. `notes` counts what is worth telling in the funnel."""

    def __init__(self, path: Path, scratch: Path) -> None:
        self.path, self.scratch = path, scratch
        self.notes: Counter[str] = Counter()
        self._info: SourceInfo | None = None
        self._scan: Scan | None = None
        self._reader: Iterator[np.ndarray[Any, Any]] | None = None
        self._position = 0

    def info(self) -> SourceInfo:
        """Facts by hashing and demuxing the file, without decoding more than one frame.

        Raises:
            Unusable: it is empty, no video, truncated, or its first frame does not decode.
        """
        if self._info is None:
            self._info = _inspect(self.path)
        return self._info

    def scan(self, detector: CutDetector | None = None) -> Scan:
        """Decode all frames once; the result is kept, unless a later call brings a detector.

        Raises:
            Unusable: a frame does not decode.
        """
        if self._scan is None or detector is not None:
            self._scan = _scan(self.path, detector)
        return self._scan

    def frames(self, start: int, stop: int) -> Iterator[np.ndarray[Any, Any]]:
        """The frames `[start, stop)`, RGB uint8 `(H, W, 3)`, rotated as the file says. Cheap when calls go forward."""
        if self._reader is None or start < self._position:
            self._reader, self._position = _rgb_frames(self.path), 0
        while self._position < stop:
            frame = next(self._reader, None)
            if frame is None:
                raise Unusable("undecodable", f"the second pass ended at frame {self._position}, the first did not")
            self._position += 1
            if self._position > start:
                yield frame


@contextmanager
def open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream (cover art is not one), decoding on one thread.

    Raises:
        Unusable: it is empty, not a video, truncated, or FFmpeg stops with an error.
    """
    try:
        container = av.open(str(path), options=OPTIONS)
    except MemoryError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise Unusable(*_why_not_opened(path, error)) from None
    with closing(container):
        streams = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not streams:
            raise Unusable("no_video", "the file has no video stream")
        stream = streams[0]
        stream.thread_type = "NONE"
        if stream.codec_context is None:
            raise Unusable("unknown_codec", "no decoder for its video stream")
        stream.codec_context.thread_count = 1
        try:
            yield container, stream
        except (av.FFmpegError, EOFError) as error:
            raise Unusable("undecodable", _message(error)) from None


def _is_cover(stream: Any) -> bool:
    return bool(int(stream.disposition) & int(av.stream.Disposition.attached_pic))


def _why_not_opened(path: Path, error: Exception) -> tuple[str, str]:
    """Reason and detail for a file that does not open."""
    with path.open("rb") as file:
        head = file.read(12)
    if not head:
        return "empty", "the file has no bytes"
    if head[4:8] == b"ftyp" or head[:4] == b"\x1a\x45\xdf\xa3":
        return "truncated", f"it begins as a video file, but its index is missing or cut ({_message(error)})"
    return "not_video", _message(error)


def _message(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _inspect(path: Path) -> SourceInfo:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    packets = hashlib.sha256()
    with open_video(path) as (container, stream):
        packets.update(stream.codec_context.extradata or b"")
        rotation, num_frames, first, last, num_bytes = None, 0, None, None, 0
        for packet in container.demux(stream):
            if not packet.size:
                continue
            packets.update(bytes(packet))
            num_frames += not packet.is_discard
            num_bytes += packet.size
            if packet.pts is not None:
                first = packet.pts if first is None else min(first, packet.pts)
                last = packet.pts if last is None else max(last, packet.pts)
            if rotation is None:
                rotation = next((int(frame.rotation) for frame in packet.decode()), None)
        if rotation is None:
            rotation = next((int(frame.rotation) for frame in stream.codec_context.decode(None)), None)
        if stream.frames and num_frames < stream.frames and num_bytes and _file_is_cut(path, stream, num_frames):
            raise Unusable("truncated", f"the header promises {stream.frames} frames, the file holds {num_frames}")
        if rotation is None or first is None or last is None:
            raise Unusable("undecodable", f"none of its {num_frames} packets gives a frame with a presentation time")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        sides = (stream.height, stream.width) if rotation % 180 == 0 else (stream.width, stream.height)
        duration = float((last - first) * stream.time_base) + (1 / fps if fps else 0.0)
        codec, name = stream.codec_context.name, container.format.name
        return SourceInfo(sha256, packets.hexdigest(), name, codec, num_frames, fps, *sides, duration)


def _file_is_cut(path: Path, stream: Any, num_frames: int) -> bool:
    """Whether fewer packets than promised means a cut file; an edit list hides frames without that."""
    with av.open(str(path), options={**OPTIONS, "ignore_editlist": "1"}) as container:
        return sum(bool(p.size) for p in container.demux(container.streams[stream.index])) < stream.frames


def _decoded(path: Path) -> Iterator[Any]:
    """All frames of a source, in presentation order.

    Raises:
        Unusable: one does not decode, is marked as corrupt, or does not come later than the one before.
    """
    with open_video(path) as (container, stream):
        last = None
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise Unusable("undecodable", f"the frame at {frame.time} s is damaged")
            if frame.pts is None or (last is not None and frame.pts <= last):
                raise Unusable("bad_timestamps", f"a frame with presentation time {frame.pts} follows {last}")
            last = frame.pts
            yield frame


def _rgb_frames(path: Path) -> Iterator[np.ndarray[Any, Any]]:
    to_rgb = Converter()
    for frame in _decoded(path):
        if frame.rotation % 90:
            raise Unusable("odd_rotation", f"rotated by {frame.rotation} degrees")
        yield to_rgb(frame)


def _scan(path: Path, detector: CutDetector | None) -> Scan:
    times: list[float] = []
    motion: list[float] = []
    brightness: list[float] = []
    cuts: list[int] = []
    before: np.ndarray[Any, Any] | None = None
    scaler = VideoReformatter()
    for index, frame in enumerate(_decoded(path)):
        scale = min(1.0, SCAN_WIDTH / frame.width)
        size = {"width": max(2, round(frame.width * scale)), "height": max(2, round(frame.height * scale))}
        image = scaler.reformat(frame, format="bgr24", threads=1, **size).to_ndarray()
        # Colours and not luminance alone: a green shape on grey of the same luminance moves, too.
        change = 0.0
        if before is not None and before.shape == image.shape:
            change = float(np.mean(cv2.mean(cv2.absdiff(image, before))[:3])) / 255.0
        times.append(float(frame.pts * frame.time_base))
        motion.append(change)
        brightness.append(float(np.dot(cv2.mean(image)[:3], _LUMINANCE)) / 255.0)
        if detector is not None:
            cuts.extend(detector.observe(index, image))
        before = image
    if not times:
        raise Unusable("undecodable", "no frame decodes")
    seconds = np.array(times) - times[0]
    return Scan(seconds, np.array(motion), np.array(brightness), sorted(set(cuts) - {0}))
