"""Opening and decoding untrusted files with PyAV: what is allowed, what a file says of itself, frames in presentation order.

A frame is identified by its presentation time; its index is the place of that time among all that are shown (frames that an
edit list hides do not count).
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from data_pipelines.rows import SourceInfo, Unusable

FORMATS = "mov,mp4,m4a,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,ivf,h264,hevc"
"""Containers that are opened. Playlists (hls, dash, concat) are not among them: they read other files."""

CODECS = frozenset(
    ("h264", "hevc", "av1", "vp8", "vp9", "mpeg1video", "mpeg2video", "mpeg4", "h263", "msmpeg4v3", "vc1", "wmv2", "wmv3",
     "flv1", "theora", "prores", "dnxhd", "mjpeg", "ffv1")
)  # fmt: skip
"""Codecs whose decoders may run, by FFmpeg's names. The rest of its decoders, old and little tested, never see a file."""

_DECODERS = CODECS | {"flv", "msmpeg4", "libdav1d", "libvpx", "libvpx-vp9"}
"""Names of those decoders: most are that of the codec."""

# Opening a file decodes some of it to learn what it holds: also there only these decoders run (and so none for sound).
OPTIONS = {"protocol_whitelist": "file", "format_whitelist": FORMATS, "codec_whitelist": ",".join(sorted(_DECODERS))}
_HDR_TRANSFERS = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
_MAX_SECONDS = 10 * 86400.0
_MIN_SECONDS = -1.0
"""Presentation times outside of these are damage or an attack on arithmetic; an offset of hours (MPEG-TS) is ordinary."""


@dataclass(frozen=True)
class Header:
    """What a container says before a frame is decoded. `fps` is 0 where it says nothing; `height` and `width` are as stored."""

    codec: str
    height: int
    width: int
    fps: float
    num_streams: int
    num_video_streams: int


@dataclass(frozen=True)
class Probed:
    """What demuxing all packets and decoding the first frame gave.

    `pts` are the presentation times of the frames, ascending, in units of `time_base` seconds; `rotation` is counted in degrees
    counter-clockwise; `transfer` names the transfer function of HDR pictures, and is empty for others.
    """

    info: SourceInfo
    header: Header
    pts: list[int]
    time_base: float
    rotation: int
    transfer: str


@contextmanager
def open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream (cover art is not one), decoding on one thread.

    Raises:
        Unusable: it is empty, not a video, truncated, of a codec that is not allowed, or FFmpeg stops with an error.
    """
    try:
        container = av.open(str(path), options=OPTIONS)
    except MemoryError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        raise Unusable(*_why_not_opened(path, error)) from None
    with closing(container):
        streams = [stream for stream in container.streams.video if not is_cover(stream)]
        if not streams:
            raise Unusable("no_video", "the file has no video stream")
        stream = streams[0]
        stream.thread_type = "NONE"
        if stream.codec_context is None:
            raise Unusable("unknown_codec", "no decoder for its video stream")
        if codec_name(stream) not in CODECS:
            raise Unusable("codec_not_allowed", f"{codec_name(stream)}; decoders that may run: {', '.join(sorted(CODECS))}")
        stream.codec_context.thread_count = 1
        # Without this H.264 and others paint over what is damaged and call the frame sound.
        stream.codec_context.options = {"err_detect": "explode"}
        try:
            yield container, stream
        except (av.FFmpegError, EOFError) as error:
            raise Unusable("undecodable", message(error)) from None


def is_cover(stream: Any) -> bool:
    """Whether a video stream is a picture of the cover."""
    return bool(int(stream.disposition) & int(av.stream.Disposition.attached_pic))


def codec_name(stream: Any) -> str:
    """The codec (`av1`), not the library that decodes it (`libdav1d`)."""
    return str(stream.codec_context.codec.canonical_name)


def _why_not_opened(path: Path, error: Exception) -> tuple[str, str]:
    """Reason and detail for a file that does not open."""
    with path.open("rb") as file:
        head = file.read(12)
    if not head:
        return "empty", "the file has no bytes"
    if head[4:8] == b"ftyp" or head[:4] == b"\x1a\x45\xdf\xa3":
        return "truncated", f"it begins as a video file, but its index is missing or cut ({message(error)})"
    return "not_video", message(error)


def message(error: Exception) -> str:
    """An error of FFmpeg, or of a file, in a line: without its number, and without the path, which is that of a copy."""
    if isinstance(error, av.FFmpegError | OSError) and error.strerror:
        call = str(error.args[2]) if len(error.args) > 2 else "/"
        return error.strerror if "/" in call else f"{error.strerror} ({call})"
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def inspect(path: Path, admit: Callable[[Header], None] = lambda header: None) -> Probed:
    """Hash and demux a file, and decode its first frame.

    Args:
        path: the file.
        admit: is shown the header before anything is decoded, and raises to refuse the file.

    Raises:
        Unusable: it is empty, no video, truncated, its first frame does not decode, or its presentation times make no sense.
    """
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    with open_video(path) as (container, stream):
        header = _header(container, stream)
        admit(header)
        packets, num_packets, hidden, pts, frame = _demux(container, stream)
        num_frames = num_packets - hidden
        if stream.frames and num_frames < stream.frames and num_packets and _file_is_cut(path, stream):
            raise Unusable("truncated", f"the header promises {stream.frames} frames, the file holds {num_frames}")
        if frame is None:
            raise Unusable("undecodable", f"none of its {num_frames} packets gives a frame")
        if not pts:
            raise Unusable("bad_timestamps", f"none of its {num_frames} packets has a presentation time")
        pts.sort()
        time_base = float(stream.time_base)
        _check_times(pts, time_base)
        rotation, fps = int(frame.rotation), header.fps
        sides = (stream.height, stream.width) if rotation % 180 == 0 else (stream.width, stream.height)
        duration = (pts[-1] - pts[0]) * time_base + (1 / fps if fps else 0.0)
        name = container.format.name
        info = SourceInfo(sha256, packets, name, header.codec, num_frames, fps, *sides, duration)
        transfer = _HDR_TRANSFERS.get(int(frame.color_trc), "")
        return Probed(info, header, pts, time_base, rotation, transfer)


def _header(container: Any, stream: Any) -> Header:
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    videos = sum(not is_cover(other) for other in container.streams.video)
    return Header(codec_name(stream), stream.height, stream.width, fps, len(container.streams), videos)


def _demux(container: Any, stream: Any) -> tuple[str, int, int, list[int], Any]:
    """SHA-256 of the packets, how many they are, how many of them are hidden, the times of the others, and the first frame."""
    packets = hashlib.sha256(stream.codec_context.extradata or b"")
    num_packets, hidden, pts, first = 0, 0, [], None
    for packet in container.demux(stream):
        if not packet.size:
            continue
        packets.update(bytes(packet))
        num_packets += 1
        hidden += packet.is_discard
        if packet.pts is not None and not packet.is_discard:
            pts.append(packet.pts)
        if first is None:
            first = next(iter(packet.decode()), None)
    if first is None:
        first = next(iter(stream.codec_context.decode(None)), None)
    return packets.hexdigest(), num_packets, hidden, pts, first


def _check_times(pts: list[int], time_base: float) -> None:
    first, last = pts[0] * time_base, pts[-1] * time_base
    if first < _MIN_SECONDS or last > _MAX_SECONDS:
        raise Unusable(
            "bad_timestamps", f"frames from {first:.3f} s to {last:.3f} s; times lie in {_MIN_SECONDS:g} to {_MAX_SECONDS:g}"
        )


def _file_is_cut(path: Path, stream: Any) -> bool:
    """Whether fewer packets than promised means a cut file; an edit list hides frames without that."""
    with av.open(str(path), options={**OPTIONS, "ignore_editlist": "1"}) as container:
        return sum(bool(p.size) for p in container.demux(container.streams[stream.index])) < stream.frames


def decoded(path: Path, first: int = 0, pts: list[int] | None = None) -> Iterator[tuple[int, Any]]:
    """The frames from `first` on, in presentation order, each with its index.

    Args:
        path: the file.
        first: where to begin; needs `pts` if it is not 0.
        pts: presentation times of all frames, ascending: with them the reader begins at the key frame before `first`.

    Raises:
        Unusable: a frame does not decode, is marked as corrupt, or does not come later than the one before.
    """
    if not first:
        yield from enumerate(_in_order(path, None))
        return
    assert pts is not None
    for wanted in (pts[first], None):  # where a container seeks badly, from the start
        index = None
        for frame in _in_order(path, wanted):
            if index is None:
                if wanted is not None and (not frame.key_frame or frame.pts > wanted):
                    break
                index = bisect.bisect_left(pts, frame.pts)
            if index >= len(pts) or pts[index] != frame.pts:
                raise Unusable(
                    "bad_timestamps", f"frame {index} decodes with presentation time {frame.pts}, its packet had another"
                )
            if index >= first:
                yield index, frame
            index += 1
        else:
            return


def _in_order(path: Path, seek_to: int | None) -> Iterator[Any]:
    with open_video(path) as (container, stream):
        if seek_to is not None:
            container.seek(seek_to, stream=stream)
        last = None
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise Unusable("undecodable", f"the frame at {frame.time} s is damaged")
            if frame.pts is None or (last is not None and frame.pts <= last):
                raise Unusable("bad_timestamps", f"a frame with presentation time {frame.pts} follows {last}")
            last = frame.pts
            yield frame


def key_frames(path: Path, seconds: list[float]) -> Iterator[Any]:
    """The key frames before the given times (counted as the file counts), each once; fewer where a container seeks badly."""
    with open_video(path) as (container, stream):
        seen = set()
        for time in seconds:
            container.seek(round(time / stream.time_base), stream=stream)
            frame = next(container.decode(stream), None)
            if frame is not None and frame.pts not in seen and frame.key_frame and not frame.is_corrupt:
                seen.add(frame.pts)
                yield frame
