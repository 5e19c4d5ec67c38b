"""Sections about models: which one to build or to load, adapters in it, what guides it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from videofm.config.base import Section
from videofm.registry import ATTENTION_BACKENDS, INJECTIONS, MODELS, nearest


class LoraConfig(Section):
    """Low-rank adapters beside linear layers; they train, and the model that they sit in stays as it is."""

    rank: int = Field(ge=1, description="Width of an adapter: W + alpha / rank * B A, with A of `rank` rows.")
    alpha: float | None = Field(None, gt=0, description="Scale of the adapters over their rank; null takes `rank`.")
    targets: list[str] = Field(
        ["*attention.*"], min_length=1, description="Patterns of the names of linear layers that get one (fnmatch)."
    )


class InjectionConfig(Section):
    """Features that guide a transformer (ARLON); training starts from the transformer as it is, bit for bit."""

    kind: str = Field(
        "adaptive_norm",
        description="adaptive_norm: a gated norm before the block; mlp: an MLP's output is added; controlnet: copies of the "
        "first blocks run beside the model.",
    )
    blocks: Literal["first_half", "last_half", "all"] | list[Annotated[int, Field(ge=0)]] = Field(
        "first_half", description="Blocks that are guided: a word, or their numbers from 0."
    )
    feature_channels: int | None = Field(
        None, ge=1, description="Channels of the feature of a latent token; null takes those of the latents."
    )
    hidden_width: int | None = Field(
        None, ge=1, description="Channels of features inside the injection; null takes the width of the transformer."
    )

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        if kind not in INJECTIONS:
            close = nearest(kind, INJECTIONS) or "."
            raise ValueError(f"no injection is called {kind!r}{close} There are: {', '.join(INJECTIONS)}")
        return kind


class ModelConfig(Section):
    """A model to build (`name` and `size`, with fresh weights or those of `init_from`) or to load (`path`)."""

    name: str | None = Field(None, description="Registered name, as in `videofm.models.names()`; null when `path` is given.")
    size: str | None = Field(None, description="Named size of the model; null takes `tiny`, or the one of `init_from`.")
    path: str | None = Field(None, description="Run, checkpoint or exported folder whose weights are loaded.")
    role: str | None = Field(None, description="Which role of `path` or `init_from` to load, where it holds several.")
    overrides: dict[str, Any] = Field({}, description="Fields of the model's own config to change.")
    inflate_from: str | None = Field(
        None,
        description="Smaller model that a new one starts from: for vae/cv_vae and vae/od_vae an image VAE (a folder of "
        "diffusers' AutoencoderKL, or a run of vae/image_kl), for vae/step_video a run of its stage one.",
    )
    init_from: str | None = Field(
        None,
        description="Weights that the model `name` starts from: a run (its moving average), a folder of diffusers, or an "
        "original single file. Every tensor must match, and `size` where it is given.",
    )
    init_component: str | None = Field(
        None,
        description="Which model of `init_from`, such as `transformer`, where a pipeline folder or a single file holds "
        "several; null finds the one that `name` is.",
    )
    lora: LoraConfig | None = Field(None, description="Train adapters in place of the weights; null trains the weights.")
    injection: InjectionConfig | None = Field(
        None,
        description="Guide a transformer by features: added to fresh or loaded weights; a `path` or `init_from` that has the "
        "same one goes on with it. null adds none.",
    )
    freeze_base: bool = Field(False, description="Train the injection only, and keep the weights that it is added to.")
    attention: str = Field("auto", description="Backend of self-attention: auto, math, sdpa, flash_attn, xformers or flex.")
    cross_attention: str = Field("auto", description="Backend of attention to the text, which is masked; the same names.")

    @field_validator("name")
    @classmethod
    def _registered(cls, name: str | None) -> str | None:
        if name is not None and name not in MODELS:
            raise ValueError(f"no model is called {name!r}{nearest(name, MODELS) or '.'} Models: {', '.join(sorted(MODELS))}")
        return name

    @field_validator("attention", "cross_attention")
    @classmethod
    def _known_backend(cls, attention: str) -> str:
        known = ["auto", *ATTENTION_BACKENDS]
        if attention not in known:
            close = nearest(attention, known) or "."
            raise ValueError(f"no attention backend is called {attention!r}{close} There are: {', '.join(known)}")
        return attention

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.name is None) == (self.path is None):
            raise ValueError("give either `name` (build a new model) or `path` (load weights), not both and not neither")
        if self.inflate_from is not None and self.path is not None:
            raise ValueError("`inflate_from` is for a new model (`name`); with `path` its weights are there already")
        if self.init_from is not None and (self.path is not None or self.inflate_from is not None):
            raise ValueError("`init_from` fills the model `name` by itself; give no `path` and no `inflate_from` beside it")
        if self.init_component is not None and self.init_from is None:
            raise ValueError("`init_component` chooses from what `init_from` holds; give that too")
        return self

    @model_validator(mode="after")
    def _adapters_or_injection(self) -> ModelConfig:
        if self.lora is not None and (self.injection is not None or self.freeze_base):
            raise ValueError(
                "`lora` trains adapters only, and `injection` is trained whole: set `freeze_base` in the place of `lora`, or "
                "add adapters to a guided run (`path`) without `injection` and `freeze_base`"
            )
        if self.freeze_base and self.injection is None and self.path is None and self.init_from is None:
            raise ValueError("`freeze_base` trains the injection alone, and a new model has none: give `injection`")
        return self
