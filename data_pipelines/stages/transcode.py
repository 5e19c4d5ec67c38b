"""Transcode: re-encode a clip to the canonical form, and read it back before it counts.

The picture is cropped about its centre to the wanted aspect and scaled; frames are taken at a constant rate, each the one
nearest in presentation time. H.264, yuv420p, closed GOPs, no B-frames, no edit list, no audio, index at the front; one encoder
thread, so that the bytes are the same on every run.
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

    name, requires, barrier = "transcode", (), False

    def __init__(self, config: TranscodeConfig) -> None:
        self.config = config

    def process(self, row: Row, work: Workspace) -> list[Row]:
        scan, wanted = work.scan(), self.config
        stop = row.stop if row.stop is not None else len(scan.times)
        repeats = resample(scan.times[row.start : stop], wanted.fps)
        num_frames = int(repeats.sum())
        if num_frames < wanted.min_frames:
            raise Rejected("too_few_frames", f"{num_frames} frames at {wanted.fps:g} a second, at least {wanted.min_frames}")
        path = work.scratch / f"{row.source_id}-{row.start:08d}.mp4"
        self._encode(path, work.frames(row.start, stop), repeats)
        self._verify(path, num_frames)
        return [row.with_(stop=stop, clip=ClipFile(str(path), num_frames, wanted.fps, wanted.height, wanted.width))]

    def _encode(self, path: Path, frames: Any, repeats: np.ndarray[Any, Any]) -> None:
        """Write each frame as often as `repeats` says."""
        wanted = self.config
        options = {"crf": str(wanted.crf), "preset": "medium", "bf": "0", "threads": "1"}
        # x264's macroblock tree reads memory it did not set when frames are tiny (32x32: 3 encodes of 100 differed), and the
        # bytes must be the same on every run.
        options["x264-params"] = "open-gop=0:scenecut=0:mbtree=0"
        with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
            stream: Any = container.add_stream("libx264", rate=Fraction(wanted.fps).limit_denominator(1001), options=options)
            stream.height, stream.width, stream.pix_fmt = wanted.height, wanted.width, "yuv420p"
            stream.codec_context.gop_size = wanted.gop
            converter = VideoReformatter()  # one, on one thread: the encoder's own starts threads for each frame
            for image, count in zip(frames, repeats, strict=True):
                if not count:
                    continue
                fitted = fit(image, wanted.height, wanted.width)
                for _ in range(count):
                    frame = av.VideoFrame.from_ndarray(fitted, format="rgb24")
                    container.mux(stream.encode(converter.reformat(frame, format="yuv420p", threads=1)))
            container.mux(stream.encode(None))

    def _verify(self, path: Path, num_frames: int) -> None:
        """Decode what was written: count, size and order of times must be as meant."""
        with av.open(str(path)) as container:
            frames = [(frame.pts, frame.height, frame.width, frame.is_corrupt) for frame in container.decode(video=0)]
        times = [-1 if pts is None else pts for pts, *_ in frames]
        wanted = (self.config.height, self.config.width)
        sound = all((height, width) == wanted and not corrupt for _, height, width, corrupt in frames)
        if len(frames) != num_frames or not sound or any(a >= b for a, b in itertools.pairwise(times)):
            raise Unusable("bad_transcode", f"wrote {num_frames} frames of {wanted}, read back {len(frames)}: {frames[:1]}")


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
        return image
    scale = min(h / height, w / width)
    crop_h, crop_w = min(h, round(height * scale)), min(w, round(width * scale))
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    cropped = image[top : top + crop_h, left : left + crop_w]
    method = cv2.INTER_AREA if scale >= 1 else cv2.INTER_CUBIC
    return cv2.resize(cropped, (width, height), interpolation=method)
