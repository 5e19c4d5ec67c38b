"""The section of the flow-matching objective: laws of the noise level, what a sample is given clean, dropping, features."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from videofm.config.base import Section


class UniformNoiseLevels(Section):
    """sigma uniform in [0, 1]."""

    kind: Literal["uniform"]


class LogitNormalNoiseLevels(Section):
    """sigma = sigmoid(n), n ~ Normal(mean, std)."""

    kind: Literal["logit_normal"]
    mean: float = Field(0.0, description="Mean of n.")
    std: float = Field(1.0, gt=0, description="Standard deviation of n.")


class ShiftedLogitNormalNoiseLevels(Section):
    """LTX-Video: sigma = sigmoid(n), n ~ Normal(mu(L), std), mu linear in the token count L of a whole clip."""

    kind: Literal["shifted_logit_normal"]
    std: float = Field(1.0, gt=0, description="Standard deviation of n.")
    base_tokens: int = Field(1024, ge=1, description="Token count at which mu = base_shift.")
    max_tokens: int = Field(4096, ge=1, description="Token count at which mu = max_shift.")
    base_shift: float = Field(0.95, description="mu at base_tokens.")
    max_shift: float = Field(2.05, description="mu at max_tokens; the line goes on at both ends.")
    tails: Literal["plain", "floor", "stretch"] = Field(
        "plain",
        description="Outside of the 0.5 and 99.9 percentiles: `plain` leaves the law alone, `floor` keeps its density constant "
        "there (the paper), `stretch` maps the percentiles to 0 and 1, and draws one level in ten uniformly (newer trainers).",
    )

    @model_validator(mode="after")
    def _a_line(self) -> ShiftedLogitNormalNoiseLevels:
        if self.base_tokens == self.max_tokens:
            raise ValueError(f"base_tokens and max_tokens are both {self.base_tokens}; two different counts make a line")
        return self


class ModeNoiseLevels(Section):
    """Stable Diffusion 3: mass around the middle, or away from it, and a density that does not vanish at 0 and 1."""

    kind: Literal["mode"]
    scale: float = Field(
        1.29, ge=-1, le=2 / (math.pi - 2), description="s of the paper: above 0 prefers the middle, 0 is uniform."
    )


class UShapedNoiseLevels(Section):
    """Step-Video turbo: density in proportion to exp(a * sigma) + exp(a * (1 - sigma)), symmetric, least at 0.5."""

    kind: Literal["u_shaped"]
    steepness: float = Field(5.0, gt=0, description="a.")


BaseNoiseLevels = Annotated[
    UniformNoiseLevels | LogitNormalNoiseLevels | ShiftedLogitNormalNoiseLevels | ModeNoiseLevels | UShapedNoiseLevels,
    Field(discriminator="kind"),
]


class ConstantShiftNoiseLevels(Section):
    """Step-Video, SD3: levels of another law moved by sigma -> s * sigma / (1 + (s - 1) * sigma)."""

    kind: Literal["constant_shift"]
    shift: float = Field(gt=0, description="s: 1 changes nothing, above 1 means more noise.")
    base: BaseNoiseLevels = Field(UniformNoiseLevels(kind="uniform"), description="The law that is moved.")


class ResolutionShiftNoiseLevels(Section):
    """Open-Sora: the same with s = scale * sqrt(height * width / base_pixels) * sqrt(latent frames / base_frames)."""

    kind: Literal["resolution_shift"]
    base_pixels: int = Field(512 * 512, ge=1, description="Pixels of a frame at which s = scale, for base_frames.")
    base_frames: int = Field(1, ge=1, description="Latent frames at which s = scale, for base_pixels.")
    scale: float = Field(1.0, gt=0, description="Factor of s.")
    base: BaseNoiseLevels = Field(LogitNormalNoiseLevels(kind="logit_normal"), description="The law that is moved.")


NoiseLevels = Annotated[
    UniformNoiseLevels
    | LogitNormalNoiseLevels
    | ShiftedLogitNormalNoiseLevels
    | ModeNoiseLevels
    | UShapedNoiseLevels
    | ConstantShiftNoiseLevels
    | ResolutionShiftNoiseLevels,
    Field(discriminator="kind"),
]


class ContinuationConfig(Section):
    """Some first latent frames are given; the model goes on from there."""

    probability: float = Field(0.0, ge=0, le=1, description="Share of samples.")
    num_frames: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 2, 3], min_length=1, description="Counts of latent frames to choose from; those that would be a whole clip are not."
    )


class InpaintingConfig(Section):
    """All is given but a random box of latent cells over time, height and width."""

    probability: float = Field(0.0, ge=0, le=1, description="Share of samples.")
    min_size: float = Field(0.25, gt=0, le=1, description="Smallest share of each axis that the box covers; at least a cell.")
    max_size: float = Field(0.75, gt=0, le=1, description="Largest share of each axis that the box covers.")

    @model_validator(mode="after")
    def _ordered(self) -> InpaintingConfig:
        if self.min_size > self.max_size:
            raise ValueError(f"min_size {self.min_size} is above max_size {self.max_size}: no box has such a size")
        return self


class ConditioningConfig(Section):
    """What a sample is given clean besides its text, drawn for each sample; the rest of the samples sees text only.

    Given tokens bear no loss. A clip too short for a mode (one frame for `first_frame`, two for `first_and_last`, no shorter
    count for `continuation`) sees text only in its place.
    """

    first_frame: float = Field(0.0, ge=0, le=1, description="Share of samples given their first latent frame (image to video).")
    first_and_last: float = Field(0.0, ge=0, le=1, description="Share of samples given first and last latent frame.")
    continuation: ContinuationConfig = Field(ContinuationConfig(), description="Samples given several first latent frames.")
    inpainting: InpaintingConfig = Field(InpaintingConfig(), description="Samples given all but a box.")
    condition_sigma: float = Field(
        0.0, ge=0, le=1, description="What is given has a noise level uniform in [0, this], one a sample; 0 gives it clean."
    )

    @model_validator(mode="after")
    def _shares(self) -> ConditioningConfig:
        total = self.first_frame + self.first_and_last + self.continuation.probability + self.inpainting.probability
        if total > 1 + 1e-9:
            raise ValueError(f"the probabilities of the modes add up to {total:g}; they are shares of all samples, at most 1")
        return self


class TokenDroppingConfig(Section):
    """LTX-Video: every sample is cut to the same number of tokens, so that clips of several sizes cost the same."""

    num_tokens: int = Field(ge=1, description="Tokens that stay of each sample, drawn at random; no clip may have fewer.")


class CorruptionConfig(Section):
    """Some tokens of a sample are replaced, as an autoregressive model errs: by any other id of the codebook, uniform."""

    probability: float = Field(0.0, ge=0, le=1, description="Share of samples whose tokens are corrupted; 0 is off.")
    fraction: float = Field(0.1, gt=0, le=1, description="Probability of each token of such a sample to be replaced.")

    @model_validator(mode="after")
    def _is_on(self) -> CorruptionConfig:
        if not self.probability and self.fraction != type(self).model_fields["fraction"].default:
            raise ValueError(
                f"fraction {self.fraction:g} with probability 0: no sample is corrupted, so that nothing reads it. Give a "
                "probability above 0, or leave it out"
            )
        return self


class FeaturesConfig(Section):
    """ARLON: features of the frozen role `tokenizer` guide the `dit`, which needs `models.dit.injection`.

    In training they are made of the clip's own latents, encoded to tokens and decoded again; in sampling an autoregressive
    model predicts the tokens, with errors. The switches here make the dit tolerate these, besides a coarser tokenizer than that
    of sampling: any two are interchangeable, because each decodes to features of the shape of the latents.
    """

    dropout: float = Field(
        0.1, ge=0, le=1, description="Share of samples that see the learned null feature in the place of theirs (for guidance)."
    )
    uncertainty: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of samples whose mean and spread of each feature channel are moved by as much as these differ "
        "between the samples of the micro-batch (a micro-batch of one sample has no such difference); 0 is off.",
    )
    corruption: CorruptionConfig = Field(CorruptionConfig(), description="Random tokens in the place of some.")
    rollouts: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of samples whose features are those that an autoregressive model predicted: the rollouts in the "
        "cache (data.cache.mode latents_tokens), decoded by the role `fine_tokenizer`, which is needed above 0.",
    )


class FlowMatchingConfig(Section):
    """Train a diffusion transformer (role `dit`) by flow matching in the latent space of a frozen `vae`."""

    kind: Literal["flow_matching"]
    noise_levels: NoiseLevels = Field(
        ShiftedLogitNormalNoiseLevels(kind="shifted_logit_normal"), description="Law of the noise level sigma of a sample."
    )
    sigma_per: Literal["sample", "frame"] = Field(
        "sample", description="`frame`: each latent frame of a sample has a noise level of its own (diffusion forcing)."
    )
    loss_weighting: Literal["none", "sigma_sqrt", "cosmap"] = Field(
        "none",
        description="Weight of a token's squared velocity error at its sigma, with the names of diffusers: `sigma_sqrt` is "
        "1 / sigma^2 (at most 1e6), `cosmap` 2 / (pi * (1 - 2 * sigma + 2 * sigma^2)).",
    )
    conditioning: ConditioningConfig = Field(ConditioningConfig(), description="What a sample is given besides its text.")
    token_dropping: TokenDroppingConfig | None = Field(None, description="Cut samples to one token count; null keeps all.")
    causal_fix: bool = Field(
        False,
        description="Date latent frames by the first pixel frame that they hold. False is the convention of LTXPipeline, true "
        "that of LTXConditionPipeline; sampling must use the same.",
    )
    caption_dropout: float = Field(0.1, ge=0, le=1, description="Share of samples whose caption becomes empty (for guidance).")
    train_text_encoder: bool = Field(False, description="Train the role `text_encoder` along; false keeps it frozen.")
    latent_statistics_hash: str | None = Field(
        None, description="SHA-256 of the latent statistics that the VAE must have; null takes those that it has."
    )
    features: FeaturesConfig | None = Field(
        None, description="Guide the dit by features of the role `tokenizer`; null trains without, and takes no such role."
    )
