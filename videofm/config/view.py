"""A view: which clips of a dataset count, as rules over the scores and facts of its index."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from videofm.config.base import Section

Fact = Literal["num_frames", "fps", "height", "width", "duration", "aspect", "pixels", "bytes", "caption_length"]


class ViewRuleConfig(Section):
    """Bounds on one number of a clip. Both bounds are inclusive; a clip outside of them is dropped."""

    score: str | None = Field(
        None, pattern=r"^[a-z][a-z0-9_]{0,63}$", description="A score that curation stored, for example `motion`."
    )
    field: Fact | None = Field(
        None,
        description="A fact in place of a score. `duration` is in seconds, `aspect` is width / height, `pixels` is height x "
        "width, `bytes` the size of the video file, `caption_length` the characters of the caption.",
    )
    min: float | None = Field(None, description="Smallest value that stays, in the unit of the score or fact.")
    max: float | None = Field(None, description="Largest value that stays, in the unit of the score or fact.")
    min_quantile: float | None = Field(
        None, ge=0, lt=1, description="Drop this share of the clips, those with the smallest values, as a fraction."
    )
    max_quantile: float | None = Field(
        None, gt=0, le=1, description="Keep this share of the clips, those with the smallest values, as a fraction."
    )
    missing: Literal["error", "drop", "keep"] = Field(
        "error", description="What becomes of clips without this score: it is an error, or they are dropped or kept."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ViewRuleConfig:
        if (self.score is None) == (self.field is None):
            raise ValueError("a rule is about one number: give either `score` or `field`")
        if self.field is not None and self.missing != "error":
            raise ValueError(f"missing: {self.missing} has no effect, no clip is without the field {self.field}; leave it out")
        for side, bound, quantile in (("min", self.min, self.min_quantile), ("max", self.max, self.max_quantile)):
            if bound is not None and quantile is not None:
                raise ValueError(f"{side} {bound:g} and {side}_quantile {quantile:g} both bound it; keep one of them")
        if (self.min, self.max, self.min_quantile, self.max_quantile) == (None,) * 4:
            raise ValueError("a rule without a bound drops nothing; give min, max, min_quantile or max_quantile")
        for low, high in ((self.min, self.max), (self.min_quantile, self.max_quantile)):
            if low is not None and high is not None and low >= high:
                raise ValueError(f"the lower bound {low:g} is not below the upper bound {high:g}: no clip could stay")
        return self

    @property
    def about(self) -> str:
        """The score or field that the rule is about."""
        return self.score or str(self.field)


class ViewConfig(Section):
    """Which clips of a dataset count: those that every rule keeps. Nothing is deleted; thresholds can change at any time.

    Quantiles are taken over all clips of `splits` that have the value, whatever other rules say, so the order of rules does not
    matter.
    """

    kind: Literal["view"] = "view"
    splits: list[Literal["train", "held_out"]] = Field(
        ["train", "held_out"], min_length=1, description="Splits whose clips the view holds; the others are dropped."
    )
    rules: dict[str, ViewRuleConfig | None] = Field(
        min_length=1, description="Rules by name; null takes a rule of the file that this one `extends` away."
    )

    @model_validator(mode="after")
    def _named(self) -> ViewConfig:
        if len(set(self.splits)) < len(self.splits):
            raise ValueError(f"splits {self.splits} names one twice; list it once")
        if not any(self.rules.values()):
            raise ValueError("every rule is null: a view without a rule is the dataset itself; leave the view out")
        return self
