"""Small videos with every oddity that curation meets, made on the spot with PyAV; a frame carries its index as a bar code."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

BITS = 6
HEIGHT, WIDTH, FPS, NUM_FRAMES = 48, 64, 25, 24


def coded(num_frames: int = NUM_FRAMES, height: int = HEIGHT, width: int = WIDTH, first: int = 0) -> np.ndarray[Any, Any]:
    """Frames `(T, H, W, 3)` whose upper half shows their index, most significant bit first, above a gradient that moves."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    ramp = np.linspace(40, 200, width)
    for i in range(num_frames):
        bits = [(i + first) >> bit & 1 for bit in reversed(range(BITS))]
        columns = np.repeat(np.array(bits, np.uint8) * 160 + 40, -(-width // BITS))[:width]
        frames[i, : height // 2] = columns[None, :, None]
        frames[i, height // 2 :] = np.roll(ramp, i)[None, :, None]
    return frames


def code(frame: np.ndarray[Any, Any]) -> int:
    """The index that a frame `(H, W, 3)` of `coded` shows."""
    height, width = frame.shape[:2]
    centres = [min(width - 1, round((bit + 0.5) * -(-width // BITS))) for bit in range(BITS)]
    value = 0
    for x in centres:
        value = 2 * value + int(frame[height // 8 : 3 * height // 8, x - 1 : x + 2].mean() > 120)
    return value


def write(
    path: Path,
    frames: np.ndarray[Any, Any],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    pts: list[int] | None = None,
    rate: int = FPS,
    num_copies: int = 1,
    cover: bool = False,
) -> Path:
    """Encode frames; skips the test where the encoder is not built in.

    Args:
        path: the file; its ending says which container.
        frames: `(T, H, W, 3)` uint8.
        pts: presentation times in units of 1/1000 s; None for a constant rate.
        num_copies: video streams, each with the frames of the one before reversed.
        cover: put a JPEG picture in front of them, marked as the cover.
    """
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no encoder {codec}")
    defaults = {"crf": "10", "preset": "veryfast", "threads": "1", "g": "8"} if codec == "libx264" else {}
    with av.open(str(path), "w", options=container_options or {}) as container:
        picture = _add_cover(container) if cover else None
        streams = []
        for _ in range(num_copies):
            stream: Any = container.add_stream(codec, rate=rate, options={**defaults, **(options or {})})
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
            if pts is not None:
                stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            streams.append(stream)
        for number, stream in enumerate(streams):
            for index, image in enumerate(frames if number % 2 == 0 else frames[::-1]):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                if pts is not None:
                    frame.pts, frame.time_base = pts[index], Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        if picture is not None:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 255, np.uint8), format="rgb24")
            frame.pts, frame.time_base = 0, Fraction(1, 25)
            container.mux(picture.encode(frame) + picture.encode(None))
    return path


def _add_cover(container: Any) -> Any:
    stream = container.add_stream("mjpeg", rate=25)
    stream.height, stream.width, stream.pix_fmt = 32, 32, "yuvj420p"
    stream.disposition = av.stream.Disposition.attached_pic
    return stream


def blank(path: Path, height: int, width: int) -> Path:
    """One frame of a huge size, by the quickest encoder."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mjpeg", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuvj420p"
        frame = av.VideoFrame.from_ndarray(np.full((height * 3 // 2, width), 128, np.uint8), format="yuvj420p")
        container.mux(stream.encode(frame) + stream.encode(None))
    return path


def audio(path: Path) -> Path:
    """A file with a quarter of a second of silence and no picture."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("aac", rate=16000, layout="mono")
        for start in range(0, 4096, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def copy(source: Path, target: Path, shift: int = 0, options: dict[str, str] | None = None) -> Path:
    """The packets of `source` in another container, `shift` frames later (or earlier, where it is negative)."""
    with av.open(str(source)) as read, av.open(str(target), "w", options=options or {}) as made:
        stream = made.add_stream_from_template(read.streams.video[0])
        step = int(1 / read.streams.video[0].average_rate / read.streams.video[0].time_base)
        for packet in read.demux(read.streams.video[0]):
            if packet.size:
                packet.pts, packet.dts = packet.pts + shift * step, packet.dts + shift * step
                packet.stream = stream
                made.mux(packet)
    return target


def rotate(path: Path, degrees: int) -> Path:
    """Write a rotation (clockwise, as a phone does) into the track header of an MP4 file."""
    content = bytearray(path.read_bytes())
    one = 1 << 16
    cos, sin = {0: (one, 0), 90: (0, one), 180: (-one, 0), 270: (0, -one)}[degrees]
    matrix = struct.pack(">9i", cos, sin, 0, -sin, cos, 0, 0, 0, 1 << 30)
    start = content.index(b"tkhd") - 4 + 48
    content[start : start + 36] = matrix
    path.write_bytes(content)
    return path


def flip_middle(path: Path, count: int = 64) -> Path:
    """Invert `count` bytes in the middle of the media data of an MP4 file."""
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    size = struct.unpack(">I", content[start - 8 : start - 4])[0]
    middle = start + size // 2
    content[middle : middle + count] = bytes(255 - value for value in content[middle : middle + count])
    path.write_bytes(content)
    return path
