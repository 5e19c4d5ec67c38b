"""Probe: read the streams of a source, and refuse what is not a usable video or larger than the limits."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.rows import Rejected, Row, Unusable
from data_pipelines.workspace import Workspace
from videofm.config.curation_stages import ProbeConfig


class ProbeStage:
    """See `ProbeConfig`. Fills `Row.info`."""

    name, requires, barrier = "probe", (), False

    def __init__(self, config: ProbeConfig) -> None:
        self.config = config

    def process(self, row: Row, work: Workspace) -> list[Row]:
        limits = self.config
        if not Path(row.path).is_file():
            raise Unusable("missing", "the file vanished after it was listed")
        if row.num_bytes > limits.max_bytes:
            raise Rejected("too_many_bytes", f"{row.num_bytes} bytes, at most {limits.max_bytes}")
        info = work.info()
        if info.height * info.width > limits.max_pixels:
            raise Rejected("too_many_pixels", f"{info.height}x{info.width}, at most {limits.max_pixels} pixels")
        if min(info.height, info.width) < limits.min_side:
            raise Rejected("too_small", f"{info.height}x{info.width}, at least {limits.min_side} a side")
        if info.duration > limits.max_duration:
            raise Rejected("too_long", f"{info.duration:.1f} s, at most {limits.max_duration:g} s")
        if info.num_frames < limits.min_frames:
            raise Rejected("too_few_frames", f"{info.num_frames} frames, at least {limits.min_frames}")
        return [row.with_(info=info)]
