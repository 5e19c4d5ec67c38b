"""The frames that a model sees of a clip, decoded in the isolated child and left on scratch disk as raw bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np

from data_pipelines.rows import FrameRequest, Placement, Row, Unusable
from data_pipelines.workspace import Workspace

Array = np.ndarray[Any, Any]


class FrameStage:
    """Writes the frames of each row to `KEY.rgb` in the scratch folder: `(T, H, W, 3)` uint8."""

    name: ClassVar[str] = "frames"
    requires: ClassVar[tuple[str, ...]] = ()
    placement: ClassVar[Placement] = "child"

    def __init__(self, request: FrameRequest) -> None:
        self.request = request

    def process(self, row: Row, work: Workspace) -> list[Row]:
        stop = row.stop if row.stop is not None else len(work.scan().times)
        wanted = spaced(row.start, stop, self.request.num_frames)
        found = {}
        for index, frame in enumerate(work.frames(wanted[0], wanted[-1] + 1), start=wanted[0]):
            if index in wanted:
                found[index] = cover(inside(frame, row.border), self.request.height, self.request.width)
        frames_path(work.scratch, row).write_bytes(np.stack([found[index] for index in wanted]).tobytes())
        return [row]


def frames_path(scratch: Path, row: Row) -> Path:
    """Where the frames of `row` are."""
    return scratch / f"{row.key}.rgb"


def read_frames(scratch: Path, row: Row, request: FrameRequest) -> Array:
    """The frames of `row`: `(T, H, W, 3)` uint8."""
    return np.fromfile(frames_path(scratch, row), np.uint8).reshape(request.num_frames, request.height, request.width, 3)


def spaced(start: int, stop: int, num_frames: int) -> list[int]:
    """The middles of `num_frames` equal parts of `[start, stop)`; a short clip repeats frames."""
    if stop <= start:
        raise Unusable("empty_clip", f"it has no frames in [{start}, {stop})")
    return [start + (stop - start) * (2 * index + 1) // (2 * num_frames) for index in range(num_frames)]


def inside(image: Array, border: tuple[int, int, int, int] | None) -> Array:
    """The picture inside its black borders, `(H, W, 3)`."""
    if border is None:
        return image
    top, left, height, width = border
    return image[top : top + height, left : left + width]


def cover(image: Array, height: int, width: int) -> Array:
    """Resize `(H, W, 3)` so that it covers `height` x `width`, and crop about the centre."""
    h, w = image.shape[:2]
    scale = max(height / h, width / w)
    size = (max(width, round(w * scale)), max(height, round(h * scale)))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    resized = cv2.resize(image, size, interpolation=method)
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return resized[top : top + height, left : left + width]
