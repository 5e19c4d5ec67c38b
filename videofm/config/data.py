"""The section about reading shards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from videofm.config.base import Section, execution
from videofm.config.buckets import BucketsConfig


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
