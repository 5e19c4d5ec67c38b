"""The source that a child process works on: its facts, one scan of all its frames, and a reader that goes forward.

All stages of a source share one `Workspace`, so that a source is demuxed once for its facts, decoded once for cuts and scores
(at small size, frame by frame) and decoded once more for the clips: memory does not grow with the size of a picture times the
length of a video, only a few numbers a frame are kept. Where it is told a file for its scan, a later process of the same source
(behind a barrier) finds the scan there and does not decode again.

With a `span`, the frames whose time lies in it are the whole: indices count from the first of them.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data_pipelines import video
from data_pipelines.measures import WHOLE, Box
from data_pipelines.rows import Row, SourceInfo, Unusable
from data_pipelines.scan import CutDetector, Scan, Wanted, load_scan, measure, save_scan, still_box
from data_pipelines.video import Header, Probed
from videofm.data.decoders.pyav import Converter

_NUM_KEY_FRAMES = 8
"""Frames looked at for borders before the scan, so that it can measure within them."""


class Workspace:
    """The source at `path`, with a folder for clips. `notes` counts what is worth telling in the funnel.

    Args:
        path: the file.
        scratch: where clips are written.
        span: the part to work on, seconds `[from, to)` since the first frame; None for all of it.
        kept_scan: a file where the scan of an earlier process may lie, or None.
        keep: write the scan there for a later process.
    """

    def __init__(
        self,
        path: Path,
        scratch: Path,
        span: tuple[float, float] | None = None,
        kept_scan: Path | None = None,
        keep: bool = True,
    ) -> None:
        cv2.setNumThreads(1)  # the sum of floating-point numbers must not depend on the machine
        self.path, self.scratch, self.span, self.kept_scan, self.keep = path, scratch, span, kept_scan, keep
        self.notes: Counter[str] = Counter()
        self._wanted, self._detector = Wanted(), _no_detector
        self._probed: Probed | None = None
        self._scan: tuple[Scan, Wanted] | None = None
        self._reader: Iterator[tuple[int, Any]] | None = None
        self._position = 0
        self._to_rgb = Converter()

    def info(self) -> SourceInfo:
        """Facts by hashing and demuxing the file, without decoding more than one frame.

        Raises:
            Unusable: see `video.inspect`.
        """
        return self.probe().info

    def probe(self, admit: Callable[[Header], None] = lambda header: None) -> Probed:
        """As `info`, with more facts; `admit` is shown the header before anything is decoded, and may raise."""
        if self._probed is None:
            self._probed = video.inspect(self.path, admit)
        return self._probed

    def want(self, wanted: Wanted, detector: Callable[[], CutDetector | None] | None = None) -> None:
        """Say what the scan shall measure; what stages want adds up. `detector` makes the one that `wanted.cuts` describes."""
        self._wanted = self._wanted | wanted
        if detector is not None:
            self._detector = detector

    def scan(self) -> Scan:
        """Decode all frames once, and measure what stages want; the result is kept until more is wanted.

        Raises:
            Unusable: a frame does not decode.
        """
        wanted = self._wanted
        source = [self.path.stat().st_size, *(self.span or ())]
        if self._scan is None and self.kept_scan is not None:
            self._scan = load_scan(self.kept_scan, wanted, source)
        if self._scan is None or not self._scan[1].covers(wanted):
            box = self._border() if wanted.borders else WHOLE
            detector = self._detector() if wanted.cuts else None
            self._scan = measure(self._timed(0, None), wanted, self._stride(wanted), box, detector), wanted
            if self.kept_scan is not None and self.keep:
                save_scan(self.kept_scan, self._scan[0], wanted, source)
        return self._scan[0]

    def scan_of(self, row: Row) -> Scan:
        """The scan of a clip alone, within its border.

        The pass over the source serves it, unless the clip's border is not that of the source or no pair of its frames was
        sampled: then the frames of the clip are decoded once more.
        """
        scan = self.scan()
        stop = row.stop if row.stop is not None else len(scan.times)
        part, box, length = scan.part(row.start, stop), self._box_of(row), stop - row.start
        num_pairs = int(np.isfinite(part.flow).sum())
        if box == part.box and (num_pairs or (length == 1 and len(part.sampled))):
            return part
        wanted = replace(self._wanted, borders=False, cuts="")
        stride = self._stride(wanted) if num_pairs else max(1, length // 2)
        return measure(self._timed(row.start, stop), wanted, stride, box, phase=min(1, length - 1))

    def border_of(self, box: Box) -> tuple[int, int, int, int]:
        """A box as `Row.border`: top, left, height, width in pixels of the shown frame, all even where the frame is."""
        info = self.info()
        top, left = (2 * -int(-share * side / 2 // 1) for share, side in zip(box[:2], (info.height, info.width), strict=True))
        bottom, right = (2 * int(share * side / 2) for share, side in zip(box[2:], (info.height, info.width), strict=True))
        return top, left, bottom - top, right - left

    def frames(self, start: int, stop: int) -> Iterator[np.ndarray[Any, Any]]:
        """The frames `[start, stop)`, RGB uint8 `(H, W, 3)`, rotated as the file says. Cheap when calls go forward."""
        for _, frame in self._decoded(start, stop):
            if frame.rotation % 90:
                raise Unusable("odd_rotation", f"rotated by {frame.rotation} degrees")
            yield self._to_rgb(frame)

    def first_frame(self) -> int:
        """Index within the whole source of the frame that has index 0 here."""
        return self._bounds()[0]

    def _bounds(self) -> tuple[int, int | None]:
        """The frames of the span within the source."""
        if self.span is None:
            return 0, None
        probed = self.probe()
        since = [pts - probed.pts[0] for pts in probed.pts]
        edges = [bisect.bisect_left(since, edge / probed.time_base) for edge in self.span]
        return edges[0], edges[1]

    def _decoded(self, start: int, stop: int | None) -> Iterator[tuple[int, Any]]:
        """Frames with their index here; goes on from where the last call ended, if that is not behind it."""
        first, end = self._bounds()
        if self._reader is None or start < self._position:
            begin = first if self.span is None else first + start
            self._reader = video.decoded(self.path, begin, self.probe().pts if begin else None)
            self._position = begin - first
        while (stop is None or self._position < stop) and (end is None or self._position < end - first):
            found = next(self._reader, None)
            if found is None:
                if stop is None and end is None:
                    return
                raise Unusable("undecodable", f"the video ended at frame {self._position}, of {stop or end} that were promised")
            self._position = found[0] - first + 1
            if self._position > start:
                yield self._position - 1, found[1]

    def _timed(self, start: int, stop: int | None) -> Iterator[tuple[float, Any]]:
        for _, frame in self._decoded(start, stop):
            yield float(frame.pts * frame.time_base), frame

    def _stride(self, wanted: Wanted) -> int:
        fps = self.info().fps or 25.0
        return max(1, round(fps / wanted.samples_per_second)) if wanted.samples_per_second else 1

    def _border(self) -> Box:
        probed = self.probe()
        first, last = probed.pts[0] * probed.time_base, probed.pts[-1] * probed.time_base
        if self.span is not None:
            first, last = first + self.span[0], min(last, first + self.span[1])
        times = [first + (last - first) * (i + 0.5) / _NUM_KEY_FRAMES for i in range(_NUM_KEY_FRAMES)]
        return still_box(video.key_frames(self.path, times))

    def _box_of(self, row: Row) -> Box:
        """The part of the picture that counts for a row: the box of the scan, where that is what its border says."""
        if row.border is None:
            return WHOLE
        scan, info = self.scan(), self.info()
        if self.border_of(scan.box) == row.border:
            return scan.box
        top, left, height, width = row.border
        return top / info.height, left / info.width, (top + height) / info.height, (left + width) / info.width


def _no_detector() -> CutDetector | None:
    return None
