"""Sections about what is not encoded in the training step: latents, tokens, text, from sidecar shards or from a pool."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from videofm.config.base import Section, execution

CacheMode = Literal["text", "latents", "full", "tokens", "tokens_text", "latents_tokens"]

KINDS: dict[CacheMode, tuple[str, ...]] = {
    "text": ("text",),
    "latents": ("latents",),
    "full": ("latents", "text"),
    "tokens": ("tokens",),
    "tokens_text": ("tokens", "text"),
    "latents_tokens": ("latents", "tokens"),
}
"""Mode -> the kinds of sidecars that are read."""

MODES_OF: dict[str, tuple[CacheMode, ...]] = {
    "flow_matching": ("text", "latents", "full", "latents_tokens"),
    "latent_tokens": ("latents",),
    "next_token": ("tokens", "tokens_text"),
    "dpo": ("text", "latents", "full"),
    "reward_weighted": ("text", "latents", "full"),
    "reward": ("text", "latents", "full"),
}
"""Kind of objective -> the modes that it can train on; one that is not here needs pixels."""


class CacheConfig(Section):
    """What `videofm encode` wrote, in the place of running the frozen encoders."""

    path: str | None = Field(None, description="Run directory of `videofm encode`: a folder, or an fsspec URL of a copy of it.")
    mix: dict[str, str] | None = Field(
        None, description="With data.mix, in place of path: name of each dataset -> the run directory that holds its sidecars."
    )
    mode: CacheMode = Field(
        "full",
        description="`text` reads embeddings of captions and decodes clips; `latents` reads latents and no pixels, and encodes "
        "captions in the step; `full` reads both. `tokens` reads indices of a latent tokenizer and no pixels, and encodes "
        "captions in the step; `tokens_text` reads both; `latents_tokens` reads latents and tokens, and encodes captions.",
    )
    spot_check_every: int = Field(
        10_000, ge=1, description="One clip in about this many is encoded again and compared; one is at the start of a run."
    )

    def folder(self, source: str) -> str:
        """Where the sidecars of a dataset lie, by its name in data.mix."""
        found = self.path if self.mix is None else self.mix[source]
        assert found is not None
        return found

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sidecars that are read."""
        return KINDS[self.mode]

    @property
    def fixes_pixels(self) -> bool:
        """Whether what is read was made of pixels: then one window of each clip is held, and no clip is decoded for a step."""
        return "latents" in self.kinds or "tokens" in self.kinds

    def check_sources(self, names: list[str]) -> None:
        """Refuse folders that are not those of the datasets `names` of data.mix (none: of data.manifest)."""
        if bool(names) != (self.mix is not None):
            raise ValueError("cache.mix goes with data.mix, cache.path with data.manifest")
        if self.mix is not None and set(self.mix) != set(names):
            raise ValueError(
                f"cache.mix names {', '.join(sorted(self.mix))}; the datasets of data.mix are {', '.join(sorted(names))}"
            )

    @model_validator(mode="after")
    def _one_place(self) -> CacheConfig:
        if (self.path is None) == (self.mix is None):
            raise ValueError("give either cache.path or cache.mix, not both and not neither")
        return self


class OnlineConfig(Section):
    """Encoder actors, on other machines or on this one, that feed the trainers in the order of the plan."""

    address: str | None = execution(
        None, description="Ray cluster of the actors; null starts a node on loopback for each rank."
    )
    num_actors: int = execution(1, ge=1, description="Encoder actors that feed one data rank.")
    num_gpus: float = execution(0.0, ge=0, description="GPUs of an actor; 0 encodes on its CPUs.")
    num_cpus: int = execution(1, ge=1, description="CPUs of an actor, which are also its threads.")
    max_in_flight: int = execution(
        4, ge=1, description="Micro-batches that are asked for and not yet consumed by a rank; bounds what waits in memory."
    )
    max_deaths: int = execution(3, ge=0, description="Actors that may die over one micro-batch before the run fails.")
    precision: Literal["fp32", "bf16_autocast"] = Field("bf16_autocast", description="Type of the encoders' matrix products.")
