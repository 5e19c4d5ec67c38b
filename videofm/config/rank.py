"""The section of `videofm dpo rank`: which candidates are scored, by which reward, and which of them become pairs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from videofm.config.base import Section, execution


class AxisWeights(Section):
    """How much each axis counts in the overall score, a weighted mean; 0 leaves an axis out of it."""

    direction: float = Field(1.0, ge=0, allow_inf_nan=False, description="The shape moves where the caption says.")
    colour: float = Field(1.0, ge=0, allow_inf_nan=False, description="The shape has the colour of the caption.")
    shape: float = Field(1.0, ge=0, allow_inf_nan=False, description="The shape has the outline that the caption names.")
    smoothness: float = Field(1.0, ge=0, allow_inf_nan=False, description="The shape moves evenly.")

    @model_validator(mode="after")
    def _some(self) -> AxisWeights:
        if self.direction + self.colour + self.shape + self.smoothness == 0:
            raise ValueError("all weights are 0, and nothing is left to rank by; give at least one axis a weight above 0")
        return self


class MovingShapesReward(Section):
    """Rules for videos of the demo set: direction, colour and shape of the caption, and how evenly the shape moves."""

    kind: Literal["moving_shapes"]
    weights: AxisWeights = Field(AxisWeights(), description="Weights of the axes in the overall score.")


class ModelReward(Section):
    """A reward model that was trained on preferences (objective `reward`)."""

    kind: Literal["model"]
    run: str = Field(description="Training run of a reward model, or a checkpoint of it.")


RewardConfig = Annotated[MovingShapesReward | ModelReward, Field(discriminator="kind")]


class RankConfig(Section):
    """Score the candidate videos of each prompt, and write which of two is the better one as preferences."""

    kind: Literal["dpo_rank"]
    manifest: str = Field(description="Candidates: the run directory of `videofm dpo generate`, or any folder of shards.")
    reward: RewardConfig = Field(description="What scores a video; larger is better.")
    pairs: Literal["best_worst", "all", "adjacent"] = Field(
        "best_worst",
        description="Which candidates of a prompt make pairs: the best with the worst, the second best with the second worst "
        "and so on; each with each; each with the next in order.",
    )
    num_pairs: int | None = Field(
        None,
        ge=1,
        description="Pairs of a prompt, at most: those whose scores differ most. Null takes one for best_worst, else all.",
    )
    margin: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Pairs whose overall scores differ by less are ties; equal ones always are."
    )
    require_axes: list[str] = Field(
        [], description="Axes on which the winner must not be worse than the loser; pairs that contradict are left out."
    )
    rarity_alpha: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Exponent of the weight of a pair by how rare its difference of scores is (VideoDPO); 0 weighs all alike.",
    )
    rarity_bins: int = Field(10, ge=1, description="Bins of the histogram of differences that rarity is read from.")
    max_pairs: int | None = Field(
        None, ge=1, description="Pairs in all, at most, ties apart: drawn by `seed` and the pair. Null takes all."
    )
    seed: int = Field(0, ge=0, description="Seed of the draw of `max_pairs`.")
    on_bad: Literal["fail", "skip"] = Field(
        "fail",
        description="What to do with a candidate that does not decode, that the reward cannot judge, or that is the same file "
        "as another of its prompt: stop, or leave it out and count it.",
    )
    batch_size: int = execution(16, ge=1, description="Candidates decoded and scored together; memory grows with it.")


__all__ = ["AxisWeights", "ModelReward", "MovingShapesReward", "RankConfig", "RewardConfig"]
