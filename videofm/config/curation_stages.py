"""Sections of the curation stages that work without a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from videofm.config.base import Section


class ProbeConfig(Section):
    """Open each source in a child process, read its streams, and refuse what is not a usable video."""

    kind: Literal["probe"] = "probe"
    max_bytes: int = Field(8 << 30, gt=0, description="Largest source file, in bytes.")
    max_pixels: int = Field(36_000_000, gt=0, description="Largest frame, in pixels.")
    min_side: int = Field(16, gt=0, description="Smallest height or width, in pixels.")
    max_duration: float = Field(6 * 3600.0, gt=0, description="Longest source, in seconds.")
    min_frames: int = Field(2, ge=1, description="Fewest frames of a source.")


class DedupConfig(Section):
    """Drop sources whose bytes or whose video packets equal those of a source that sorts before them."""

    kind: Literal["dedup"] = "dedup"


class SplitConfig(Section):
    """Cut sources into shots (PySceneDetect) and long shots into clips."""

    kind: Literal["split"] = "split"
    threshold: float = Field(27.0, gt=0, description="Content change between frames that makes a cut (PySceneDetect's unit).")
    min_frames: int = Field(9, ge=1, description="Shortest clip, in frames.")
    max_frames: int = Field(256, ge=1, description="Longest clip, in frames; longer shots become several clips.")
    edge_trim: int = Field(0, ge=0, description="Frames cut off both ends of a shot, against blends and flashes at the cut.")


class FilterConfig(Section):
    """Drop clips that hardly move, or that are too dark or too bright. Scores of every clip are stored."""

    kind: Literal["filter"] = "filter"
    min_motion: float = Field(0.002, ge=0, le=1, description="Smallest mean absolute change between frames, 1 = full range.")
    min_brightness: float = Field(0.02, ge=0, le=1, description="Smallest mean luminance, 1 = white.")
    max_brightness: float = Field(0.98, ge=0, le=1, description="Largest mean luminance, 1 = white.")

    @model_validator(mode="after")
    def _ordered(self) -> FilterConfig:
        if self.min_brightness >= self.max_brightness:
            raise ValueError(
                f"min_brightness {self.min_brightness} must be below max_brightness {self.max_brightness}: no clip could pass"
            )
        return self


class CaptionConfig(Section):
    """Attach captions from sidecars: `NAME.txt`, `NAME.json` or `captions.jsonl` beside the source."""

    kind: Literal["caption"] = "caption"
    missing: Literal["empty", "drop"] = Field("empty", description="What becomes of a clip without a caption.")


class TranscodeConfig(Section):
    """Re-encode each clip to the canonical form: H.264, constant frame rate, short closed GOPs, even sizes, no audio."""

    kind: Literal["transcode"] = "transcode"
    height: int = Field(ge=16, multiple_of=2, description="Height of the stored frames, in pixels.")
    width: int = Field(ge=16, multiple_of=2, description="Width of the stored frames, in pixels.")
    fps: float = Field(gt=0, description="Frames a second of the stored clip.")
    min_frames: int = Field(9, ge=1, description="Clips with fewer frames after resampling are dropped.")
    gop: int = Field(24, ge=1, description="Frames between key frames.")
    crf: int = Field(16, ge=0, le=51, description="x264 constant rate factor; 0 is lossless, larger is smaller.")
