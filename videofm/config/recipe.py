"""Sections about what follows training, and the recipe that chains stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from videofm.config.base import Section, execution
from videofm.config.candidates import CandidatesConfig
from videofm.config.curate import CurateConfig, DemoDataConfig
from videofm.config.encode import EncodeConfig
from videofm.config.evaluate_arlon import FewStepsMetric, LongVideoMetric
from videofm.config.evaluate_reward import RewardMetric
from videofm.config.import_pairs import ImportPairsConfig
from videofm.config.rank import RankConfig
from videofm.config.sample import SampleConfig
from videofm.config.train import TrainConfig

_Manifest = Annotated[str, Field(description="Folder of shards.")]
_Split = Annotated[Literal["train", "held_out"], Field(description="Which clips to read.")]
_NumClips = Annotated[int, Field(ge=1, description="Clips to measure, at most.")]
_NumFrames = Annotated[int, Field(ge=1, description="Frames of a clip; the frame rule of the model must allow them.")]
_Height = Annotated[int, Field(ge=8, description="Height, in pixels.")]
_Width = Annotated[int, Field(ge=8, description="Width, in pixels.")]
_VideoVAE = Annotated[str, Field(description="Training run of a VAE, a checkpoint, or an exported folder.")]


def _batch_size() -> Any:
    return execution(8, ge=1, description="Clips computed together; memory grows with it.")


class TilesConfig(Section):
    """Reconstruct in overlapping tiles. Sizes are in pixels and frames, and fit the compression of the VAE."""

    height: int = Field(ge=8, description="Height of a tile, in pixels.")
    width: int = Field(ge=8, description="Width of a tile, in pixels.")
    overlap: int = Field(ge=0, description="Pixels that neighbours share along height and width; they are mixed linearly.")
    num_frames: int | None = Field(None, ge=1, description="Frames of a tile; null takes the whole clip.")
    overlap_frames: int = Field(1, ge=1, description="Frames that tiles in time share; a causal VAE streams and shares none.")
    seam_error: bool = Field(
        True, description="Measure what tiles change, on the first clip; it has to fit the memory as a whole."
    )


class ReconstructionMetric(Section):
    """What a VAE keeps of clips: PSNR, SSIM, LPIPS, rFVD, also for each frame, with originals beside reconstructions."""

    kind: Literal["reconstruction"]
    run: _VideoVAE
    manifest: _Manifest
    split: _Split = "held_out"
    num_clips: _NumClips = 64
    num_frames: _NumFrames
    height: _Height
    width: _Width
    batch_size: int = _batch_size()
    lpips_weights: str | None = Field(
        None, description="Local safetensors file for LPIPS (see tools/convert_perceptual.py); null leaves LPIPS out."
    )
    lpips_size: Literal["vgg16", "tiny"] = Field("vgg16", description="Architecture of that file; `tiny` is for tests.")
    i3d_weights: str | None = Field(
        None, description="Local safetensors file of I3D (see tools/convert_perceptual.py); null leaves rFVD out."
    )
    i3d_size: Literal["kinetics400", "tiny"] = Field(
        "kinetics400", description="Architecture of that file; `tiny` is for tests."
    )
    tiles: TilesConfig | None = Field(None, description="Reconstruct in tiles; null takes clips as a whole.")
    streaming: bool = Field(
        False, description="Reconstruct chunk by chunk with caches, in the smallest chunks; the VAE must be causal."
    )

    @model_validator(mode="after")
    def _one_way(self) -> ReconstructionMetric:
        if self.streaming and self.tiles is not None:
            raise ValueError("give either `tiles` or `streaming`: a tile has no cache of the frames before it")
        return self


class LatentDiagnosticsMetric(Section):
    """What the latents of a VAE are like, with alarms; writes their statistics, which a diffusion model is trained with."""

    kind: Literal["latent_diagnostics"]
    run: _VideoVAE
    manifest: _Manifest
    split: _Split = "train"
    num_clips: _NumClips = 512
    num_frames: _NumFrames
    height: _Height
    width: _Width
    batch_size: int = _batch_size()


class ImageCompatibilityMetric(Section):
    """Whether an image VAE decodes the latents of a video VAE: PSNR, and how the latents of both differ."""

    kind: Literal["image_compatibility"]
    run: _VideoVAE
    image_vae: str = Field(description="Folder of a diffusers AutoencoderKL, or run of an image VAE (vae/image_kl).")
    manifest: _Manifest
    split: _Split = "held_out"
    num_clips: _NumClips = 64
    num_frames: _NumFrames
    height: _Height
    width: _Width
    batch_size: int = _batch_size()


class HeldOutLossMetric(Section):
    """Flow-matching loss on held-out clips at fixed noise levels and fixed noise."""

    kind: Literal["held_out_loss"]
    run: str = Field(description="Training run of a DiT.")
    manifest: _Manifest
    split: _Split = "held_out"
    num_clips: _NumClips = 64
    num_frames: _NumFrames
    height: _Height
    width: _Width
    batch_size: int = _batch_size()
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


class ImageToVideoMetric(Section):
    """Image to video on demo-set clips: each is made again from its first frame and its caption.

    How well the first frame is kept (PSNR), and the shares with the colour and the direction of the caption.
    """

    kind: Literal["image_to_video"]
    run: str = Field(description="Training run of a DiT, a checkpoint of it, or an exported folder.")
    manifest: str = Field(description="Folder of shards.")
    split: Literal["train", "held_out"] = Field("held_out", description="Which clips to read.")
    num_clips: int = Field(48, ge=1, description="Clips to measure, at most.")
    num_frames: int = Field(ge=2, description="Frames of a clip.")
    height: int = Field(ge=8, description="Height, in pixels.")
    width: int = Field(ge=8, description="Width, in pixels.")
    batch_size: int = _batch_size()
    num_steps: int = Field(30, ge=1, description="Steps from noise to data.")
    guidance_scale: float = Field(3.0, ge=1, description="Classifier-free guidance; 1 is off.")


class TokenizerMetric(Section):
    """What a latent tokenizer keeps of clips, and how it uses its codes: errors of the latents over their variance, beside what
    nearest means would give, and PSNR after the VAE's decoder."""

    kind: Literal["tokenizer"]
    run: str = Field(description="Training run of a latent tokenizer, or a checkpoint of it; it also holds the VAE.")
    manifest: _Manifest
    split: _Split = "held_out"
    num_clips: _NumClips = 64
    num_frames: _NumFrames
    height: _Height
    width: _Width
    batch_size: int = _batch_size()


class NextTokenMetric(Section):
    """How well an autoregressive model predicts stored tokens: its loss against that of token frequencies, and under shuffled
    captions."""

    kind: Literal["next_token"]
    run: str = Field(description="Training run of an autoregressive model (objective next_token).")
    cache: str | None = Field(
        None,
        description="Run directory of `videofm encode` with the tokens of the clips to measure on; null takes data.cache of "
        "the training, which has them where it was encoded with split `all`.",
    )
    split: _Split = "held_out"
    num_clips: _NumClips = 256
    num_train_clips: int = Field(2048, ge=1, description="Training clips whose tokens are counted for frequencies, at most.")
    batch_size: int = _batch_size()


EvaluationMetric = Annotated[
    ReconstructionMetric
    | LatentDiagnosticsMetric
    | ImageCompatibilityMetric
    | HeldOutLossMetric
    | CaptionFollowingMetric
    | ImageToVideoMetric
    | TokenizerMetric
    | NextTokenMetric
    | FewStepsMetric
    | LongVideoMetric
    | RewardMetric,
    Field(discriminator="kind"),
]


class EvaluateConfig(Section):
    """Measure trained models and generated videos."""

    kind: Literal["evaluate"]
    metrics: list[EvaluationMetric] = Field(min_length=1, description="What to measure.")
    seed: int = Field(0, ge=0, description="Seed of frame choice and noise.")


class ExportConfig(Section):
    """Write a folder that inference software loads: of a DiT's run what `diffusers.LTXPipeline.from_pretrained` takes, of a
    VAE's run the VAE alone in its public layout."""

    kind: Literal["export"]
    run: str = Field(description="Training run of a DiT or of a VAE, or a checkpoint of it.")
    output: str = Field(description="Folder to write; replaced as a whole once the new one is complete.")
    ema: bool = Field(True, description="Export the moving average of the weights.")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="Type of the stored weights.")
    original: bool = Field(False, description="Of a VAE (vae/ltx): also write the authors' single file, vae.safetensors.")
    adapter: bool = Field(
        False,
        description="Of a DiT whose run trained adapters (models.dit.lora): write these alone, as load_lora_weights of "
        "diffusers takes them; false adds them to the weights.",
    )


class ReportConfig(Section):
    """One self-contained HTML page about a recipe's run or a single stage's."""

    kind: Literal["report"]
    run: str = Field(description="Run directory of a recipe or of a stage.")
    output: str | None = Field(None, description="File to write; null is `report.html` in that run directory.")


StageConfig = Annotated[
    DemoDataConfig
    | CurateConfig
    | EncodeConfig
    | TrainConfig
    | SampleConfig
    | CandidatesConfig
    | RankConfig
    | ImportPairsConfig
    | EvaluateConfig
    | ExportConfig
    | ReportConfig,
    Field(discriminator="kind"),
]


class RecipeConfig(Section):
    """A chain of stages. `${run}` is the recipe's run directory, `${source}` its source folder, `${stage.NAME}` the run
    directory of an earlier stage: a stage that names another depends on it."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,80}$", description="Name of the recipe.")
    run: str = Field(description="Run directory of the recipe; stages live in `stages/NAME` below it.")
    source: str | None = Field(None, description="Folder of raw videos, for stages that say `${source}`.")
    stages: dict[str, StageConfig] = Field(min_length=1, description="The stages, in order.")
