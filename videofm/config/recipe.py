"""Sections about what follows training, and the recipe that chains stages."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from videofm.config.base import Section
from videofm.config.data import CurateConfig, DemoDataConfig
from videofm.config.train import TrainConfig


class SampleConfig(Section):
    """Generate videos from prompts, with our sampler or, in a fresh process, with plain diffusers."""

    kind: Literal["sample"]
    run: str = Field(description="Training run of a DiT, a checkpoint of it, or an exported folder.")
    sampler: Literal["videofm", "diffusers"] = Field(
        "videofm",
        description="`diffusers` loads an exported folder with LTXPipeline in a process that does not import videofm.",
    )
    prompts: list[str] = Field([], description="Captions, one video each.")
    prompts_file: str | None = Field(None, description="Text file with one caption a line, instead of `prompts`.")
    num_frames: int = Field(ge=1, description="Frames of a video.")
    height: int = Field(ge=8, description="Height, in pixels.")
    width: int = Field(ge=8, description="Width, in pixels.")
    fps: float = Field(gt=0, description="Frames a second; the model is told.")
    num_steps: int = Field(30, ge=1, description="Euler steps from noise to data.")
    guidance_scale: float = Field(3.0, ge=1, description="Classifier-free guidance; 1 is off.")
    batch_size: int = Field(16, ge=1, description="Videos made together.")
    ema: bool = Field(True, description="Use the moving average of the weights.")
    seed: int = Field(0, ge=0, description="Video i starts from noise drawn with (seed, i).")

    @model_validator(mode="after")
    def _has_prompts(self) -> SampleConfig:
        if bool(self.prompts) == bool(self.prompts_file):
            raise ValueError("give either `prompts` (a list) or `prompts_file` (a path), not both and not neither")
        return self


class ReconstructionMetric(Section):
    """PSNR and SSIM of a VAE on clips, with a sheet of originals beside reconstructions."""

    kind: Literal["reconstruction"]
    run: str = Field(description="Training run of a VAE, or an exported folder.")
    manifest: str = Field(description="Folder of shards.")
    split: Literal["train", "held_out"] = Field("held_out", description="Which clips to read.")
    num_clips: int = Field(64, ge=1, description="Clips to measure, at most.")
    num_frames: int = Field(ge=1, description="Frames of a clip.")
    height: int = Field(ge=8, description="Height, in pixels.")
    width: int = Field(ge=8, description="Width, in pixels.")


class HeldOutLossMetric(Section):
    """Flow-matching loss on held-out clips at fixed noise levels and fixed noise."""

    kind: Literal["held_out_loss"]
    run: str = Field(description="Training run of a DiT.")
    manifest: str = Field(description="Folder of shards.")
    split: Literal["train", "held_out"] = Field("held_out", description="Which clips to read.")
    num_clips: int = Field(64, ge=1, description="Clips to measure, at most.")
    num_frames: int = Field(ge=1, description="Frames of a clip.")
    height: int = Field(ge=8, description="Height, in pixels.")
    width: int = Field(ge=8, description="Width, in pixels.")
    sigmas: list[float] = Field([0.1, 0.3, 0.5, 0.7, 0.9], min_length=1, description="Noise levels in (0, 1).")

    @field_validator("sigmas")
    @classmethod
    def _inside(cls, sigmas: list[float]) -> list[float]:
        outside = [sigma for sigma in sigmas if not 0 < sigma < 1]
        if outside:
            raise ValueError(f"noise levels lie strictly between 0 and 1, not {outside}")
        return sigmas


class CaptionFollowingMetric(Section):
    """Share of demo-set videos whose colour and direction are those of their caption (an analytic classifier)."""

    kind: Literal["caption_following"]
    samples: str = Field(description="Folder with `samples.jsonl` and the videos it names.")


EvaluationMetric = Annotated[ReconstructionMetric | HeldOutLossMetric | CaptionFollowingMetric, Field(discriminator="kind")]


class EvaluateConfig(Section):
    """Measure trained models and generated videos."""

    kind: Literal["evaluate"]
    metrics: list[EvaluationMetric] = Field(min_length=1, description="What to measure.")
    seed: int = Field(0, ge=0, description="Seed of frame choice and noise.")


class ExportConfig(Section):
    """Write a folder that `diffusers.LTXPipeline.from_pretrained` loads."""

    kind: Literal["export"]
    run: str = Field(description="Training run of a DiT, or a checkpoint of it.")
    output: str = Field(description="Folder to write; replaced as a whole once the new one is complete.")
    ema: bool = Field(True, description="Export the moving average of the weights.")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="Type of the stored weights.")


class ReportConfig(Section):
    """One self-contained HTML page about a recipe's run or a single stage's."""

    kind: Literal["report"]
    run: str = Field(description="Run directory of a recipe or of a stage.")
    output: str | None = Field(None, description="File to write; null is `report.html` in that run directory.")


StageConfig = Annotated[
    DemoDataConfig | CurateConfig | TrainConfig | SampleConfig | EvaluateConfig | ExportConfig | ReportConfig,
    Field(discriminator="kind"),
]


class RecipeConfig(Section):
    """A chain of stages. `${run}` is the recipe's run directory, `${source}` its source folder, `${stage.NAME}` the run
    directory of an earlier stage: a stage that names another depends on it."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,80}$", description="Name of the recipe.")
    run: str = Field(description="Run directory of the recipe; stages live in `stages/NAME` below it.")
    source: str | None = Field(None, description="Folder of raw videos, for stages that say `${source}`.")
    stages: dict[str, StageConfig] = Field(min_length=1, description="The stages, in order.")
