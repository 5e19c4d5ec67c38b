"""The section of `videofm encode`: which clips are encoded, how they are cut, by which encoders, on what."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from videofm.config.actors import ActorsConfig
from videofm.config.base import Section, execution
from videofm.config.buckets import BucketsConfig


class EncoderConfig(Section):
    """A frozen encoder, named as the training names it in `models.vae` and `models.text_encoder`."""

    path: str | None = Field(None, description="Run, checkpoint or exported folder whose weights are loaded.")
    role: str | None = Field(None, description="Which role of `path` to load, where it holds several.")
    name: str | None = Field(None, description="Registered name, for an encoder that reads its folder by `overrides.path`.")
    size: str | None = Field(None, description="Named size of the model called `name`.")
    overrides: dict[str, Any] = Field({}, description="Fields of the model's own config to change, with `name`.")

    @model_validator(mode="after")
    def _has_weights(self) -> EncoderConfig:
        if (self.name is None) == (self.path is None):
            raise ValueError("give either `path` (load weights) or `name` with overrides.path, not both and not neither")
        if self.name is not None and not self.overrides.get("path"):
            raise ValueError(
                f"{self.name!r} would get fresh weights, which no training shares; give overrides.path, or take `path`"
            )
        return self


class LatentsConfig(Section):
    """Latents of a frozen video VAE."""

    vae: EncoderConfig = Field(description="The VAE, the same as `models.vae` of the training.")
    store: Literal["mean_logvar", "sample"] = Field(
        "mean_logvar",
        description="`mean_logvar` stores the posterior, which training samples anew each time; `sample` stores one sample, "
        "drawn with noise keyed by the clip, in half the bytes.",
    )
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="Type of the stored numbers.")
    precision: Literal["fp32", "bf16_autocast"] = Field("bf16_autocast", description="Type of the encoder's matrix products.")
    tile: int | None = Field(
        None, ge=16, description="Encode in square tiles of so many pixels a side; null encodes whole frames."
    )
    tile_overlap: int = Field(64, ge=0, description="Pixels that neighbouring tiles share; they are mixed linearly.")
    batch_size: int = Field(1, ge=1, description="Clips encoded together; a part of the result, to the last bit.")


class TextConfig(Section):
    """Embeddings of captions by a frozen text encoder, stored without padding."""

    encoder: EncoderConfig = Field(
        description="The text encoder, the same as `models.text_encoder` of the training; max_length is a field of its own "
        "config."
    )
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="Type of the stored numbers.")
    precision: Literal["fp32", "bf16_autocast"] = Field("bf16_autocast", description="Type of the encoder's matrix products.")
    batch_size: int = Field(8, ge=1, description="Captions encoded together.")


class RolloutsConfig(Section):
    """What an AR model makes of a clip's first token frames and its caption: the tokens that guide a model in sampling, with
    their errors."""

    run: str = Field(
        description="Run of objective next_token: its roles `ar` and `text_encoder` are loaded, averaged weights where it has "
        "them."
    )
    keep_frames: int = Field(1, ge=1, description="Token frames of the clip that begin its rollout; fewer than it has.")
    temperature: float = Field(1.0, ge=0, description="Divides the logits; 0 takes the likeliest token.")
    top_k: int = Field(0, ge=0, description="Only so many of the likeliest tokens are drawn from; 0 draws from all.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Only the likeliest tokens that together have this probability are drawn from."
    )
    guidance_scale: float = Field(1.0, ge=1, description="Classifier-free guidance of the logits; 1 is off.")


class TokensConfig(Section):
    """Indices of a frozen latent tokenizer, of the most likely latents of a frozen VAE."""

    tokenizer: EncoderConfig = Field(description="The tokenizer, the same as `models.tokenizer` of the training.")
    vae: EncoderConfig = Field(description="The VAE in whose normalised latents the tokenizer was trained.")
    precision: Literal["fp32", "bf16_autocast"] = Field(
        "bf16_autocast",
        description="Type of the matrix products of the VAE and the tokenizer; rollouts are drawn in that of their weights.",
    )
    tile: int | None = Field(
        None, ge=16, description="Encode by the VAE in square tiles of so many pixels a side; null encodes whole frames."
    )
    tile_overlap: int = Field(64, ge=0, description="Pixels that neighbouring tiles share; they are mixed linearly.")
    batch_size: int = Field(1, ge=1, description="Clips encoded together; a part of the result, to the last bit.")
    rollouts: RolloutsConfig | None = Field(None, description="Continuations by an AR model, stored beside; null makes none.")


class EncodeEngineConfig(ActorsConfig):
    """The Ray actors that encode; a shard is the unit of work."""

    decode_timeout: float = execution(
        60.0,
        gt=0,
        description="Longest time for decoding one clip, in seconds; then its decoding process is killed, and after a second "
        "time the clip is left out and named in failed.jsonl.",
    )


class EncodeConfig(Section):
    """Shards of clips -> sidecar shards of latents, tokens and text embeddings, for `data.cache` of a training.

    How clips are cut is said in the words of the section `data`; a training that reads the cache says the same there.
    """

    kind: Literal["encode"]
    manifest: str = Field(description="Folder of shards that `videofm curate` wrote.")
    split: Literal["train", "held_out", "all"] = Field("train", description="Which clips to encode.")
    view: str | None = Field(None, description="YAML of a view: only clips that it keeps are encoded; null encodes all.")
    num_frames: int = Field(ge=1, description="Frames of a clip; shorter stored clips are not encoded.")
    frame_stride: int = Field(1, ge=1, description="Steps, in stored frames, from one frame of a clip to the next.")
    height: int = Field(ge=8, description="Height of a clip, in pixels.")
    width: int = Field(ge=8, description="Width of a clip, in pixels.")
    resize_short_side: int | None = Field(
        None,
        ge=8,
        description="As data.resize_short_side: frames are resized to it before the crop; null keeps the stored size.",
    )
    crop: Literal["none", "centre"] = Field("none", description="As data.crop: `none` takes clips of exactly that size.")
    start: Literal["first", "centre"] = Field("first", description="As data.start: which frames of a longer clip.")
    buckets: BucketsConfig | None = Field(
        None, description="As data.buckets, of which those fields matter here that say which size a clip is brought to."
    )
    decoder: Literal["auto", "torchcodec", "pyav", "decord"] = Field("auto", description="`auto` takes the first that works.")
    latents: LatentsConfig | None = Field(None, description="Latents of the clips; null writes none.")
    tokens: TokensConfig | None = Field(None, description="Indices of a latent tokenizer; null writes none.")
    text: TextConfig | None = Field(None, description="Embeddings of the captions; null writes none.")
    engine: EncodeEngineConfig = Field(EncodeEngineConfig(), description="The Ray actors.")

    @property
    def sections(self) -> dict[str, LatentsConfig | TokensConfig | TextConfig]:
        """Kind of sidecar -> its section, of those that are written."""
        found = {"latents": self.latents, "tokens": self.tokens, "text": self.text}
        return {kind: section for kind, section in found.items() if section is not None}

    @property
    def reads_pixels(self) -> bool:
        """Whether clips are decoded."""
        return self.latents is not None or self.tokens is not None

    @model_validator(mode="after")
    def _encodes_something(self) -> EncodeConfig:
        if not self.sections:
            raise ValueError("nothing to encode: give latents, tokens, text, or several of them")
        if self.buckets is not None and self.buckets.image_share:
            raise ValueError(
                f"buckets.image_share {self.buckets.image_share:g} draws other images in each epoch, and a cache holds one; "
                "set it to 0 here and in the training"
            )
        return self
