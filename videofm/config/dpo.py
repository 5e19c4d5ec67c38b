"""The sections of the objectives that read pairs of clips to tune a diffusion transformer: dpo and reward_weighted."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from videofm.config.base import Section
from videofm.config.flow_matching import FlowMatchingConfig, NoiseLevels, ShiftedLogitNormalNoiseLevels
from videofm.config.reference import ReferenceConfig


class FlowFields(BaseModel):
    """What these objectives share with flow_matching: how a clip is noised, and what is told of it."""

    noise_levels: NoiseLevels = Field(
        ShiftedLogitNormalNoiseLevels(kind="shifted_logit_normal"),
        description="Law of the noise level sigma, which the two clips of a pair share.",
    )
    causal_fix: bool = Field(
        False,
        description="Date latent frames by the first pixel frame that they hold, as the policy was trained before.",
    )
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="Share of pairs whose caption becomes empty, for both clips (for guidance)."
    )
    latent_statistics_hash: str | None = Field(
        None, description="SHA-256 of the latent statistics that the VAE must have; null takes those that it has."
    )

    @property
    def flow_matching(self) -> FlowMatchingConfig:
        """Flow matching with these fields, and nothing else."""
        shared = {name: getattr(self, name) for name in FlowFields.model_fields}
        return FlowMatchingConfig(kind="flow_matching", **shared)


class DPOConfig(FlowFields, Section):
    """Flow-DPO: tune a diffusion transformer (role `dit`) to prefer the winners of pairs, in the space of a frozen `vae`."""

    kind: Literal["dpo"]
    reference: ReferenceConfig = Field(description="The model that the policy is held to, and where it is kept.")
    beta: float = Field(
        500.0,
        gt=0,
        description="Steepness of the loss -log sigmoid(-beta / 2 * margin); the larger, the smaller the difference of errors "
        "at which a pair counts as learned. With means of squares (error_reduction) 100 to 5000 are in use.",
    )
    beta_schedule: Literal["constant", "quadratic"] = Field(
        "constant", description="`quadratic` multiplies beta by (1 - sigma)^2, which leaves out high noise levels."
    )
    error_reduction: Literal["mean", "sum"] = Field(
        "mean",
        description="Reduction of a clip's squared error under beta. `sum` multiplies beta by the number of latent elements "
        "of a clip (effective_beta in the log), so beta has to be that much smaller; the log has means either way.",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs that are taken to be labelled the wrong way round; 0 trusts all."
    )
    winner_weight: float = Field(
        0.0, ge=0, description="Weight of the winner's mean squared error, added to the loss of the pair; 0 adds none."
    )
    loser_safeguard: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Scale the loser's gradient down until, to first order, the winner's error cannot rise (Diffusion-SDPO): "
        "at 1 it may stand still, smaller is stricter. null does not scale.",
    )
    segments: bool = Field(
        False, description="Compare by segments, where pairs have labels of them (DenseDPO); a pair without counts as a whole."
    )

    @model_validator(mode="after")
    def _safeguard_of_one_direction(self) -> DPOConfig:
        if self.loser_safeguard is not None and self.label_smoothing > 0:
            raise ValueError(
                f"loser_safeguard {self.loser_safeguard:g} with label_smoothing {self.label_smoothing:g}: smoothing pulls "
                "pairs that are well apart together again, by raising the winner's error. Leave one of them out"
            )
        return self


class RewardWeightedConfig(FlowFields, Section):
    """Tune a diffusion transformer (role `dit`) on the clips of pairs, each weighted by exp(reward / temperature): Flow-RWR."""

    kind: Literal["reward_weighted"]
    temperature: float = Field(1.0, gt=0, description="Difference of rewards by which the weight grows e times.")
    reward_offset: float = Field(
        0.0, description="Reward whose weight is 1; the highest one, where known, keeps all weights at most 1."
    )
    max_weight: float = Field(20.0, gt=0, description="Largest weight of a clip; larger ones are cut, and counted in the log.")
