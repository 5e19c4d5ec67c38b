"""No public release has this model: its public layout is our own."""

from __future__ import annotations

from videofm.models.own_layout import OwnLayout
from videofm.models.reward.config import VideoRewardConfig

ADAPTER = OwnLayout(
    "VideofmVideoReward",
    VideoRewardConfig,
    ("proj_in", "caption_norm", "caption_projection", "axis_tokens", "blocks", "out_norm", "head"),
)
