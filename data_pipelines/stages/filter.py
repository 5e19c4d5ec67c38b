"""Filter: drop clips that hardly move, or are too dark or too bright. The scores of kept clips are stored."""

from __future__ import annotations

from data_pipelines.rows import Rejected, Row
from data_pipelines.workspace import Workspace
from videofm.config.curation_stages import FilterConfig


class FilterStage:
    """See `FilterConfig`. Scores `motion` and `brightness`, both in [0, 1]."""

    name, requires, barrier = "filter", (), False

    def __init__(self, config: FilterConfig) -> None:
        self.config = config

    def process(self, row: Row, work: Workspace) -> list[Row]:
        scan, limits = work.scan(), self.config
        brightness = float(scan.brightness[row.start : row.stop].mean())
        changes = scan.motion[row.start : row.stop][1:]  # the first change is the cut itself
        motion = float(changes.mean()) if len(changes) else 0.0
        if brightness < limits.min_brightness:
            raise Rejected("too_dark", f"brightness {brightness:.4f}, at least {limits.min_brightness}")
        if brightness > limits.max_brightness:
            raise Rejected("too_bright", f"brightness {brightness:.4f}, at most {limits.max_brightness}")
        if motion < limits.min_motion:
            raise Rejected("static", f"motion {motion:.5f}, at least {limits.min_motion}")
        return [row.with_(scores={**row.scores, "motion": round(motion, 6), "brightness": round(brightness, 6)})]
