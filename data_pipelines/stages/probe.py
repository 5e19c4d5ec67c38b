"""Probe: read the streams of a source, and refuse what is not a usable video or larger than the limits."""

from __future__ import annotations

from pathlib import Path

from data_pipelines.rows import Rejected, Row, Unusable
from data_pipelines.video import Header, Probed
from data_pipelines.workspace import Workspace
from videofm.config.curation_stages import ProbeConfig


class ProbeStage:
    """See `ProbeConfig`. Fills `Row.info`. What the header tells is checked before a frame is decoded."""

    name, requires, placement = "probe", (), "child"

    def __init__(self, config: ProbeConfig) -> None:
        self.config = config

    def process(self, row: Row, work: Workspace) -> list[Row]:
        if not Path(row.path).is_file():
            raise Unusable("missing", "the file vanished after it was listed")
        if row.num_bytes > self.config.max_bytes:
            raise Rejected("too_many_bytes", f"{row.num_bytes} bytes, at most {self.config.max_bytes}")
        probed = work.probe(self._admit)
        if row.promised_sha256 and row.promised_sha256 != probed.info.sha256:
            raise Unusable("checksum", f"its SHA-256 is {probed.info.sha256}, the list of sources says {row.promised_sha256}")
        self._check(probed)
        work.notes["more_video_streams"] += probed.header.num_video_streams > 1
        return [row.with_(info=probed.info)]

    def _admit(self, header: Header) -> None:
        """Limits that the header tells."""
        limits = self.config
        height, width = header.height, header.width
        if limits.codecs is not None and header.codec not in limits.codecs:
            raise Rejected("codec", f"{header.codec}, not one of {', '.join(limits.codecs)}")
        if header.num_streams > limits.max_streams:
            raise Rejected("too_many_streams", f"{header.num_streams} streams, at most {limits.max_streams}")
        if min(height, width) < limits.min_side:
            raise Rejected("too_small", f"{height}x{width}, at least {limits.min_side} a side")
        if max(height, width) > limits.max_side:
            raise Rejected("too_large", f"{height}x{width}, at most {limits.max_side} a side")
        if height * width > limits.max_pixels:
            raise Rejected("too_many_pixels", f"{height}x{width}, at most {limits.max_pixels} pixels")
        if max(height, width) > limits.max_aspect * min(height, width):
            raise Rejected("aspect", f"{height}x{width}, at most {limits.max_aspect:g} to 1")

    def _check(self, probed: Probed) -> None:
        """Limits that only counting the packets, or the first frame, tells."""
        limits, info = self.config, probed.info
        if probed.transfer:
            raise Rejected("hdr", f"high dynamic range, {probed.transfer}: there is no tone mapping here; convert it before")
        if info.duration > limits.max_duration:
            raise Rejected("too_long", f"{info.duration:.1f} s, at most {limits.max_duration:g} s")
        if info.num_frames < limits.min_frames:
            raise Rejected("too_few_frames", f"{info.num_frames} frames, at least {limits.min_frames}")
        if info.num_frames > limits.max_frames:
            raise Rejected("too_many_frames", f"{info.num_frames} frames, at most {limits.max_frames}")
        # Counted, and not what the header says: that may be anything.
        span = (probed.pts[-1] - probed.pts[0]) * probed.time_base
        fps = (info.num_frames - 1) / span if span > 0 else info.fps
        if info.num_frames > 1 and not limits.min_fps <= fps <= limits.max_fps:
            raise Rejected("frame_rate", f"{fps:.4g} frames a second, {limits.min_fps:g} to {limits.max_fps:g} are taken")
        decoded = info.num_frames * info.height * info.width * 3 / 2**30
        if decoded > limits.max_decoded_gib:
            raise Rejected("too_much_output", f"{decoded:.1f} GiB when decoded, at most {limits.max_decoded_gib:g}")
