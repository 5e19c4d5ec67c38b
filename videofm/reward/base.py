"""What a reward is: something that looks at videos and their captions, and says in numbers how good they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from videofm.media import Frames
from videofm.registry import REWARDS, lookup

OVERALL = "overall"
"""The axis that candidates are ranked by; every reward gives it."""


class Reward(Protocol):
    """Scores videos. It is built from its section of the config (`videofm/config/rank.py`), and larger is better."""

    def score(self, videos: Sequence[Frames], captions: Sequence[str]) -> list[dict[str, float]]:
        """Axis -> score of each video, `overall` among them.

        A score depends on its own video and caption alone, not on what else is scored with them.

        Args:
            videos: RGB uint8 `(T, H, W, 3)`; lengths and sizes may differ.
            captions: one for each.

        Raises:
            DataError: a caption or a video cannot be judged; the message says which and why.
        """
        ...


def reward_of(config: Any) -> Reward:
    """The reward that the section `config` describes, by its `kind`."""
    reward: Reward = lookup(REWARDS, config.kind, "reward")(config)
    return reward
