"""Frames to files that people look at: H.264 videos, and contact sheets as PNG. Frames are uint8 `(T, H, W, 3)`, RGB."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
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


def write_video(path: str | Path, frames: Frames, fps: float) -> None:
    """Write `frames` as H.264 (yuv420p, which every player shows) at nearly no loss; the file appears when it is whole.

    Raises:
        DataError: frames are not uint8 `(T, H, W, 3)` with even sides, or fps is not positive.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise DataError(f"a video is uint8 frames (T, H, W, 3), not {frames.dtype} {tuple(frames.shape)}.")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2 or fps <= 0:
        raise DataError(f"cannot write {height}x{width} frames at {fps} a second: H.264 needs even sides and a positive rate.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with av.open(str(aside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        # One thread: the bytes do not depend on the machine, and small videos gain nothing from more.
        # No mbtree: on small frames it reads what it has not written, and equal frames give different bytes now and then.
        stream.options = {"crf": _CRF, "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    os.replace(aside, path)


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
    indices = np.linspace(0, len(video) - 1, min(num_frames, len(video))).round().astype(int)
    frames = [_resize(video[index]) for index in indices]
    gap = np.full((frames[0].shape[0], 2, 3), _PAPER, dtype=np.uint8)
    parts = [part for frame in frames for part in (frame, gap)][:-1]
    strip = np.concatenate(parts, axis=1)
    return np.concatenate([strip, np.full((2, strip.shape[1], 3), _PAPER, dtype=np.uint8)])


def _resize(frame: Frames) -> Frames:
    height, width = frame.shape[:2]
    if height < _TILE:  # whole multiples, so that pixels stay pixels
        factor = -(-_TILE // height)
        return frame.repeat(factor, axis=0).repeat(factor, axis=1)
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
