"""Sections about data: rendering the demo set, curating raw video, reading shards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from videofm.config.base import Section, execution
from videofm.config.buckets import BucketsConfig


class DemoDataConfig(Section):
    """Render a small captioned set of moving shapes as real H.264 files, with the broken files that curation must catch."""

    kind: Literal["demo_data"]
    num_videos: int = Field(192, ge=1, description="Ordinary source files to render; each holds several shots.")
    shots_per_video: int = Field(4, ge=1, description="Shots (one caption each) in a source file.")
    num_frames: int = Field(24, ge=2, description="Frames of a shot.")
    size: int = Field(32, ge=16, multiple_of=2, description="Height and width of the frames, in pixels.")
    fps: int = Field(25, ge=1, description="Frames a second.")
    broken: bool = Field(True, description="Also write static, black, duplicate, truncated and audio-only files.")
    seed: int = Field(0, description="The set is a function of this seed and the fields above.")


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


CurationStage = Annotated[
    ProbeConfig | DedupConfig | SplitConfig | FilterConfig | CaptionConfig | TranscodeConfig, Field(discriminator="kind")
]


class EngineConfig(Section):
    """How the Ray engine runs: workers, limits, retries."""

    num_workers: int | None = execution(None, ge=1, description="Tasks at once; null takes every CPU of the Ray cluster.")
    address: str | None = execution(None, description="Ray cluster to join; null starts one local node on loopback.")
    group_size: int = Field(32, ge=1, description="Sources of a group; a group becomes one shard.")
    task_memory_mib: int = execution(1024, ge=64, description="Memory that a child process may use, in MiB.")
    task_timeout: float = execution(120.0, gt=0, description="Longest time for one source in one stage, in seconds.")
    max_attempts: int = execution(2, ge=1, description="Crashes after which a source is quarantined.")
    object_store_mib: int = execution(128, ge=80, description="Shared memory of a local Ray node, in MiB (rows carry paths).")


class CurateConfig(Section):
    """Raw video files -> webdataset shards with an index and a manifest."""

    kind: Literal["curate"]
    source: str = Field(description="Folder that holds the raw videos; searched recursively.")
    stages: list[CurationStage] = Field(min_length=1, description="What each source passes through, in order.")
    held_out: float = Field(0.1, ge=0, lt=1, description="Share of the sources whose clips go to the split `held_out`.")
    engine: EngineConfig = Field(EngineConfig(), description="How the Ray engine runs.")


class DataConfig(Section):
    """What the trainer reads. The order of samples is a function of this section, `seed` and the manifest alone."""

    manifest: str = Field(description="Folder of shards that `videofm curate` wrote.")
    split: Literal["train", "held_out"] = Field("train", description="Which clips to read.")
    num_frames: int = Field(ge=1, description="Frames of a training clip; shorter stored clips are not used.")
    frame_strides: list[Annotated[int, Field(ge=1)]] = Field(
        [1],
        min_length=1,
        description="Steps, in stored frames, from one frame of a training clip to the next. Each clip draws uniformly from "
        "those that fit its length, and its fps is divided by the draw.",
    )
    height: int = Field(ge=8, description="Height of a training clip, in pixels.")
    width: int = Field(ge=8, description="Width of a training clip, in pixels.")
    resize_short_side: int | None = Field(
        None,
        ge=8,
        description="Resize frames (antialiased) so that their shorter side has so many pixels, before the crop; clips stored "
        "smaller are not used. null keeps the stored size.",
    )
    crop: Literal["none", "random", "centre"] = Field(
        "none",
        description="Window of height x width that is cut from the frames of a clip: its place is drawn for each clip, or is "
        "the centre. `none` uses only clips of exactly that size.",
    )
    micro_batch_size: int = Field(ge=1, description="Clips of one micro-batch.")
    num_micro_batches: int = Field(
        1, ge=1, description="Micro-batches of an optimizer step over all ranks (G). parallel.data_degree must divide it."
    )
    image_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the micro-batches that hold images: clips of one frame, drawn from all frames of a stored clip. "
        "The loss is the mean over all samples of a step, images and videos alike.",
    )
    image_micro_batch_size: int | None = Field(
        None, ge=1, description="Images of a micro-batch of images; null takes micro_batch_size."
    )
    buckets: BucketsConfig | None = Field(
        None,
        description="Mixed lengths, resolutions and aspects; num_frames x height x width is then the main one of several "
        "sizes, and micro_batch_size the clips of that size in a micro-batch. null trains on one size.",
    )
    window_shards: int = Field(256, ge=1, description="Shards that are shuffled together.")
    decoder: Literal["auto", "torchcodec", "pyav", "decord"] = Field("auto", description="`auto` takes the first that works.")
    num_workers: int = execution(0, ge=0, description="Decoding processes of a rank; 0 decodes in the training process.")
    cache_mib: int = execution(
        0, ge=0, description="Memory for decoded clips in each decoding process, in MiB; 0 decodes each time."
    )
    verify_checksums: bool = execution(True, description="Check the SHA-256 of every shard once before the first step.")

    @property
    def mean_step_samples(self) -> float:
        """Samples of an optimizer step over all ranks, videos and images, on average over steps; without `buckets`, whose
        steps differ by what clips there are."""
        images = self.image_micro_batch_size or self.micro_batch_size
        return self.num_micro_batches * ((1 - self.image_share) * self.micro_batch_size + self.image_share * images)

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        if len(set(self.frame_strides)) < len(self.frame_strides):
            raise ValueError(f"frame_strides {self.frame_strides} names a stride twice; each has the same chance, list it once")
        if self.image_micro_batch_size is not None and self.image_share == 0:
            raise ValueError(
                f"image_micro_batch_size {self.image_micro_batch_size} has no effect while image_share is 0; "
                "set image_share, or leave it out"
            )
        if self.resize_short_side is not None and self.resize_short_side < min(self.height, self.width):
            raise ValueError(
                f"resize_short_side {self.resize_short_side} leaves no room for frames of {self.height}x{self.width}; "
                f"take at least {min(self.height, self.width)}"
            )
        return self

    @model_validator(mode="after")
    def _fits_buckets(self) -> DataConfig:
        if self.buckets is None:
            return self
        main = f"{self.num_frames}x{self.height}x{self.width}"
        if main not in (sizes := [str(size) for size in self.buckets.sizes]):
            raise ValueError(f"the main size {main} is not among buckets.sizes {', '.join(sizes)}; add it, or name one of them")
        if self.image_share:
            raise ValueError(
                f"image_share {self.image_share} counts micro-batches of one size; with buckets set buckets.image_share, a "
                "share of the videos, and leave it out"
            )
        if self.resize_short_side is not None:
            raise ValueError(
                f"resize_short_side {self.resize_short_side} has no effect with buckets: each resizes frames until they just "
                "cover its height and width; leave it out"
            )
        return self
