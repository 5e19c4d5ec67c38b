"""The section about reading shards."""

from __future__ import annotations

from operator import attrgetter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from videofm.config.base import Section, execution
from videofm.config.buckets import BucketsConfig, PackingConfig
from videofm.config.cache import CacheConfig, OnlineConfig
from videofm.config.pairs import PairsConfig
from videofm.config.reading import ReadingConfig


class MixSourceConfig(Section):
    """One of several datasets that are read together."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_-]{1,40}$",
        description="Stands before its samples' ids, in the state and in messages: letters, digits, _ and -.",
    )
    manifest: str = Field(description="Folder of shards that `videofm curate` or `videofm data index` wrote.")
    weight: float = Field(
        gt=0,
        description="Share of this dataset, relative to the other weights: of the samples, or with data.buckets of the steps, "
        "which cost about the same each.",
    )
    split: Literal["train", "held_out"] | None = Field(None, description="Which clips to read; null takes data.split.")
    view: str | None = Field(None, description="YAML file of a view; null takes data.view.")


class DataConfig(Section):
    """What the trainer reads. The order of samples is a function of this section, `seed` and the manifests alone."""

    manifest: str | None = Field(
        None,
        description="Folder of shards that `videofm curate` or `videofm data index` wrote. Exactly one of manifest and mix.",
    )
    mix: list[MixSourceConfig] | None = Field(
        None, min_length=1, description="Several datasets, in place of manifest, each with its share."
    )
    pairs: PairsConfig | None = Field(
        None,
        description="Pairs of clips of manifest of which one is preferred, for objectives that compare them; null reads "
        "single clips.",
    )
    split: Literal["train", "held_out"] = Field("train", description="Which clips to read.")
    view: str | None = Field(
        None, description="YAML file of a view: rules over scores and facts, and only clips that pass are read. null reads all."
    )
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
    micro_batch_size: int = Field(ge=1, description="Clips of one micro-batch; with pairs, its pairs.")
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
    packing: PackingConfig | None = Field(
        None,
        description="Packs of clips of several sizes of `buckets`, in place of micro-batches of one size each; only objective "
        "flow_matching takes them. null packs nothing.",
    )
    window_shards: int = Field(256, ge=1, description="Shards that are shuffled together.")
    decoder: Literal["auto", "torchcodec", "pyav", "decord"] = Field("auto", description="`auto` takes the first that works.")
    num_workers: int = execution(0, ge=0, description="Decoding processes of a rank; 0 decodes in the training process.")
    cache_mib: int = execution(
        0, ge=0, description="Memory for decoded clips in each decoding process, in MiB; 0 decodes each time."
    )
    verify_checksums: bool = execution(
        True, description="Check the SHA-256 of every clip as it is read (`videofm data verify` checks whole shards)."
    )

    start: Literal["random", "first", "centre"] = Field(
        "random",
        description="Which frames of a longer clip: drawn for each clip and epoch, or the first, or those in the middle.",
    )
    cache: CacheConfig | None = Field(
        None, description="Latents, tokens and text embeddings from sidecars of `videofm encode`; null encodes in each step."
    )
    online: OnlineConfig | None = Field(
        None, description="A pool of actors that decode and encode for the trainers; null does it in each step."
    )
    reading: ReadingConfig = Field(ReadingConfig(), description="Time limits, the local copy of remote shards, damaged clips.")

    @property
    def mean_step_samples(self) -> float:
        """Samples of an optimizer step over all ranks, videos and images or pairs, on average over steps; without `buckets`,
        whose steps differ by what clips there are."""
        images = self.image_micro_batch_size or self.micro_batch_size
        return self.num_micro_batches * ((1 - self.image_share) * self.micro_batch_size + self.image_share * images)

    @property
    def mean_step_clips(self) -> float:
        """Clips of an optimizer step: a sample is one, a pair two."""
        return self.mean_step_samples * (1 if self.pairs is None else 2)

    @property
    def sources(self) -> list[MixSourceConfig]:
        """The datasets, with nothing left to be taken from elsewhere; that of `manifest` is named `data`."""
        if self.mix is None:
            assert self.manifest is not None
            return [MixSourceConfig(name="data", manifest=self.manifest, weight=1.0, split=self.split, view=self.view)]
        return [
            source.model_copy(update={"split": source.split or self.split, "view": source.view or self.view})
            for source in self.mix
        ]

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> DataConfig:
        if (self.manifest is None) == (self.mix is None):
            has = "neither" if self.mix is None else "both"
            raise ValueError(f"{has} of manifest and mix is given; name one folder of shards in manifest, or several in mix")
        names = [source.name for source in self.mix or []]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"mix names {', '.join(twice)} twice; the position of a run is kept by name")
        return self

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
    def _fits_pairs(self) -> DataConfig:
        if self.pairs is None:
            return self
        whys = {
            "mix": (self.mix is not None, "keys are those of one dataset, name it in manifest"),
            "view": (self.view is not None, "pairs name the clips that are read"),
            "buckets": (self.buckets is not None, "pairs have clips of one size"),
            "packing": (self.packing is not None, "pairs have clips of one size"),
            "image_share": (self.image_share > 0, "pairs are of videos"),
            "online": (self.online is not None, "encode the clips once with `videofm encode`, and read them with cache"),
            "window_shards": (self.window_shards != 256, "all pairs of an epoch are shuffled together"),
        }
        if found := [f"{name} ({why})" for name, (is_set, why) in whys.items() if is_set]:
            raise ValueError(f"pairs does not go together with {', '.join(found)}; leave out what does not fit")
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

    @model_validator(mode="after")
    def _fits_packing(self) -> DataConfig:
        if self.packing is None:
            return self
        if self.buckets is None:
            raise ValueError(
                "packing takes its sizes from buckets: give data.buckets with sizes and token, or leave packing out"
            )
        section = self.buckets
        idle = {
            "budget": section.budget is not None,
            "quadratic": section.quadratic > 0,
            "tolerance": section.tolerance > 0,
            "image_padding": section.image_padding,
            "seconds of sizes": any(size.seconds is not None for size in section.sizes),
        }
        if found := [name for name, is_set in idle.items() if is_set]:
            raise ValueError(
                f"buckets: {', '.join(found)} would have no effect with packing, whose packs are filled with tokens up to "
                "packing.num_tokens; leave them out"
            )
        return self

    @model_validator(mode="after")
    def _fits_cache(self) -> DataConfig:
        if self.cache is not None and self.online is not None:
            raise ValueError("both cache and online are given; latents come from one of them, leave the other out")
        if self.cache is not None:
            self.cache.check_sources([source.name for source in self.mix or []])
        self._check_idle()
        if self.cache is None or not self.cache.fixes_pixels:
            return self
        drawn = {
            "start: random (take first or centre)": self.start == "random",
            "crop: random (take centre or none)": self.crop == "random",
            f"frame_strides {self.frame_strides} (name one)": len(self.frame_strides) > 1,
            f"image_share {self.image_share:g} (set it to 0)": self.image_share > 0,
            "buckets.image_share (set it to 0)": self.buckets is not None and self.buckets.image_share > 0,
        }
        if found := [name for name, is_drawn in drawn.items() if is_drawn]:
            raise ValueError(
                f"cache.mode {self.cache.mode} holds one window of each clip, and other pixels would be drawn by "
                f"{', '.join(found)}"
            )
        return self

    def _check_idle(self) -> None:
        """Refuse what only decoding processes of the rank would read, where it has none; a held-out loss decodes without."""
        if self.online is not None:
            why = "online decodes and encodes in its actors, which check every clip"
            idle: dict[str, Any] = {
                "num_workers": 0,
                "verify_checksums": True,
                "reading.prefetch_mib": ReadingConfig.model_fields["prefetch_mib"].default,
            }
        elif self.cache is not None and self.cache.fixes_pixels:
            why = f"cache.mode {self.cache.mode} decodes no clip for a step"
            names = ("decode_timeout", "clips_per_worker", "prefetch_mib")
            idle = {"num_workers": 0} | {f"reading.{name}": ReadingConfig.model_fields[name].default for name in names}
        else:
            return
        found = {name: attrgetter(name)(self) for name in idle}
        if changed := [f"{name} {found[name]}" for name, default in idle.items() if found[name] != default]:
            raise ValueError(f"{why}: {', '.join(changed)} would have no effect; leave it out")
