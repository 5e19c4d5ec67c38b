"""Rewards: numbers that say which of two videos of a prompt is better. Rules for the demo set, and trained models."""

from videofm.reward.base import OVERALL, Reward, reward_of

__all__ = ["OVERALL", "Reward", "reward_of"]
