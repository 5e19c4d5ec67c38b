"""Scores: what can be measured of a clip without a model. All are stored; `filter` and views decide later.

- `motion`: mean absolute change between neighbouring frames, over pixels and colours; 0 still, 1 black to white.
- `brightness`: mean luminance; 0 black, 1 white.
- `flow_mean`, `flow_max`, `flow_min`: length of motion vectors (Farneback), mean over the picture; then over sampled frames.
  In shorter sides of the picture a second, from 0: it does not depend on size or frame rate.
- `blur`: variance of the Laplacian at 360 pixels, median of sampled frames; from 0. **Low is blurred**, 100 and more is sharp.
- `saturation_mean`, `saturation_max`, `saturation_min`: mean saturation (HSV) of a frame; then over frames. 0 grey, 1 pure.
- `dark_share`, `bright_share`: share of pixels that are clipped dark or bright; 0 to 1.
- `static_share`: share of frames that hardly differ from the one before (`static_change`); near 1 is a still or a slideshow.
- `duplicate_share`: share of frames that equal the one before but for 1/10,000; 0.5 where every frame comes twice.
- `flash`: largest jump of mean luminance between neighbouring frames; 0 to 1.
- `text_area`: share of the picture that looks like writing, mean of sampled frames; a weak proxy, off by default.

The feature `phash` holds the perceptual hashes of 8 evenly spaced frames (8 uint64), for `near_dup`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from data_pipelines.rows import Row, pack_array
from data_pipelines.scan import Scan, Wanted
from data_pipelines.workspace import Workspace
from videofm.config.curation_stages import ScoresConfig

NUM_HASHES = 8
_DUPLICATE_CHANGE = 1e-4


class ScoresStage:
    """See `ScoresConfig`. Fills `Row.scores` and the feature `phash`."""

    name, requires, placement = "scores", (), "child"

    def __init__(self, config: ScoresConfig) -> None:
        self.config = config

    def prepare(self, work: Workspace) -> None:
        """Say what the scan of the source shall find."""
        work.want(Wanted(scores=True, text=self.config.text, samples_per_second=self.config.samples_per_second))

    def process(self, row: Row, work: Workspace) -> list[Row]:
        self.prepare(work)
        part = work.scan_of(row)
        scores = {name: round(float(value), 6) for name, value in self._scores(part).items()}
        hashes = part.hashes[evenly_spaced(len(part.hashes))]
        features = {**row.features, "phash": pack_array(hashes.astype("<u8"))}
        return [row.with_(stop=row.start + len(part.times), scores={**row.scores, **scores}, features=features)]

    def _scores(self, part: Scan) -> dict[str, Any]:
        change, flow = part.motion[1:], part.flow[np.isfinite(part.flow)]
        if not len(change):  # a single frame: a picture does not move
            change = np.zeros(1)
        if not len(flow):
            flow = np.zeros(1)
        jumps = np.abs(np.diff(part.brightness))
        scores = {
            "motion": change.mean(), "brightness": part.brightness.mean(),
            "flow_mean": flow.mean(), "flow_max": flow.max(), "flow_min": flow.min(),
            "blur": np.median(part.sharpness),
            "saturation_mean": part.saturation.mean(), "saturation_max": part.saturation.max(),
            "saturation_min": part.saturation.min(),
            "dark_share": part.dark.mean(), "bright_share": part.bright.mean(),
            "static_share": (change < self.config.static_change).mean(), "duplicate_share": (change < _DUPLICATE_CHANGE).mean(),
            "flash": jumps.max() if len(jumps) else 0.0,
        }  # fmt: skip
        if self.config.text:
            scores["text_area"] = part.text.mean()
        return scores


def evenly_spaced(num_frames: int) -> np.ndarray[Any, Any]:
    """Indices of `NUM_HASHES` frames, evenly spaced within `num_frames`, each in the middle of its part."""
    return np.asarray((np.arange(NUM_HASHES) * 2 + 1) * num_frames // (2 * NUM_HASHES))
