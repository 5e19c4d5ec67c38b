"""Sections of the curation stages that work without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from videofm.config.base import Section

MEASURED = (
    "motion", "brightness", "flow_mean", "flow_max", "flow_min", "blur", "saturation_mean", "saturation_max", "saturation_min",
    "dark_share", "bright_share", "static_share", "duplicate_share", "flash",
)  # fmt: skip
"""Scores that the stage `scores` always gives; `data_pipelines/stages/scores.py` says what each means."""


class ProbeConfig(Section):
    """Open each source in a child process, read its streams, and refuse what is not a usable video or beyond the limits."""

    kind: Literal["probe"] = "probe"
    max_bytes: int = Field(8 << 30, gt=0, description="Largest source file, in bytes.")
    max_pixels: int = Field(36_000_000, gt=0, description="Largest frame, in pixels.")
    max_side: int = Field(8192, gt=0, description="Largest height or width, in pixels.")
    min_side: int = Field(16, gt=0, description="Smallest height or width, in pixels.")
    max_aspect: float = Field(4.0, ge=1, description="Largest ratio of the longer side to the shorter one.")
    max_duration: float = Field(6 * 3600.0, gt=0, description="Longest source, in seconds.")
    min_frames: int = Field(2, ge=1, description="Fewest frames of a source.")
    max_frames: int = Field(2_000_000, ge=1, description="Most frames of a source.")
    min_fps: float = Field(1.0, ge=0, description="Fewest frames a second, counted over the whole source.")
    max_fps: float = Field(240.0, gt=0, description="Most frames a second, counted over the whole source.")
    max_streams: int = Field(32, ge=1, description="Most streams of a source, of all kinds.")
    max_decoded_gib: float = Field(
        16384.0, gt=0, description="Most that its frames may come to when decoded (frames x height x width x 3 bytes), in GiB."
    )
    codecs: list[str] | None = Field(
        None, description="Codecs to take, by FFmpeg's names (h264, hevc, av1, ...); null for all whose decoders may run."
    )

    @model_validator(mode="after")
    def _ordered(self) -> ProbeConfig:
        for low, high in (("min_side", "max_side"), ("min_frames", "max_frames"), ("min_fps", "max_fps")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} is above {high} {getattr(self, high)}: no source could pass")
        return self


class DedupConfig(Section):
    """Drop sources whose bytes or whose video packets equal those of a source that sorts before them."""

    kind: Literal["dedup"] = "dedup"


class SplitConfig(Section):
    """Cut sources into shots, at every cut that one of PySceneDetect's detectors finds, and long shots into clips."""

    kind: Literal["split"] = "split"
    adaptive: float | None = Field(
        3.5, gt=0, description="Change of content against its neighbourhood that makes a cut (AdaptiveDetector); null for off."
    )
    window_width: int = Field(3, ge=1, description="Frames before and after that are the neighbourhood of `adaptive`.")
    histogram: float | None = Field(
        0.2, gt=0, le=1, description="Change of the histogram of luminance that makes a cut (HistogramDetector); null for off."
    )
    content: float | None = Field(
        None,
        gt=0,
        description="Change of content between two frames that makes a cut (ContentDetector, usually 27); null for off.",
    )
    black: float | None = Field(
        None, ge=0, lt=1, description="Frames of at most this mean luminance (1 = white) are cut out, as gaps; null keeps them."
    )
    edge_trim: int = Field(0, ge=0, description="Frames cut off both ends of a shot, against blends and flashes at the cut.")
    min_frames: int = Field(9, ge=1, description="Shortest clip, in frames.")
    max_frames: int = Field(256, ge=1, description="Longest clip, in frames; longer shots become several clips.")
    min_seconds: float = Field(0.0, ge=0, description="Shortest clip, in seconds; both limits hold.")
    max_seconds: float | None = Field(None, gt=0, description="Longest clip, in seconds; null for `max_frames` alone.")

    @model_validator(mode="after")
    def _ordered(self) -> SplitConfig:
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_frames {self.min_frames} is above max_frames {self.max_frames}: no clip could be cut")
        if self.max_seconds is not None and self.min_seconds > self.max_seconds:
            raise ValueError(f"min_seconds {self.min_seconds} is above max_seconds {self.max_seconds}: no clip could be cut")
        return self


class BordersConfig(Section):
    """Find black borders (letterbox, pillarbox); scores and the stored clip then are of the picture inside them."""

    kind: Literal["borders"] = "borders"
    samples_per_second: float = Field(4.0, gt=0, description="How often a frame is looked at, per second of video.")
    tolerance: float = Field(
        0.03,
        ge=0,
        lt=0.5,
        description="How far an edge may wander within a clip, as a share of the side; beyond, it is dropped.",
    )
    max_share: float = Field(0.6, gt=0, lt=1, description="Largest share of the picture that borders may take.")

    def score_names(self) -> tuple[str, ...]:
        """The scores that this stage gives."""
        return ("border_share",)


class ScoresConfig(Section):
    """Measure every clip: motion, flow, brightness, exposure, saturation, sharpness, still and repeated frames, flashes."""

    kind: Literal["scores"] = "scores"
    samples_per_second: float = Field(
        4.0, gt=0, description="How often flow, sharpness and text are measured, per second of video."
    )
    static_change: float = Field(
        0.001, ge=0, le=1, description="A frame counts as still when it changes by less since the one before; 1 = full range."
    )
    text: bool = Field(False, description="Also `text_area`, a weak classical proxy for writing on screen.")

    def score_names(self) -> tuple[str, ...]:
        """The scores that this stage gives."""
        return MEASURED + (("text_area",) if self.text else ())


class FilterRule(Section):
    """Bounds of one score. A clip outside of them is dropped; one without the score stops the run, it never passes."""

    score: str = Field(description="Name of the score, as the index has it without `score_`.")
    min: float | None = Field(None, description="Smallest value that passes, in the unit of the score; null for none.")
    max: float | None = Field(None, description="Largest value that passes, in the unit of the score; null for none.")
    reason: str = Field(pattern=r"^[a-z0-9_]+$", description="What the funnel calls clips that this rule drops.")

    @model_validator(mode="after")
    def _ordered(self) -> FilterRule:
        if self.min is None and self.max is None:
            raise ValueError(f"the rule on {self.score!r} has neither min nor max: it would pass everything")
        if self.min is not None and self.max is not None and self.min >= self.max:
            raise ValueError(f"min {self.min} must be below max {self.max}: no clip could pass the rule on {self.score!r}")
        return self


_RULES = (
    FilterRule(score="brightness", min=0.02, reason="too_dark"),
    FilterRule(score="brightness", max=0.98, reason="too_bright"),
    FilterRule(score="motion", min=0.0005, reason="static"),
    FilterRule(score="static_share", max=0.95, reason="static"),
)


class FilterConfig(Section):
    """Drop clips by their scores. Scores of every kept clip are stored, so most filtering is better left to a view."""

    kind: Literal["filter"] = "filter"
    rules: list[FilterRule] = Field(
        list(_RULES), min_length=1, description="Rules, in order; the first that a clip breaks names the reason."
    )


class NearDupConfig(Section):
    """Of clips that look alike (copies that were scaled, re-encoded, cut a little), keep the one of the highest resolution."""

    kind: Literal["near_dup"] = "near_dup"
    max_distance: int = Field(8, ge=0, le=31, description="Bits, of 64, in which the hashes of two frames may differ.")
    min_frames: int = Field(6, ge=1, le=8, description="Frames, of 8 evenly spaced ones, that must look alike.")
    within_source: bool = Field(True, description="Also compare clips of one source with each other.")


class CaptionConfig(Section):
    """Attach captions: from the list of sources, or from sidecars (`NAME.txt .json .jsonl .srt .vtt`; of local folders also
    `captions.jsonl`)."""

    kind: Literal["caption"] = "caption"
    missing: Literal["empty", "drop"] = Field("empty", description="What becomes of a clip without a caption.")


class TranscodeConfig(Section):
    """Re-encode each clip to the canonical form: H.264, constant frame rate, short closed GOPs, even sizes, no audio."""

    kind: Literal["transcode"] = "transcode"
    height: int | None = Field(None, ge=16, multiple_of=2, description="Height of the stored frames, in pixels; with `width`.")
    width: int | None = Field(None, ge=16, multiple_of=2, description="Width of the stored frames, in pixels; with `height`.")
    short_side: int | None = Field(
        None,
        ge=16,
        multiple_of=2,
        description="Shorter side of the stored frames, in pixels, in place of both: keeps the aspect.",
    )
    upscale: bool = Field(
        False,
        description="Enlarge pictures that are too small. Without, `short_side` keeps their size, and a fixed size drops them.",
    )
    fps: float | None = Field(
        None, gt=0, description="Frames a second of the stored clip; null keeps the mean rate of the source."
    )
    min_frames: int = Field(9, ge=1, description="Clips with fewer frames after resampling are dropped.")
    gop: int = Field(24, ge=1, description="Frames between key frames.")
    preset: Literal["ultrafast", "veryfast", "fast", "medium", "slow"] = Field(
        "medium",
        description="x264 preset: how much time to spend on small files; the slower the smaller.",
    )
    crf: int = Field(16, ge=0, le=51, description="x264 constant rate factor; 0 is lossless, larger is smaller.")

    @model_validator(mode="after")
    def _one_size(self) -> TranscodeConfig:
        fixed = (self.height is not None) + (self.width is not None)
        if (fixed, self.short_side is None) not in ((2, True), (0, False)):
            raise ValueError("give either height and width, or short_side: the size of the stored frames")
        return self


def check_scores(stages: Sequence[Any]) -> None:
    """Check that every rule of a filter is on a score that a stage before it gives.

    Raises:
        ValueError: one is not; the message lists the scores that there are.
    """
    made: list[str] = []
    unknown = False
    for section in stages:
        for rule in getattr(section, "rules", ()):
            if rule.score not in made and not unknown:
                there = ", ".join(made) or "none; put the stage `scores` before it"
                raise ValueError(f"the filter has a rule on {rule.score!r}, which no stage before it gives. There are: {there}")
        if hasattr(section, "score_names"):
            made += section.score_names()
        else:  # a model that does not say what it scores: then `filter` checks when it meets a clip
            unknown |= hasattr(section, "model")
