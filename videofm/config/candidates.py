"""The section of `videofm dpo generate`: how many videos of which prompts are made by which model, and how they are stored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from videofm.config.actors import ActorsConfig
from videofm.config.base import Section
from videofm.config.sample import SamplerConfig


class FromClipsConfig(Section):
    """Candidates that share their motion (DenseDPO): a real clip is noised to a level eta, and denoised several times."""

    manifest: str = Field(description="Folder of shards; captions are the prompts, and clips without one are left out.")
    split: Literal["train", "held_out"] = Field("train", description="Which clips to begin from.")
    num_clips: int | None = Field(None, ge=1, description="Clips, at most, drawn by `seed` and their key; null takes all.")
    eta_min: float = Field(0.65, gt=0, lt=1, description="Lowest noise level from which clips are denoised.")
    eta_max: float = Field(0.8, gt=0, lt=1, description="Highest noise level; that of a clip is drawn by `seed` and the clip.")

    @model_validator(mode="after")
    def _ordered(self) -> FromClipsConfig:
        if self.eta_min > self.eta_max:
            raise ValueError(f"eta_min {self.eta_min:g} is more than eta_max {self.eta_max:g}")
        return self


class CandidatesConfig(SamplerConfig):
    """Make several videos of each prompt, as a dataset of clips to choose from."""

    kind: Literal["dpo_generate"]
    prompts: list[str] = Field([], description="Captions; several videos are made of each.")
    prompts_file: str | None = Field(None, description="Instead of `prompts`: a text file with one caption a line.")
    from_clips: FromClipsConfig | None = Field(
        None, description="Instead of prompts: begin from real clips, noised; pairs then differ in detail and not in motion."
    )
    prompt_suffix: str = Field("", description="Text put behind every prompt for the model; the stored caption is without it.")
    num_candidates: int = Field(4, ge=2, le=1000, description="Videos of each prompt.")
    batch_size: int = Field(8, ge=1, description="Videos made together; a part of the result, to the last bit.")
    seed: int = Field(0, ge=0, description="Candidate n of prompt i starts from noise drawn with (seed, i, n).")
    prompts_a_shard: int = Field(
        16, ge=1, description="Prompts whose videos become one shard, which one actor makes. Finished batches outlive it."
    )
    crf: int = Field(
        8,
        ge=0,
        le=51,
        description="x264 constant rate factor; 0 is lossless, which not every browser plays, larger is smaller.",
    )
    preset: Literal["ultrafast", "veryfast", "fast", "medium", "slow"] = Field(
        "medium", description="x264 preset: how much time to spend on small files; the slower the smaller."
    )
    gop: int = Field(24, ge=1, description="Frames between key frames.")
    engine: ActorsConfig = Field(ActorsConfig(), description="The Ray actors.")

    @model_validator(mode="after")
    def _has_prompts(self) -> CandidatesConfig:
        given = [name for name in ("prompts", "prompts_file", "from_clips") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                "give one of `prompts` (a list), `prompts_file` (a path) and `from_clips` (real clips), "
                f"not {' and '.join(given) or 'none'}"
            )
        return self

    @model_validator(mode="after")
    def _whole_clips(self) -> CandidatesConfig:
        if self.from_clips is not None and (self.window is not None or self.guide is not None):
            raise ValueError("`from_clips` begins from whole clips, and leaves nothing to a `window` or a `guide`: drop these")
        return self

    @model_validator(mode="after")
    def _can_be_stored(self) -> CandidatesConfig:
        if self.height % 2 or self.width % 2:
            raise ValueError(f"frames of {self.height}x{self.width} cannot be stored: H.264 needs an even height and width")
        return self

    @model_validator(mode="after")
    def _prompts_say_something(self) -> CandidatesConfig:
        blank = [number for number, prompt in enumerate(self.prompts) if not prompt.strip()]
        if blank:
            raise ValueError(f"prompts {', '.join(map(str, blank))} are blank: there is nothing to prefer a video of them by")
        return self
