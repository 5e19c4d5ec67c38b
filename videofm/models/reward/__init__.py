"""The reward model: how good a clip is, by its latents and the text that it was asked for."""

from videofm.models.reward.adapter import ADAPTER
from videofm.models.reward.config import OVERALL, SIZES, VideoRewardConfig
from videofm.models.reward.model import VideoReward
from videofm.models.reward.parallelize import parallelize
from videofm.types import ModelSpec

SPEC = ModelSpec(VideoReward.spec_name, VideoRewardConfig, SIZES, VideoReward, parallelize, ADAPTER)

__all__ = ["ADAPTER", "OVERALL", "SIZES", "SPEC", "VideoReward", "VideoRewardConfig", "parallelize"]
