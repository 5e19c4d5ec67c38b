"""Transcode: re-encode a clip to the canonical form, and read it back before it counts.

The picture inside black borders is cropped about its centre to the wanted aspect and scaled; frames are taken at a constant
rate, each the one nearest in presentation time, without rotation. What the file is like: see `clip_file`.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from data_pipelines.clip_file import ClipFormat, ClipWriter, check_clip, constant_rate
from data_pipelines.rows import ClipFile, Rejected, Row, Unusable
from data_pipelines.workspace import Workspace
from videofm.config.curation_stages import TranscodeConfig


class TranscodeStage:
    """See `TranscodeConfig`. Fills `Row.clip`."""

    name, requires, placement = "transcode", (), "child"

    def __init__(self, config: TranscodeConfig) -> None:
        self.config = config

    def process(self, row: Row, work: Workspace) -> list[Row]:
        scan, wanted = work.scan(), self.config
        if transfer := work.probe().transfer:
            raise Rejected("hdr", f"high dynamic range, {transfer}: there is no tone mapping here; convert it before")
        stop = row.stop if row.stop is not None else len(scan.times)
        times = scan.times[row.start : stop]
        fps = constant_rate(wanted.fps or work.info().fps or _rate(times))
        repeats = resample(times, float(fps))
        num_frames = int(repeats.sum())
        if num_frames < wanted.min_frames:
            raise Rejected("too_few_frames", f"{num_frames} frames at {float(fps):g} a second, at least {wanted.min_frames}")
        info = work.info()
        top, left, *inside = row.border or (0, 0, info.height, info.width)
        height, width = self._size(*inside)
        crop = (slice(top, top + inside[0]), slice(left, left + inside[1]))
        path = work.scratch / f"{row.key}.mp4"
        images = (fit(image[crop], height, width) for image in work.frames(row.start, stop))
        with ClipWriter(path, ClipFormat(fps, height, width, wanted.crf, wanted.preset, wanted.gop)) as writer:
            for image, count in zip(images, repeats, strict=True):
                writer.write(image, count)
        if wrong := check_clip(path, num_frames, height, width):
            raise Unusable("bad_transcode", wrong)
        return [row.with_(stop=stop, clip=ClipFile(str(path), num_frames, float(fps), height, width))]

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the stored frames for a picture of `height` x `width`.

        Raises:
            Rejected: it would have to be enlarged.
        """
        wanted = self.config
        if wanted.height is not None and wanted.width is not None:
            if (height < wanted.height or width < wanted.width) and not wanted.upscale:
                raise Rejected("too_small", f"{height}x{width}, stored are {wanted.height}x{wanted.width} without enlarging")
            return wanted.height, wanted.width
        assert wanted.short_side is not None
        scale = wanted.short_side / min(height, width)
        if scale >= 1 and not wanted.upscale:
            return max(2, height // 2 * 2), max(2, width // 2 * 2)
        return 2 * round(height * scale / 2), 2 * round(width * scale / 2)


def _rate(times: np.ndarray[Any, Any]) -> float:
    """Frames a second of frames at `times`."""
    return 1 / float(np.median(np.diff(times))) if len(times) > 1 else 25.0


def resample(times: np.ndarray[Any, Any], fps: float) -> np.ndarray[Any, Any]:
    """How often each frame appears at a constant rate: `(T,)` presentation times in seconds -> `(T,)` counts."""
    step = float(np.median(np.diff(times))) if len(times) > 1 else 1 / fps
    num_frames = max(1, round((times[-1] - times[0] + step) * fps))
    wanted = times[0] + np.arange(num_frames) / fps
    # Nearest in time; the small shift makes a tie go to the earlier frame on every machine.
    nearest = np.searchsorted((times[1:] + times[:-1]) / 2 + 1e-6, wanted)
    return np.bincount(nearest, minlength=len(times))


def fit(image: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """Crop `(H, W, 3)` about its centre to the aspect of `height` x `width`, then scale to it."""
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return np.ascontiguousarray(image)
    scale = min(h / height, w / width)
    crop_h, crop_w = min(h, round(height * scale)), min(w, round(width * scale))
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    cropped = image[top : top + crop_h, left : left + crop_w]
    method = cv2.INTER_AREA if scale >= 1 else cv2.INTER_CUBIC
    return cv2.resize(cropped, (width, height), interpolation=method)
