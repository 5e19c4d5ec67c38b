"""Sections about sampling: where a sampler visits, how it is steered, what of a video is given, and the stage itself."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from videofm.config.base import Section


class LTXScheduleConfig(Section):
    """LTX-Video 0.9: even levels, shifted with the token count, stretched to end at `terminal`."""

    kind: Literal["ltx"]
    base_tokens: int = Field(1024, ge=1, description="Token count at which the shift mu is base_shift.")
    max_tokens: int = Field(4096, ge=1, description="Token count at which mu is max_shift.")
    base_shift: float = Field(0.95, description="mu at base_tokens.")
    max_shift: float = Field(2.05, description="mu at max_tokens; the line goes on at both ends.")
    terminal: float = Field(0.1, gt=0, lt=1, description="Last noise level above 0.")

    @model_validator(mode="after")
    def _two_counts(self) -> LTXScheduleConfig:
        if self.base_tokens == self.max_tokens:
            raise ValueError(f"base_tokens and max_tokens are both {self.base_tokens}: a line needs two token counts")
        return self


class LinearQuadraticScheduleConfig(Section):
    """LTX-Video 0.9.5 and later: small even steps near noise, then steps that grow quadratically."""

    kind: Literal["linear_quadratic"]
    threshold: float = Field(0.025, gt=0, lt=1, description="Noise that the even steps take away, all together.")
    linear_steps: int | None = Field(None, ge=1, description="Number of even steps; null takes half of all.")


class ShiftedScheduleConfig(Section):
    """Even levels shifted towards noise by a fixed factor (Step-Video: 13, its distilled model 17)."""

    kind: Literal["shifted"]
    shift: float = Field(gt=0, description="s in s * sigma / (1 + (s - 1) * sigma); 1 changes nothing.")


class LinearScheduleConfig(Section):
    """Evenly spaced levels."""

    kind: Literal["linear"]


ScheduleConfig = Annotated[
    LTXScheduleConfig | LinearQuadraticScheduleConfig | ShiftedScheduleConfig | LinearScheduleConfig,
    Field(discriminator="kind"),
]


class PerturbationConfig(Section):
    """Spatiotemporal skip guidance (STG): away from what the model predicts with some self-attention disturbed."""

    blocks: list[int] = Field(min_length=1, description="Numbers of the blocks, from 0 (LTX-Video 2B: 19).")
    scale: float = Field(1.0, gt=0, description="How far away.")
    mode: Literal["attention_values", "attention_skip", "transformer_block"] = Field(
        "attention_values",
        description="What stands in for the attention of those blocks: its values, its input, or the block's input for all "
        "of the block.",
    )


class GuidanceConfig(Section):
    """How guidance differs from plain `guidance_scale`."""

    rescale: float = Field(0.0, ge=0, le=1, description="Share phi of the standard deviation of the prompt's velocity.")
    interval: list[float] = Field(
        [0.0, 1.0], min_length=2, max_length=2, description="Lowest and highest noise level with guidance."
    )
    star: bool = Field(False, description="CFG-star: project the velocity of the empty prompt onto the prompt's first.")
    decay: bool = Field(False, description="Step-Video: guidance falls linearly, to 1 at sigma 8/9.")
    perturbation: PerturbationConfig | None = Field(None, description="Skip guidance (STG) besides; null has none.")

    @field_validator("interval")
    @classmethod
    def _ordered(cls, interval: list[float]) -> list[float]:
        if not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(f"an interval of noise levels is [low, high] with 0 <= low < high <= 1, not {interval}")
        return interval


class ConditionConfig(Section):
    """A part of every video that is given: an image, or the end of a clip (to go on from it), at a frame."""

    image: str | None = Field(None, description="Image file (PNG, JPEG, ...).")
    video: str | None = Field(None, description="Video file, in place of `image`.")
    num_frames: int | None = Field(
        None, ge=1, description="Of a video: how many of its last frames; the frame rule of the VAE must allow them."
    )
    frame: int = Field(0, description="Where it stands: number of its first frame; -1 is the last of the video, and so on.")
    strength: float = Field(1.0, gt=0, le=1, description="1 keeps it as it is; less lets the model change it.")

    @model_validator(mode="after")
    def _one_file(self) -> ConditionConfig:
        if (self.image is None) == (self.video is None):
            raise ValueError("give either `image` or `video`, not both and not neither")
        if (self.num_frames is None) != (self.video is None):
            raise ValueError("`num_frames` says how many of the last frames of a `video` are taken: give it with one, only")
        return self


class WindowConfig(Section):
    """Long videos a window at a time: each goes on from the last frames of the one before."""

    num_frames: int = Field(ge=1, description="Frames that the model makes at once.")
    overlap_frames: int = Field(
        ge=1, description="Frames that neighbours share; like num_frames they must fit the frame rule of the VAE."
    )
    fade_frames: int = Field(
        0,
        ge=0,
        description="New frames over which the difference fades between the last shared frame and what the decoder made of it: "
        "no jump where windows meet. 0 leaves them as they are decoded.",
    )

    @model_validator(mode="after")
    def _shorter(self) -> WindowConfig:
        if self.overlap_frames >= self.num_frames:
            raise ValueError(f"overlap_frames {self.overlap_frames} must be less than num_frames {self.num_frames}")
        return self


class GuideConfig(Section):
    """Guidance by an autoregressive model (ARLON): it draws the tokens of each window, from its prompt and from the tokens of
    what is there already; what their decoder makes of them is injected into the DiT."""

    run: str = Field(description="Training run of the autoregressive model (objective next_token), or a checkpoint of it.")
    temperature: float = Field(1.0, ge=0, description="Divides the logits of a token; 0 takes the most likely one.")
    top_k: int = Field(0, ge=0, description="Draw among the k most likely tokens; 0 takes all.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw among the most likely tokens that have this probability together.")
    guidance_scale: float = Field(1.0, ge=1, description="Classifier-free guidance on the logits of a token; 1 is off.")
    start_sigma: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Noise level at which the DiT starts, from the features with that much noise; fewer steps are needed. 1 "
        "starts from noise.",
    )
    features_in_negative: bool = Field(
        False,
        description="Whether the evaluation of the negative prompt has the features: then guidance_scale strengthens the text "
        "alone, else the features with it.",
    )


_OURS_ONLY = (
    *("guide", "schedule", "guidance", "negative_prompt", "prompt_suffix", "image", "images", "conditions", "fit", "window"),
    *("decode_sigma", "decode_noise_scale", "causal_fix", "dtype", "solver", "condition_noise_scale", "masked_text"),
)
"""Fields that the sampler `diffusers` does not read."""


class SamplerConfig(Section):
    """How a DiT makes videos of prompts; what `sample` and `dpo_generate` have in common."""

    run: str = Field(description="Training run of a DiT, a checkpoint of it, or an exported folder.")
    prompts: list[str] = Field([], description="Captions, one video each.")
    prompts_file: str | None = Field(
        None,
        description="Instead of `prompts`: a text file with one caption a line, or a storyboard (.yaml) whose prompts change "
        "on the way, `- {start: 0, stop: 129, prompt: ...}`.",
    )
    prompt_suffix: str = Field("", description="Text put behind every prompt; the list of videos does not show it.")
    negative_prompt: str = Field("", description="What guidance moves away from.")
    num_frames: int = Field(ge=1, description="Frames of a video.")
    height: int = Field(ge=8, description="Height, in pixels.")
    width: int = Field(ge=8, description="Width, in pixels.")
    fps: float = Field(gt=0, description="Frames a second; the model is told.")
    num_steps: int = Field(30, ge=1, description="Steps from noise to data.")
    schedule: ScheduleConfig | None = Field(None, description="Noise levels of the steps; null takes the model's own.")
    solver: Literal["euler", "heun", "stochastic"] = Field(
        "euler",
        description="`heun` is of second order and takes two evaluations a step; `stochastic`, for distilled models, puts new "
        "noise on the predicted video after every step.",
    )
    guidance_scale: float = Field(3.0, ge=1, description="Classifier-free guidance; 1 is off.")
    guidance: GuidanceConfig = Field(GuidanceConfig(), description="Variants of guidance.")
    window: WindowConfig | None = Field(None, description="Make long videos in windows; null makes them at once.")
    guide: GuideConfig | None = Field(None, description="Autoregressive guidance, for a DiT with an injection; null has none.")
    decode_sigma: float = Field(
        0.0, ge=0, le=1, description="Noise level that the decoder removes, of a VAE whose decoder does (LTX-Video: 0.05)."
    )
    decode_noise_scale: float | None = Field(
        None, ge=0, le=1, description="Share of noise put into the latents before; null takes decode_sigma."
    )
    causal_fix: bool | None = Field(
        None,
        description="Time of a latent frame: that of its first frame, as LTXConditionPipeline, or as LTXPipeline; null takes "
        "what the run was trained with, and the latter for a folder without a run.",
    )
    condition_noise_scale: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Noise on images and clips given at strength 1, times sigma squared, new in each step (LTX-Video 0.9.5 and "
        "later: 0.15); moves more. 0 is off.",
    )
    masked_text: bool | None = Field(
        None,
        description="Hide padding from the text encoder, as LTXConditionPipeline does and LTXPipeline does not; null takes "
        "what the encoder was trained with.",
    )
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="Type of the weights; the steps themselves are fp32.")
    batch_size: int = Field(16, ge=1, description="Videos made together.")
    ema: bool = Field(True, description="Use the moving average of the weights.")
    seed: int = Field(0, ge=0, description="Video i starts from noise drawn with (seed, i).")

    @model_validator(mode="after")
    def _has_prompts(self) -> SamplerConfig:
        if bool(self.prompts) == bool(self.prompts_file):
            raise ValueError("give either `prompts` (a list) or `prompts_file` (a path), not both and not neither")
        return self


class SampleConfig(SamplerConfig):
    """Generate videos from prompts, with our sampler or, in a fresh process, with plain diffusers."""

    kind: Literal["sample"]
    sampler: Literal["videofm", "diffusers"] = Field(
        "videofm",
        description="`diffusers` loads an exported folder with LTXPipeline in a process that does not import videofm.",
    )
    image: str | None = Field(None, description="First frame of every video.")
    images: list[str] = Field([], description="First frames, one a prompt, instead of `image`.")
    conditions: list[ConditionConfig] = Field([], description="Other frames of every video that are given.")
    fit: Literal["crop", "pad"] | None = Field(
        None, description="What to do with an image or clip of another shape: cut it, or put black around it; null refuses it."
    )

    @model_validator(mode="after")
    def _one_image(self) -> SampleConfig:
        if self.image is not None and self.images:
            raise ValueError("give either `image` (of every video) or `images` (one a prompt), not both")
        return self

    @model_validator(mode="after")
    def _sampler_reads_it(self) -> SampleConfig:
        fields = type(self).model_fields
        unread = [name for name in _OURS_ONLY if getattr(self, name) != fields[name].default]
        if self.sampler == "diffusers" and unread:
            raise ValueError(f"`sampler: diffusers` does not read {', '.join(unread)}; take `sampler: videofm`")
        return self
