"""The section about the measure of reward models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from videofm.config.base import Section, execution


class RewardMetric(Section):
    """How often a reward model agrees with preferences that it was not trained on, on each of its axes."""

    kind: Literal["reward"]
    run: str = Field(description="Training run of a reward model (objective reward), or a checkpoint of it.")
    pairs: str = Field(
        description="Folder of preferences to compare with: of other prompts than those of the training. The clips are those "
        "that it names."
    )
    split: Literal["train", "held_out"] = Field("train", description="Split of the clips; candidates lie in `train`.")
    num_pairs: int | None = Field(
        None, ge=1, description="Pairs to measure, at most, drawn by the seed; null takes all. Ties are among them."
    )
    on_bad: Literal["fail", "skip"] = Field("fail", description="What to do with a record that cannot be used: see data.pairs.")
    batch_size: int = execution(8, ge=1, description="Pairs computed together; memory grows with it.")


__all__ = ["RewardMetric"]
