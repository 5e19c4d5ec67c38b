"""Split: cut a source into shots, and long shots into clips of nearly equal length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from scenedetect.common import FrameTimecode
from scenedetect.detectors import AdaptiveDetector, ContentDetector, HistogramDetector

from data_pipelines.rows import Rejected, Row
from data_pipelines.scan import Scan, Wanted
from data_pipelines.workspace import Workspace
from videofm.config.curation_stages import SplitConfig

_SAME_PICTURE = 0.8
"""Correlation of the greys of two small frames above which only their exposure differs."""


class SplitStage:
    """See `SplitConfig`."""

    name, requires, placement = "split", (), "child"

    def __init__(self, config: SplitConfig) -> None:
        self.config = config
        settings = config.model_dump(include={"adaptive", "window_width", "histogram", "content"})
        self.wanted = Wanted(cuts=repr(sorted(settings.items())))

    def prepare(self, work: Workspace) -> None:
        """Say what the scan of the source shall find."""
        work.want(self.wanted, lambda: _Detectors(self.config))

    def process(self, row: Row, work: Workspace) -> list[Row]:
        self.prepare(work)
        scan = work.scan()
        edges = [0, *scan.cuts, len(scan.times)]
        clips = []
        for start, stop in itertools.pairwise(edges):
            for first, last in self._without_black(scan, start, stop):
                # Edges of the file itself are trimmed too: fades in and out sit there.
                pieces = self._pieces(scan, first + self.config.edge_trim, last - self.config.edge_trim)
                work.notes["shots_too_short"] += not pieces
                clips += [row.with_(start=a, stop=b) for a, b in pieces]
        work.notes["shots"] += len(edges) - 1
        if not clips:
            raise Rejected("too_short", f"no shot of {len(edges) - 1} has {self._shortest()} after trimming")
        return clips

    def _shortest(self) -> str:
        seconds = f" and {self.config.min_seconds:g} s" if self.config.min_seconds else ""
        return f"{self.config.min_frames} frames{seconds}"

    def _without_black(self, scan: Scan, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The runs of frames of a shot that are not black."""
        if self.config.black is None:
            yield start, stop
            return
        shown = np.concatenate([[False], scan.brightness[start:stop] > self.config.black, [False]])
        edges = np.flatnonzero(shown[1:] != shown[:-1]) + start
        yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)

    def _pieces(self, scan: Scan, start: int, stop: int) -> list[tuple[int, int]]:
        """A run of frames as clips that are long enough and not too long; none where it is too short."""
        limits = self.config
        if stop <= start or not self._long_enough(scan, start, stop):
            return []
        count = -(-(stop - start) // limits.max_frames)
        if limits.max_seconds is not None:
            count = max(count, -int(-_seconds(scan, start, stop) // limits.max_seconds))
        bounds = [start + (stop - start) * i // count for i in range(count + 1)]
        return [(a, b) for a, b in itertools.pairwise(bounds) if self._long_enough(scan, a, b)]

    def _long_enough(self, scan: Scan, start: int, stop: int) -> bool:
        seconds = self.config.min_seconds
        return stop - start >= self.config.min_frames and (not seconds or _seconds(scan, start, stop) >= seconds - 1e-6)


def _seconds(scan: Scan, start: int, stop: int) -> float:
    """How long frames are shown; the last one of a source as long as the one before it."""
    times = scan.times
    if stop < len(times):
        return float(times[stop] - times[start])
    return float(times[-1] - times[start] + (times[-1] - times[-2] if len(times) > 1 else 0.0))


class _Detectors:
    """PySceneDetect's detectors, fed frame by frame; the union of their cuts. Their own rule on short scenes is off.

    The histogram of luminance also changes when a camera adapts its exposure, frame after frame. So its cuts count only where
    the picture has changed, too, since the last frame that was no such cut: a dissolve does that in its middle.
    """

    def __init__(self, config: SplitConfig) -> None:
        self.detectors: list[Any] = []
        if config.adaptive is not None:
            width = config.window_width
            self.detectors.append(AdaptiveDetector(config.adaptive, min_scene_len=0, window_width=width))
        if config.content is not None:
            self.detectors.append(ContentDetector(config.content, min_scene_len=0))
        self.histogram = HistogramDetector(config.histogram, min_scene_len=0) if config.histogram is not None else None
        self._before: np.ndarray[Any, Any] | None = None

    def observe(self, index: int, frame: np.ndarray[Any, Any]) -> list[int]:
        # The detectors compare neighbouring frames; the rate only labels their answer, so any rate will do.
        time = FrameTimecode(index, 25.0)
        cuts = [int(cut.frame_num) for detector in self.detectors for cut in detector.process_frame(time, frame)]
        return cuts + (self._by_histogram(time, frame) if self.histogram is not None else [])

    def _by_histogram(self, time: FrameTimecode, frame: np.ndarray[Any, Any]) -> list[int]:
        assert self.histogram is not None
        cuts = [int(cut.frame_num) for cut in self.histogram.process_frame(time, frame)]
        picture = _picture(frame)
        if cuts and self._before is not None and float((picture * self._before).sum()) > _SAME_PICTURE:
            return []
        self._before = picture
        return cuts


def _picture(frame: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A frame `(H, W, 3)` as 16 x 16 greys of mean 0 and norm 1, which brightness and contrast do not change; 0 where flat."""
    grey = cv2.resize(frame, (16, 16), interpolation=cv2.INTER_AREA).astype(np.float64).mean(axis=2)
    grey -= grey.mean()
    norm = float(np.linalg.norm(grey))
    return grey / norm if norm > 1.0 else np.zeros_like(grey)
