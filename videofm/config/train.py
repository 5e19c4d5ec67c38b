"""Sections about training: objectives, optimizer, precision, layout, checkpoints, logs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from videofm.config.autoencoder import AutoencoderConfig
from videofm.config.base import Section, execution
from videofm.config.cache import MODES_OF
from videofm.config.data import DataConfig
from videofm.config.dpo import DPOConfig, RewardWeightedConfig
from videofm.config.faults import FaultsConfig
from videofm.config.flow_matching import FlowMatchingConfig
from videofm.config.latent_tokens import LatentTokensConfig
from videofm.config.model import ModelConfig
from videofm.config.next_token import NextTokenConfig
from videofm.config.reference import reference_problem
from videofm.config.reward import RewardTrainingConfig

ObjectiveConfig = Annotated[
    AutoencoderConfig
    | FlowMatchingConfig
    | LatentTokensConfig
    | NextTokenConfig
    | DPOConfig
    | RewardWeightedConfig
    | RewardTrainingConfig,
    Field(discriminator="kind"),
]

TRAINS_A_DIT = (FlowMatchingConfig, DPOConfig, RewardWeightedConfig)
"""Objectives whose model makes videos, and has a held-out flow-matching loss."""
READS_PAIRS = (DPOConfig, RewardWeightedConfig, RewardTrainingConfig)
"""Objectives whose samples are pairs of clips."""

_CODEBOOK_EMA_DECAY = 0.99
"""Longest moving average of weights beside a codebook: codebooks themselves follow over some hundred steps."""


class ParameterGroupConfig(Section):
    """Parameters whose rate differs, or which stay frozen for a while; the first group that matches a name has it."""

    match: str = Field(description="Pattern of parameter names with their role, such as `vae.decoder.*` (fnmatch).")
    start_step: int = Field(0, ge=0, description="Optimizer step from which they are trained; frozen before.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which their rate rises linearly from 0, from `start_step` on.")
    lr_scale: float = Field(1.0, ge=0, description="Their rate over that of the others; 0 freezes them for good.")


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
    grad_clip_ema: float = Field(
        0.0, ge=0, description="Also clip at this multiple of the moving average of the norm (after this clip); 0 does not."
    )
    grad_clip_ema_decay: float = Field(0.99, gt=0, lt=1, description="Decay of that average, a step; the first norm starts it.")
    spike_factor: float = Field(
        0.0,
        ge=0,
        description="Skip a step whose norm, before clipping, is beyond this multiple of that average; 0 skips only what is "
        "not finite. What follows from many of them is in `faults.divergence`.",
    )
    spike_warmup: int = Field(100, ge=1, description="Steps that are taken before the first one can be skipped as a spike.")
    no_decay: list[str] = Field(
        [],
        description="Patterns of names of parameters that do not decay although matrices, as `*scale_shift_table` (fnmatch).",
    )
    groups: list[ParameterGroupConfig] = Field([], description="Parameters with a rate or a start of their own.")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="Decay of the weights' moving average, a step; warms up. 0 keeps none."
    )


class KeepBestConfig(Section):
    """Which checkpoint is the best: by a metric of the step at which it was saved."""

    metric: str = Field(description="Name of a metric in metrics.jsonl, such as `held_out_loss`.")
    mode: Literal["min", "max"] = Field("min", description="Whether the smallest or the largest value is best.")


class TrainerConfig(Section):
    """The loop: how long, how precise, how often to save and to log."""

    max_steps: int = Field(ge=1, description="Optimizer steps.")
    precision: Literal["fp32", "bf16_autocast"] = Field(
        "bf16_autocast", description="Type of matrix products; weights are fp32."
    )
    checkpoint_every: int = execution(200, ge=1, description="Steps between checkpoints; one more is written at the end.")
    keep_checkpoints: int = execution(2, ge=1, description="How many of the newest checkpoints stay.")
    keep_every: int | None = execution(
        None, ge=1, description="Checkpoints of steps that this divides stay for good; null keeps none for its step."
    )
    keep_best: KeepBestConfig | None = execution(None, description="The best checkpoint stays too; null keeps none as such.")
    asynchronous_checkpoints: bool = execution(
        True,
        description="Training waits for a copy to host memory only, which is kept, and a thread writes; false waits for all.",
    )
    spare_checkpoints: str | None = execution(
        None,
        description="Folder on another disk, shared by all nodes, where the state goes if it cannot be written to the run "
        "directory; the run then stops as interrupted. null tries again at the next checkpoint.",
    )
    log_every: int = execution(10, ge=1, description="Steps between lines on the console; metrics.jsonl has every step.")
    peak_tflops: float | None = execution(
        None,
        gt=0,
        description="Dense matrix products of a device at this precision by its data sheet, in TFLOP/s (H100 SXM, bf16: 989); "
        "for the MFU in the metrics. null has none.",
    )
    num_threads: int | None = execution(None, ge=1, description="CPU threads of a rank; null shares the cores out.")
    compile: bool = execution(
        False,
        description="Compile each transformer block by itself (torch.compile); attention stays outside.",
    )
    device: Literal["auto", "cpu", "cuda"] = execution("auto", description="`auto` takes CUDA where it works.")


class ParallelConfig(Section):
    """The mesh of processes: `data x context x tensor` of them. One process is a mesh of size one."""

    data_degree: int = execution(1, ge=1, description="Groups of ranks that read different samples.")
    context_degree: int = execution(1, ge=1, description="Ranks that share the tokens (or frames) of a sample.")
    tensor_degree: int = execution(1, ge=1, description="Ranks that share each matrix product of a model.")
    context_strategy: Literal["auto", "ulysses", "allgather_kv", "ring", "unified"] = execution(
        "auto",
        description="How attention crosses the context ranks: `ulysses` exchanges heads, `ring` passes keys and values on, "
        "`allgather_kv` gathers them, `unified` exchanges heads among `ulysses_degree` ranks and rings between those; `auto` "
        "takes the first that suits the heads and the nodes.",
    )
    ulysses_degree: int | None = execution(
        None,
        ge=1,
        description="Context ranks that exchange heads under `unified`; null takes the most that a node and the heads allow.",
    )
    zero_stage: Literal[0, 1, 2, 3] = execution(
        1, description="What DeepSpeed shards: 1 optimizer, 2 gradients too, 3 weights too."
    )
    offload_optimizer: bool = execution(False, description="Keep optimizer state, and step, on the CPU (ZeRO 1 to 3).")
    activation_checkpointing: Literal["none", "selective", "full"] = execution(
        "none",
        description="What a transformer block computes again in the backward pass: nothing; all but attention and every second "
        "matrix product; everything.",
    )
    checkpoint_every_blocks: int = execution(1, ge=1, description="Checkpoint one block in this many.")
    offload_activations: bool = execution(False, description="Keep what the backward pass needs of blocks in host memory.")
    digest_every: int = execution(
        100, ge=0, description="Steps between comparisons of what ranks that share samples hold; 0 never compares."
    )
    timeout: float = execution(600.0, gt=0, description="Longest wait in a collective, in seconds.")


class WandbConfig(Section):
    """Weights & Biases. metrics.jsonl is always written; this is a copy."""

    mode: Literal["disabled", "offline", "online"] = execution(
        "offline", description="`offline` writes files, asks for no key."
    )
    project: str = execution("videofm", description="Project name.")


class SamplesConfig(Section):
    """Videos during training, from the weights that would be shipped: same prompts, same noise each time.

    Where `objective.features` guides the dit, these are made without: there is no clip and no AR model to take features from,
    and the learned null feature stands in their place. `videofm sample` with a `guide` shows what the dit does with them.
    """

    every: int = Field(ge=1, description="Steps between samples; the last step makes some too.")
    prompts: list[str] = Field(min_length=1, description="Captions, one video each.")
    num_frames: int = Field(ge=1, description="Frames of a video.")
    height: int = Field(ge=8, description="Height, in pixels.")
    width: int = Field(ge=8, description="Width, in pixels.")
    fps: float = Field(gt=0, description="Frames a second; the model is told.")
    num_steps: int = Field(30, ge=1, description="Steps from noise to data.")
    guidance_scale: float = Field(3.0, ge=1, description="Classifier-free guidance; 1 is off.")


class HeldOutConfig(Section):
    """The loss during training at fixed noise levels and fixed noise, on clips that are cut as those that are trained on."""

    every: int = Field(ge=1, description="Steps between measurements; the last step is measured too.")
    manifest: str | None = Field(
        None,
        description="Folder of shards to measure on, without data.view; null takes the datasets of `data`. Candidates of "
        "preference training have no held-out clips: name the data that the model was trained on before.",
    )
    split: Literal["train", "held_out"] = Field("held_out", description="Which clips of it to measure on.")
    num_clips: int = Field(64, ge=1, description="How many; whole micro-batches are read.")
    sigmas: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [0.1, 0.3, 0.5, 0.7, 0.9], min_length=1, description="Noise levels in (0, 1)."
    )


class TrainConfig(Section):
    """Train one objective on shards."""

    kind: Literal["train"]
    seed: int = Field(0, ge=0, description="Every random draw of the run follows from it.")
    models: dict[str, ModelConfig] = Field(min_length=1, description="One model a role of the objective.")
    objective: ObjectiveConfig = Field(description="What is minimised.")
    data: DataConfig = Field(description="What is read.")
    optimizer: OptimizerConfig = Field(description="How weights move.")
    phase_optimizers: dict[str, OptimizerConfig] = Field(
        {}, description="Optimizer of a phase where it is another, such as `discriminator`."
    )
    trainer: TrainerConfig = Field(description="The loop.")
    parallel: ParallelConfig = Field(ParallelConfig(), description="The mesh of processes.")
    samples: SamplesConfig | None = execution(None, description="Videos during training; null makes none.")
    held_out: HeldOutConfig | None = execution(None, description="Held-out loss during training; null measures none.")
    faults: FaultsConfig = execution(FaultsConfig(), description="Hangs, divergence, slow ranks and ranks that die.")
    wandb: WandbConfig = Field(WandbConfig(), description="Copy of the metrics to Weights & Biases.")

    @model_validator(mode="after")
    def _watched_model_is_a_dit(self) -> TrainConfig:
        watched = [name for name in ("samples", "held_out") if getattr(self, name) is not None]
        if watched and not isinstance(self.objective, TRAINS_A_DIT):
            raise ValueError(
                f"{' and '.join(watched)}: only objectives flow_matching, dpo and reward_weighted train a model for them, not "
                f"{self.objective.kind}; leave out what does not fit"
            )
        return self

    @model_validator(mode="after")
    def _pairs_and_who_reads_them(self) -> TrainConfig:
        kind, wants = self.objective.kind, isinstance(self.objective, READS_PAIRS)
        if wants and self.data.pairs is None:
            raise ValueError(
                f"objective {kind} compares clips of pairs: name a folder of preferences in data.pairs.path (`videofm dpo "
                "rank`, `annotate` or `import` writes one), and the dataset of their clips in data.manifest"
            )
        if not wants and self.data.pairs is not None:
            raise ValueError(
                f"data.pairs: objective {kind} reads single clips; leave it out, or take objective dpo, reward_weighted or "
                "reward"
            )
        return self

    @model_validator(mode="after")
    def _ties_are_possible(self) -> TrainConfig:
        ties = self.data.pairs is not None and self.data.pairs.ties
        if isinstance(self.objective, RewardTrainingConfig) and self.objective.theta == 1 and ties:
            raise ValueError(
                "objective.theta 1 says that clips never tie, and data.pairs.ties reads ties: set theta above 1 (5 is usual), "
                "or data.pairs.ties to false"
            )
        return self

    @model_validator(mode="after")
    def _frozen_encoders(self) -> TrainConfig:
        if problem := _encoded_problem(self.objective, self.data):
            raise ValueError(problem)
        where = next((name for name in ("cache", "online") if getattr(self.data, name) is not None), None)
        has_text = self.data.cache is None or "text" in self.data.cache.kinds
        if where is not None and getattr(self.objective, "train_text_encoder", False) and has_text:
            raise ValueError(
                f"data.{where} holds the text of a frozen encoder, and objective.train_text_encoder moves its weights in each "
                f"step; set one of them to false or null{', or data.cache.mode to one without text' * (where == 'cache')}"
            )
        return self

    @model_validator(mode="after")
    def _codebook_is_whole(self) -> TrainConfig:
        if isinstance(self.objective, LatentTokensConfig) and self.parallel.zero_stage == 3:
            raise ValueError(
                "parallel.zero_stage 3 with objective latent_tokens: codebooks are read between steps too, where stage 3 "
                "leaves each rank a part of them. Take zero_stage 2 or less"
            )
        return self

    @model_validator(mode="after")
    def _codebook_keeps_up(self) -> TrainConfig:
        if not isinstance(self.objective, LatentTokensConfig):
            return self
        tokenizer = self.models.get("tokenizer")
        quantizer = None if tokenizer is None else tokenizer.overrides.get("quantizer")
        decay = self.phase_optimizers.get("train", self.optimizer).ema_decay
        if decay > _CODEBOOK_EMA_DECAY and not (isinstance(quantizer, dict) and quantizer.get("kind") == "fsq"):
            raise ValueError(
                f"optimizer.ema_decay {decay:g} with objective latent_tokens: weights averaged over some {1 / (1 - decay):.0f} "
                "steps would be shipped beside a codebook that moves with the weights of the last ones, so that they do not "
                f"fit each other. Set optimizer.ema_decay to 0, or to {_CODEBOOK_EMA_DECAY} at most"
            )
        return self

    @model_validator(mode="after")
    def _reference_fits(self) -> TrainConfig:
        reference, policy = getattr(self.objective, "reference", None), self.models.get("dit")
        if reference is not None and policy is not None:
            problem = reference_problem(reference, policy.lora is not None, self.data, self.parallel.zero_stage)
            if problem is not None:
                raise ValueError(problem)
        held = self.models.get("reference")
        began = None if policy is None else policy.path or policy.init_from
        if began and held is not None and not (held.path or held.init_from or held.overrides.get("path")):
            raise ValueError(
                f"models.reference is new, with random weights, and models.dit starts from {began}: it would be held to noise. "
                "Give models.reference the same `path` or `init_from`"
            )
        return self

    @model_validator(mode="after")
    def _can_pack(self) -> TrainConfig:
        if self.data.packing is None:
            return self
        if not isinstance(self.objective, FlowMatchingConfig):
            raise ValueError(
                f"data.packing: objective {self.objective.kind} takes videos of one size; only flow_matching trains on the "
                "tokens of several. Leave it out, and data.buckets mixes sizes from step to step"
            )
        if self.objective.token_dropping is not None:
            raise ValueError(
                "data.packing and objective.token_dropping are two answers to clips of several sizes: packs keep all tokens, "
                "dropping cuts clips to one count. Take one of them"
            )
        if self.trainer.compile:
            raise ValueError(
                "data.packing with trainer.compile: packs have other documents in each step, and blocks would be compiled anew "
                "for each of them. Set trainer.compile to false, or leave data.packing out"
            )
        return self

    @model_validator(mode="after")
    def _data_degree_divides(self) -> TrainConfig:
        groups, degree = self.data.num_micro_batches, self.parallel.data_degree
        if groups % degree:
            raise ValueError(
                f"parallel.data_degree {degree} does not divide data.num_micro_batches {groups}; "
                f"take a multiple of {degree} micro-batches so that every rank gets as many"
            )
        return self


def _encoded_problem(objective: ObjectiveConfig, data: DataConfig) -> str | None:
    """Why an objective cannot train on what `data.cache` or `data.online` brings, or cannot do without; None where it can."""
    kind, cache, modes = objective.kind, data.cache, MODES_OF.get(objective.kind, ())
    rollouts = getattr(getattr(objective, "features", None), "rollouts", 0) > 0
    if cache is None and kind == "next_token":
        return (
            "objective next_token reads tokens and no pixels: run `videofm encode` with the section `tokens`, and name its run "
            "in data.cache.path, with data.cache.mode tokens"
        )
    if (cache is not None or data.online is not None) and not modes:
        return f"data.{'online' if cache is None else 'cache'}: objective {kind} needs pixels; leave it out"
    if data.online is not None and kind != "flow_matching":
        return f"data.online makes latents and text for objective flow_matching, not for {kind}; take data.cache in its place"
    if cache is not None and cache.mode not in modes:
        return f"data.cache.mode {cache.mode}: objective {kind} trains on {' or '.join(modes)}; set the mode to one of these"
    if rollouts != (cache is not None and cache.mode == "latents_tokens"):
        return (
            "objective.features.rollouts and data.cache.mode latents_tokens go together: what an AR model made of each clip is "
            f"stored beside its tokens. Now rollouts are {'on' if rollouts else 'off'} and the mode is "
            f"{'none' if cache is None else cache.mode}; change one of them"
        )
    return None
