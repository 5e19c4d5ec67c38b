"""The section about mixed sizes: which sizes clips are brought to, and what a clip of each costs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from videofm.config.base import Section


class BucketSizeConfig(Section):
    """One size of training clips."""

    num_frames: int = Field(ge=1, description="Frames; 1 is an image.")
    height: int = Field(ge=8, description="Height, in pixels.")
    width: int = Field(ge=8, description="Width, in pixels.")
    seconds: float | None = Field(
        None,
        gt=0,
        description="Measured time that one clip of this size adds to a step, in seconds. Where every size has one, they take "
        "the place of the modelled cost.",
    )

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


class TokenConfig(Section):
    """Frames and pixels for one token: the compression of the VAE times the patch of the DiT."""

    num_frames: float = Field(
        ge=1, description="Frames; a clip has ceil(num_frames / this) tokens in time: 8 for 1 + 8 n frames, 17/3 for 17 n."
    )
    height: int = Field(ge=1, description="Height, in pixels.")
    width: int = Field(ge=1, description="Width, in pixels.")


class BucketsConfig(Section):
    """Mixed lengths, resolutions and aspects. Each micro-batch has one size, and as many clips as a budget of cost holds; all
    micro-batches of a step cost the same.

    A clip goes to one size. It is never enlarged, never shorter than the size asks, and loses at most `max_crop` of its frame
    to the window of `data.crop`. Of the sizes that allow this it takes: a video before an image, then one of the nearest
    aspect, then most frames, then the largest area.
    """

    sizes: list[BucketSizeConfig] = Field(
        min_length=1, description="The sizes, with num_frames x height x width of the section `data`, the main one, among them."
    )
    token: TokenConfig = Field(description="Frames and pixels for one token.")
    quadratic: float = Field(
        0.0,
        ge=0,
        description="A clip of L tokens costs L + quadratic * L^2, in tokens. For attention in a transformer of width D about "
        "1 / (7 D); 0 counts tokens.",
    )
    budget: float | None = Field(
        None,
        gt=0,
        description="Largest cost of a micro-batch, in tokens (in seconds where the sizes have them); null takes that of "
        "data.micro_batch_size clips of the main size.",
    )
    tolerance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Micro-batches of several sizes share a step where their costs differ by at most this share of the "
        "smallest; so long may one rank wait for another. 0 mixes equal costs only.",
    )
    aspect_tolerance: float = Field(
        0.1, ge=0, description="An aspect counts as the nearest where its ratio to the clip's is at most this share larger."
    )
    max_crop: float = Field(0.5, ge=0, lt=1, description="Largest share of a frame that the window may cut off.")
    image_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of the videos that are drawn as an image, one frame of them, in each epoch others."
    )
    image_padding: bool = Field(
        False,
        description="Give images to the steps of videos that cost less than the dearest, one a micro-batch at a time and "
        "always to the cheapest, until steps are even; what images are left get steps of their own.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> BucketsConfig:
        names = [str(size) for size in self.sizes]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sizes names {', '.join(twice)} twice")
        for size in self.sizes:
            if size.height % self.token.height or size.width % self.token.width:
                raise ValueError(
                    f"size {size} does not divide into tokens of {self.token.height}x{self.token.width} pixels; take the "
                    f"multiples near {_multiple(size.height, self.token.height)}x{_multiple(size.width, self.token.width)}"
                )
        measured = [size.seconds is not None for size in self.sizes]
        if any(measured) and not all(measured):
            missing = [name for name, has in zip(names, measured, strict=True) if not has]
            raise ValueError(f"seconds are given for some sizes and not for {', '.join(missing)}; give all or none")
        if all(measured) and self.quadratic:
            raise ValueError(f"quadratic {self.quadratic:g} has no effect while the sizes have measured seconds; leave one out")
        if (self.image_share or self.image_padding) and all(size.num_frames > 1 for size in self.sizes):
            raise ValueError("image_share and image_padding need a size of one frame; add one to sizes")
        return self


class PackingConfig(Section):
    """Packs in place of micro-batches of one size: clips of any sizes of `data.buckets` go through the model as one sequence,
    in which each sees itself and its own text alone. A step then has `data.num_micro_batches` packs, each about full."""

    num_tokens: int = Field(
        ge=1,
        description="Most tokens of a pack, counted by data.buckets.token. data.micro_batch_size is how many clips of the main "
        "size it holds.",
    )


def _multiple(pixels: int, of: int) -> int:
    return max(of, round(pixels / of) * of)
