"""Split: cut a source into shots, and long shots into clips of nearly equal length."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from scenedetect.common import FrameTimecode
from scenedetect.detectors import ContentDetector

from data_pipelines.rows import Rejected, Row
from data_pipelines.workspace import Workspace
from videofm.config.curation_stages import SplitConfig


class SplitStage:
    """See `SplitConfig`."""

    name, requires, barrier = "split", (), False

    def __init__(self, config: SplitConfig) -> None:
        self.config = config

    def process(self, row: Row, work: Workspace) -> list[Row]:
        scan = work.scan(_SceneDetect(self.config.threshold))
        edges = [0, *scan.cuts, len(scan.times)]
        clips = []
        for start, stop in itertools.pairwise(edges):
            # Edges of the file itself are trimmed too: fades in and out sit there.
            start, stop = start + self.config.edge_trim, stop - self.config.edge_trim
            if stop - start < self.config.min_frames:
                work.notes["shots_too_short"] += 1
            else:
                clips += self._pieces(row, start, stop)
        work.notes["shots"] += len(edges) - 1
        if not clips:
            raise Rejected("too_short", f"no shot of {len(edges) - 1} has {self.config.min_frames} frames after trimming")
        return clips

    def _pieces(self, row: Row, start: int, stop: int) -> list[Row]:
        """A shot as clips of at most `max_frames`."""
        count = -(-(stop - start) // self.config.max_frames)
        bounds = [start + (stop - start) * i // count for i in range(count + 1)]
        return [row.with_(start=a, stop=b) for a, b in itertools.pairwise(bounds)]


class _SceneDetect:
    """PySceneDetect's content detector, fed frame by frame. Its own rule on short scenes is off: `min_frames` is ours."""

    def __init__(self, threshold: float) -> None:
        self.detector = ContentDetector(threshold=threshold, min_scene_len=0)

    def observe(self, index: int, frame: np.ndarray[Any, Any]) -> list[int]:
        # The detector compares neighbouring frames; the rate only labels its answer, so any rate will do.
        return [int(cut.frame_num) for cut in self.detector.process_frame(FrameTimecode(index, 25.0), frame)]
