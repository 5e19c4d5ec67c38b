"""Sections about training: models, objectives, optimizer, precision, layout, checkpoints, logs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from videofm.config.base import Section, execution
from videofm.config.data import DataConfig
from videofm.registry import ATTENTION_BACKENDS, MODELS, nearest


class ModelConfig(Section):
    """A model to build (`name` and `size`) or to load (`path`)."""

    name: str | None = Field(None, description="Registered name, as in `videofm.models.names()`; null when `path` is given.")
    size: str | None = Field(None, description="Named size of the model; null takes `tiny`.")
    path: str | None = Field(None, description="Run, checkpoint or exported folder whose weights are loaded.")
    role: str | None = Field(None, description="Which role of `path` to load, where it holds several.")
    overrides: dict[str, Any] = Field({}, description="Fields of the model's own config to change.")
    attention: str = Field("auto", description="Backend of self-attention: auto, math, sdpa, flash_attn or xformers.")
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
        return self


class AutoencoderConfig(Section):
    """Train a video VAE (role `vae`) on reconstruction and KL."""

    kind: Literal["autoencoder"]
    reconstruction: Literal["l1", "mse"] = Field("l1", description="Pixel loss, mean over a clip.")
    kl_weight: float = Field(1e-6, ge=0, description="Weight of the KL to the unit Gaussian, mean over latent elements.")
    num_statistics_clips: int = Field(
        512, ge=2, description="Training clips over which mean and std of each latent channel are measured at the end."
    )


class UniformNoiseLevels(Section):
    """sigma uniform in [0, 1]."""

    kind: Literal["uniform"]


class LogitNormalNoiseLevels(Section):
    """sigma = sigmoid(n), n ~ Normal(mean, std)."""

    kind: Literal["logit_normal"]
    mean: float = Field(0.0, description="Mean of n.")
    std: float = Field(1.0, gt=0, description="Standard deviation of n.")


class ShiftedLogitNormalNoiseLevels(Section):
    """LTX-Video: sigma = sigmoid(n), n ~ Normal(mu(L), std), mu linear in the token count L."""

    kind: Literal["shifted_logit_normal"]
    std: float = Field(1.0, gt=0, description="Standard deviation of n.")
    base_tokens: int = Field(1024, ge=1, description="Token count at which mu = base_shift.")
    max_tokens: int = Field(4096, ge=1, description="Token count at which mu = max_shift.")
    base_shift: float = Field(0.95, description="mu at base_tokens.")
    max_shift: float = Field(2.05, description="mu at max_tokens; the line goes on at both ends.")


NoiseLevels = Annotated[
    UniformNoiseLevels | LogitNormalNoiseLevels | ShiftedLogitNormalNoiseLevels, Field(discriminator="kind")
]


class FlowMatchingConfig(Section):
    """Train a diffusion transformer (role `dit`) by flow matching in the latent space of a frozen `vae`."""

    kind: Literal["flow_matching"]
    noise_levels: NoiseLevels = Field(
        ShiftedLogitNormalNoiseLevels(kind="shifted_logit_normal"), description="Law of the noise level sigma of a sample."
    )
    caption_dropout: float = Field(0.1, ge=0, le=1, description="Share of samples whose caption becomes empty (for guidance).")
    train_text_encoder: bool = Field(False, description="Train the role `text_encoder` along; false keeps it frozen.")


ObjectiveConfig = Annotated[AutoencoderConfig | FlowMatchingConfig, Field(discriminator="kind")]


class OptimizerConfig(Section):
    """AdamW with warm-up and decay, gradient clipping, and an exponential moving average of the weights."""

    lr: float = Field(gt=0, description="Peak learning rate.")
    betas: list[float] = Field([0.9, 0.99], min_length=2, max_length=2, description="Decay rates of Adam's two moments.")
    eps: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay on matrices; vectors have none.")
    schedule: Literal["constant", "cosine", "linear"] = Field("cosine", description="Course of the rate after warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the rate rises linearly from 0.")
    final_ratio: float = Field(0.0, ge=0, le=1, description="Rate of the last step over the peak rate.")
    grad_clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="Decay of the weights' moving average, a step; warms up. 0 keeps none."
    )


class TrainerConfig(Section):
    """The loop: how long, how precise, how often to save and to log."""

    max_steps: int = Field(ge=1, description="Optimizer steps.")
    precision: Literal["fp32", "bf16_autocast"] = Field(
        "bf16_autocast", description="Type of matrix products; weights are fp32."
    )
    checkpoint_every: int = execution(200, ge=1, description="Steps between checkpoints; one more is written at the end.")
    keep_checkpoints: int = execution(2, ge=1, description="How many of the newest checkpoints stay.")
    log_every: int = execution(10, ge=1, description="Steps between lines on the console; metrics.jsonl has every step.")
    num_threads: int | None = execution(None, ge=1, description="CPU threads of a rank; null shares the cores out.")
    device: Literal["auto", "cpu", "cuda"] = execution("auto", description="`auto` takes CUDA where it works.")


class ParallelConfig(Section):
    """The mesh of processes. One process is a mesh of size one."""

    data_degree: int = execution(1, ge=1, description="Groups of ranks that read different samples.")
    zero_stage: Literal[0, 1, 2, 3] = execution(
        1, description="What DeepSpeed shards: 1 optimizer, 2 gradients too, 3 weights too."
    )
    timeout: float = execution(600.0, gt=0, description="Longest wait in a collective, in seconds.")


class WandbConfig(Section):
    """Weights & Biases. metrics.jsonl is always written; this is a copy."""

    mode: Literal["disabled", "offline", "online"] = execution(
        "offline", description="`offline` writes files, asks for no key."
    )
    project: str = execution("videofm", description="Project name.")


class TrainConfig(Section):
    """Train one objective on shards."""

    kind: Literal["train"]
    seed: int = Field(0, ge=0, description="Every random draw of the run follows from it.")
    models: dict[str, ModelConfig] = Field(min_length=1, description="One model a role of the objective.")
    objective: ObjectiveConfig = Field(description="What is minimised.")
    data: DataConfig = Field(description="What is read.")
    optimizer: OptimizerConfig = Field(description="How weights move.")
    trainer: TrainerConfig = Field(description="The loop.")
    parallel: ParallelConfig = Field(ParallelConfig(), description="The mesh of processes.")
    wandb: WandbConfig = Field(WandbConfig(), description="Copy of the metrics to Weights & Biases.")

    @model_validator(mode="after")
    def _data_degree_divides(self) -> TrainConfig:
        groups, degree = self.data.num_micro_batches, self.parallel.data_degree
        if groups % degree:
            raise ValueError(
                f"parallel.data_degree {degree} does not divide data.num_micro_batches {groups}; "
                f"take a multiple of {degree} micro-batches so that every rank gets as many"
            )
        return self
