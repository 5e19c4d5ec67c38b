"""Transcode: re-encode a clip to the canonical form, and read it back before it counts.

The picture inside black borders is cropped about its centre to the wanted aspect and scaled; frames are taken at a constant
rate, each the one nearest in presentation time. H.264, yuv420p, closed GOPs, no B-frames, no edit list, no audio, no rotation,
index at the front; one encoder thread, so that the bytes are the same on every run.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

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
        self._encode(path, images, repeats, fps, (height, width))
        self._verify(path, num_frames, (height, width))
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

    def _encode(self, path: Path, images: Any, repeats: np.ndarray[Any, Any], fps: Fraction, size: tuple[int, int]) -> None:
        """Write each image as often as `repeats` says."""
        wanted = self.config
        options = {"crf": str(wanted.crf), "preset": wanted.preset, "bf": "0", "threads": "1"}
        # x264's macroblock tree reads memory it did not set when frames are tiny (32x32: 3 encodes of 100 differed), and the
        # bytes must be the same on every run.
        options["x264-params"] = "open-gop=0:scenecut=0:mbtree=0"
        with av.open(str(path), "w", format="mp4", options={"movflags": "faststart", "use_editlist": "0"}) as container:
            stream: Any = container.add_stream("libx264", rate=fps, options=options)
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            stream.codec_context.gop_size = wanted.gop
            converter = VideoReformatter()  # one, on one thread: the encoder's own starts threads for each frame
            for image, count in zip(images, repeats, strict=True):
                for _ in range(count):
                    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                    container.mux(stream.encode(converter.reformat(frame, format="yuv420p", threads=1)))
            container.mux(stream.encode(None))

    def _verify(self, path: Path, num_frames: int, size: tuple[int, int]) -> None:
        """Decode what was written: count, size and order of times must be as meant."""
        with av.open(str(path)) as container:
            frames = [(frame.pts, frame.height, frame.width, frame.is_corrupt) for frame in container.decode(video=0)]
        times = [-1 if pts is None else pts for pts, *_ in frames]
        sound = all((height, width) == size and not corrupt for _, height, width, corrupt in frames)
        if len(frames) != num_frames or not sound or any(a >= b for a, b in itertools.pairwise(times)):
            raise Unusable("bad_transcode", f"wrote {num_frames} frames of {size}, read back {len(frames)}: {frames[:1]}")


def constant_rate(fps: float) -> Fraction:
    """Frames a second as a fraction that a container can hold: `24000/1001` for 23.976."""
    return Fraction(fps).limit_denominator(1001)


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
