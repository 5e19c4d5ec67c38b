"""The section of the objective that trains an autoregressive model over the tokens of a latent tokenizer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from videofm.config.base import Section


class NextTokenConfig(Section):
    """Train an autoregressive transformer (role `ar`) to predict the tokens of clips from their captions.

    The tokens are read, not made (`data.cache.mode: tokens`); the frozen role `tokenizer` says whose they are.
    """

    kind: Literal["next_token"]
    caption_dropout: float = Field(0.1, ge=0, le=1, description="Share of samples whose caption becomes empty (for guidance).")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of the target probability that is spread evenly over the vocabulary."
    )
    z_loss: float = Field(
        0.0, ge=0, description="Weight of (log of the sum of exp(logits))^2, which keeps logits from drifting; PaLM has 1e-4."
    )
    window: int | None = Field(
        None, ge=1, description="Token frames of a sample, cut at a random place out of longer clips; null takes whole clips."
    )
    first_window_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="With `window`: share of the cuts that begin with the clip; the others begin at any later token frame, and "
        "the model is told so by its `continue_token`. Only `continue_tokens` and `continue_windows` of "
        "videofm/sampling/autoregressive.py draw with that; `videofm sample` starts every window as a clip.",
    )
    train_text_encoder: bool = Field(False, description="Train the role `text_encoder` along; false keeps it frozen.")

    @model_validator(mode="after")
    def _share_of_cuts(self) -> NextTokenConfig:
        idle = type(self).model_fields["first_window_share"].default
        if self.window is None and self.first_window_share != idle:
            raise ValueError(
                f"first_window_share {self.first_window_share:g} without `window`: it is a share of the cuts of longer clips, "
                "and whole clips are not cut. Give `window`, or leave it out"
            )
        return self
