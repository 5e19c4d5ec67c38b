"""The section of the objective that trains a reward model on preferences."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from videofm.config.base import Section


class RewardTrainingConfig(Section):
    """Train a model (role `reward`) to score clips so that the better one of a pair scores higher, by their latents (frozen
    role `vae`) and their caption (role `text_encoder`).

    It reads pairs (`data.pairs`), and learns from ties too: set data.pairs.ties where there are any. A score is linear in a
    last layer, and only differences of scores within a caption have a meaning.
    """

    kind: Literal["reward"]
    theta: float = Field(
        5.0,
        ge=1,
        allow_inf_nan=False,
        description="How readily two clips tie (Bradley-Terry with ties): with equal scores they do with probability "
        "(theta - 1) / (theta + 1). 1 has no ties.",
    )
    centre_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the squared mean of a pair's two scores, which keeps scores of different captions near 0 and so "
        "comparable, as reward-weighted training needs them; 0 leaves them free.",
    )
    latent_statistics_hash: str | None = Field(
        None, description="SHA-256 of the latent statistics that the VAE must have; null takes those that it has."
    )
    train_text_encoder: bool = Field(False, description="Train the role `text_encoder` along; false keeps it frozen.")
