"""Borders: find the picture inside black borders. What is stored, and what later stages score, is that picture."""

from __future__ import annotations

import numpy as np

from data_pipelines.measures import WHOLE, Array, Box, area, union
from data_pipelines.rows import Rejected, Row
from data_pipelines.scan import Wanted
from data_pipelines.workspace import Workspace
from videofm.config.curation_stages import BordersConfig

_WINDOWS = 3
_LEAST = 0.01
"""A border of less than this share of the side is none."""


class BordersStage:
    """See `BordersConfig`. Fills `Row.border` and the score `border_share`, the share of the picture that is border."""

    name, requires, placement = "borders", (), "child"

    def __init__(self, config: BordersConfig) -> None:
        self.config = config

    def prepare(self, work: Workspace) -> None:
        """Say what the scan of the source shall find."""
        work.want(Wanted(borders=True, samples_per_second=self.config.samples_per_second))

    def process(self, row: Row, work: Workspace) -> list[Row]:
        self.prepare(work)
        scan = work.scan()
        part = scan.part(row.start, row.stop if row.stop is not None else len(scan.times))
        box = self._steady(part.edges, scan.box)
        if _apart(box, scan.box) <= self.config.tolerance:
            box = scan.box  # the border that all of the source has: what was measured within it holds
        if _apart(box, WHOLE) < _LEAST:
            box = WHOLE
        share = 1 - area(box)
        if share > self.config.max_share:
            raise Rejected("mostly_border", f"{share:.0%} of the picture is black border, at most {self.config.max_share:.0%}")
        work.notes["with_border"] += box != WHOLE
        border = None if box == WHOLE else work.border_of(box)
        return [row.with_(border=border, scores={**row.scores, "border_share": round(share, 6)})]

    def _steady(self, edges: Array, otherwise: Box) -> Box:
        """The box of a clip, from the edges `(S, 4)` of sampled frames: all windows of it must agree.

        Raises:
            Rejected: they do not, so that no crop would be right for the whole clip.
        """
        whole = union(edges, otherwise)
        windows = [union(part, whole) for part in np.array_split(edges, _WINDOWS)]
        worst = max(_apart(window, whole) for window in windows)
        if worst > self.config.tolerance:
            raise Rejected("changing_border", f"an edge moves by {worst:.0%} of the side, at most {self.config.tolerance:.0%}")
        return whole


def _apart(a: Box, b: Box) -> float:
    """How far the edges of two boxes lie apart, at most."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
