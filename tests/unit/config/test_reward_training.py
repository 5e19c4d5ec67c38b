"""Which sections a training of a reward model needs, and which it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from videofm.config.reward import RewardTrainingConfig
from videofm.config.train import TrainConfig


def config(objective: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **fields: Any) -> TrainConfig:
    names = {"reward": "reward/video", "vae": "vae/ltx", "text_encoder": "text/t5"}
    clips = {"manifest": "clips", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 2, "start": "first"}
    base = {
        "kind": "train",
        "models": {role: {"name": name} for role, name in names.items()},
        "objective": {"kind": "reward"} | (objective or {}),
        "data": clips | {"pairs": {"path": "preferences", "ties": True}} | (data or {}),
        "optimizer": {"lr": 1e-4},
        "trainer": {"max_steps": 1},
    }
    return TrainConfig.model_validate(base | fields)


def test_what_it_takes() -> None:
    found = config().objective
    assert isinstance(found, RewardTrainingConfig) and found.theta == 5.0
    for mode in ("text", "latents", "full"):
        assert config(data={"cache": {"path": "encoded", "mode": mode}}).data.cache is not None


def test_it_needs_pairs() -> None:
    with pytest.raises(ValidationError, match="objective reward compares clips of pairs: name a folder .* data.pairs.path"):
        config(data={"pairs": None})


def test_ties_need_a_theta_above_one() -> None:
    with pytest.raises(ValidationError, match="objective.theta 1 says that clips never tie, and data.pairs.ties reads ties"):
        config({"theta": 1})
    assert config({"theta": 1}, {"pairs": {"path": "preferences"}}).objective.kind == "reward"


@pytest.mark.parametrize("theta", [0.9, float("inf"), float("nan")])
def test_a_theta_that_is_no_probability_is_refused(theta: float) -> None:
    with pytest.raises(ValidationError, match="objective.reward.theta"):
        config({"theta": theta})


def test_tokens_are_not_what_it_trains_on() -> None:
    with pytest.raises(ValidationError, match="data.cache.mode tokens: objective reward trains on text or latents or full"):
        config(data={"cache": {"path": "encoded", "mode": "tokens"}})


def test_cached_text_is_that_of_a_frozen_encoder() -> None:
    with pytest.raises(
        ValidationError, match="data.cache holds the text of a frozen encoder, and objective.train_text_encoder"
    ):
        config({"train_text_encoder": True}, {"cache": {"path": "encoded", "mode": "full"}})
    assert config({"train_text_encoder": True}, {"cache": {"path": "encoded", "mode": "latents"}}).data.cache is not None


def test_it_makes_no_videos() -> None:
    watched = {"every": 1, "prompts": ["a"], "num_frames": 9, "height": 32, "width": 32, "fps": 8.0}
    with pytest.raises(ValidationError, match="samples"):
        config(samples=watched)
