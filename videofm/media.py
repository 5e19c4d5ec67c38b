"""Frames to files that people look at: H.264 videos, and contact sheets as PNG. Frames are uint8 `(T, H, W, 3)`, RGB."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from videofm.errors import DataError

Frames = np.ndarray[Any, np.dtype[np.uint8]]

_CRF = "8"
"""x264 constant rate factor: hardly any loss, for videos that are measured after they were written."""
_TILE = 96
"""Frames on a sheet are at least this high if they are small, and not higher than twice this if they are large."""
_GAP, _LABEL, _FONT_SIZE = 6, 16, 11
_PAPER, _INK = (250, 250, 250), (30, 30, 30)


def to_frames(video: Any) -> Frames:
    """A video tensor or array `(3, T, H, W)` in [-1, 1] as frames `(T, H, W, 3)` uint8; values outside are clipped."""
    values = np.asarray(video, dtype=np.float32)
    return np.ascontiguousarray(np.rint((values.clip(-1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 3, 0))


class VideoWriter:
    """An H.264 file (yuv420p, which every player shows) at nearly no loss, written as its frames are made.

    Use it as a context: the file appears when the context ends and is whole; an exception inside leaves nothing behind, and
    what a killed process left is removed by the next writer of the file, of which there is one at a time. What was written is
    not kept in memory, however long the video is.
    """

    def __init__(self, path: str | Path, fps: float) -> None:
        """`fps` are frames a second."""
        self._path, self._fps = Path(path), fps
        self._aside = self._path.with_name(f"{self._stem}{os.getpid()}")
        self._container: Any = None
        self._stream: Any = None

    @property
    def _stem(self) -> str:
        return f".{self._path.name}.tmp-"

    def __enter__(self) -> VideoWriter:
        return self

    def write(self, frames: Frames) -> None:
        """Put uint8 `frames` `(T, H, W, 3)` behind those that are there.

        Raises:
            DataError: they are not that, have odd sides or another size than those before, or fps is not positive.
        """
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
            raise DataError(f"a video is uint8 frames (T, H, W, 3), not {frames.dtype} {tuple(frames.shape)}.")
        height, width = frames.shape[1:3]
        if self._stream is None:
            self._open(height, width)
        if (self._stream.height, self._stream.width) != (height, width):
            before = f"{self._stream.height}x{self._stream.width}"
            raise DataError(f"frames of {height}x{width} cannot follow frames of {before}: a video has one size.")
        for frame in frames:
            self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._container is not None:
                with self._container:
                    if kind is None:
                        self._container.mux(self._stream.encode(None))
                if kind is None:
                    os.replace(self._aside, self._path)
        finally:
            self._aside.unlink(missing_ok=True)
        if kind is None and self._container is None:
            raise DataError(f"no frame was written to {self._path}: a video has at least one.")

    def _open(self, height: int, width: int) -> None:
        if height % 2 or width % 2 or self._fps <= 0:
            raise DataError(
                f"cannot write {height}x{width} frames at {self._fps} a second: H.264 needs even sides and a positive rate."
            )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        for stale in self._path.parent.glob(f"{glob.escape(self._stem)}*"):
            stale.unlink(missing_ok=True)
        self._container = av.open(str(self._aside), "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=Fraction(self._fps).limit_denominator(1001))
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, "yuv420p"
        # One thread: the bytes do not depend on the machine, and small videos gain nothing from more.
        # No mbtree: on small frames it reads what it has not written, and equal frames give different bytes now and then.
        self._stream.options = {"crf": _CRF, "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}


def write_video(path: str | Path, frames: Frames, fps: float) -> None:
    """Write all `frames` of a video, see `VideoWriter`.

    Raises:
        DataError: frames are not uint8 `(T, H, W, 3)` with even sides, or fps is not positive.
    """
    with VideoWriter(path, fps) as writer:
        writer.write(frames)


def read_video(path: str | Path) -> Frames:
    """All frames of the first video stream of a file.

    Raises:
        DataError: the file is missing, damaged, or has no video.
    """
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise DataError(f"{path} cannot be read as a video: {error}") from None
    if not frames:
        raise DataError(f"{path} has no video frames.")
    return np.stack(frames)


def spread_frames(path: str | Path, num_frames: int) -> Frames:
    """`num_frames` evenly spaced frames from the first to the last of a file, or all where it has fewer; no others are held.

    Those that are higher than a sheet shows them come as small as it does: a sheet of many videos holds them all at once.

    Raises:
        DataError: the file is missing, damaged, or has no video.
    """
    try:
        with av.open(str(path)) as container:
            counted = sum(1 for packet in container.demux(video=0) if packet.size)
        wanted = set(_spread(counted, num_frames))
        with av.open(str(path)) as container:
            decoded = enumerate(container.decode(video=0))
            frames = [
                _shrunk(np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8))
                for index, frame in decoded
                if index in wanted
            ]
    except (av.FFmpegError, OSError, IndexError) as error:
        raise DataError(f"{path} cannot be read as a video: {error}") from None
    if not frames or len(frames) != len(wanted):
        raise DataError(
            f"{path} has {counted} frames by its index, but {len(frames)} of {len(wanted)} were decoded: write it anew."
        )
    return np.stack(frames)


def contact_sheet(
    videos: Sequence[Frames], captions: Sequence[str], path: str | Path, frames_per_video: int = 5, columns: int = 3
) -> None:
    """A PNG with one labelled strip of `frames_per_video` evenly spaced frames for each video, `columns` strips a row.

    Raises:
        DataError: no videos, or as many captions as videos are not given.
    """
    if not videos or len(videos) != len(captions):
        raise DataError(f"a contact sheet needs videos and a caption for each: got {len(videos)} and {len(captions)}.")
    _sheet([[video] for video in videos], captions, Path(path), frames_per_video, columns)


def comparison_sheet(
    originals: Sequence[Frames],
    reconstructions: Sequence[Frames],
    captions: Sequence[str],
    path: str | Path,
    frames_per_video: int = 5,
    columns: int = 2,
) -> None:
    """A PNG like `contact_sheet` with two strips a clip: the original above its reconstruction.

    Raises:
        DataError: nothing to show, or the numbers of originals, reconstructions and captions differ.
    """
    if not originals or not len(originals) == len(reconstructions) == len(captions):
        counts = f"{len(originals)} originals, {len(reconstructions)} reconstructions, {len(captions)} captions"
        raise DataError(f"a comparison sheet needs as many of each, at least one: got {counts}.")
    pairs = [[above, below] for above, below in zip(originals, reconstructions, strict=True)]
    stacked_sheet(pairs, captions, path, frames_per_video, columns)


def stacked_sheet(
    stacks: Sequence[Sequence[Frames]],
    captions: Sequence[str],
    path: str | Path,
    frames_per_video: int = 5,
    columns: int = 2,
) -> None:
    """A PNG like `contact_sheet` with a strip for each video of a stack, one above the other.

    Raises:
        DataError: no stacks, or as many captions as stacks are not given.
    """
    if not stacks or len(stacks) != len(captions):
        raise DataError(f"a sheet needs stacks of videos and a caption for each: got {len(stacks)} and {len(captions)}.")
    _sheet(stacks, captions, Path(path), frames_per_video, columns)


def _sheet(rows: Sequence[Sequence[Frames]], captions: Sequence[str], path: Path, num_frames: int, columns: int) -> None:
    cells = [np.concatenate([_strip(video, num_frames) for video in stack]) for stack in rows]
    cell_height = max(cell.shape[0] for cell in cells) + _LABEL + _GAP
    cell_width = max(cell.shape[1] for cell in cells) + _GAP
    columns = min(columns, len(cells))
    num_rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * cell_width + _GAP, num_rows * cell_height + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for index, (cell, caption) in enumerate(zip(cells, captions, strict=True)):
        x, y = _GAP + index % columns * cell_width, _GAP + index // columns * cell_height
        draw.text((x, y), _shorten(caption or "(no caption)", font, cell_width - _GAP), fill=_INK, font=font)
        sheet.paste(Image.fromarray(cell), (x, y + _LABEL))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG", optimize=True)


def _strip(video: Frames, num_frames: int) -> Frames:
    # num_frames frames from first to last, side by side with a thin gap: (H', W', 3).
    frames = [_resize(video[index]) for index in _spread(len(video), num_frames)]
    gap = np.full((frames[0].shape[0], 2, 3), _PAPER, dtype=np.uint8)
    parts = [part for frame in frames for part in (frame, gap)][:-1]
    strip = np.concatenate(parts, axis=1)
    return np.concatenate([strip, np.full((2, strip.shape[1], 3), _PAPER, dtype=np.uint8)])


def _spread(length: int, count: int) -> list[int]:
    """`count` numbers from 0 to `length - 1`, evenly spaced; all of them where there are fewer."""
    return [int(index) for index in np.linspace(0, length - 1, min(count, length)).round()]


def _resize(frame: Frames) -> Frames:
    height = frame.shape[0]
    if height < _TILE:  # whole multiples, so that pixels stay pixels
        factor = -(-_TILE // height)
        return frame.repeat(factor, axis=0).repeat(factor, axis=1)
    return _shrunk(frame)


def _shrunk(frame: Frames) -> Frames:
    """`frame`, at most `2 * _TILE` high."""
    height, width = frame.shape[:2]
    if height <= 2 * _TILE:
        return frame
    size = (max(1, round(width * 2 * _TILE / height)), 2 * _TILE)
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))


def _shorten(text: str, font: Any, width: int) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
