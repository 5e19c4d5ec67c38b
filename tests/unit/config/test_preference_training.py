"""Which sections a training on pairs needs, and which it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from videofm.config.dpo import DPOConfig
from videofm.config.flow_matching import FlowMatchingConfig
from videofm.config.train import TrainConfig

OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo", "reference": {"kind": "frozen"}},
    "reward_weighted": {"kind": "reward_weighted"},
    "flow_matching": {"kind": "flow_matching"},
}


def config(kind: str, data: dict[str, Any] | None = None, **fields: Any) -> TrainConfig:
    names = {"dit": "dit/ltx", "vae": "vae/ltx", "text_encoder": "text/t5"}
    own = {} if kind == "flow_matching" else {"pairs": {"path": "preferences"}}
    base = {
        "kind": "train",
        "models": {role: {"name": name} for role, name in names.items()},
        "objective": OBJECTIVES[kind],
        "data": {"manifest": "clips", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 2} | own | (data or {}),
        "optimizer": {"lr": 1e-4},
        "trainer": {"max_steps": 1},
    }
    return TrainConfig.model_validate(base | fields)


@pytest.mark.parametrize("kind", ["dpo", "reward_weighted"])
def test_what_a_training_on_pairs_takes(kind: str) -> None:
    watched = {
        "samples": {"every": 1, "prompts": ["a"], "num_frames": 9, "height": 32, "width": 32, "fps": 8.0},
        "held_out": {"every": 1, "manifest": "elsewhere"},
    }
    for mode in ("text", "latents", "full"):
        changes: dict[str, Any] = {"cache": {"path": "encoded", "mode": mode}}
        if mode != "text":
            changes |= {"start": "first"}
        assert config(kind, changes, **watched).objective.kind == kind


@pytest.mark.parametrize("kind", ["dpo", "reward_weighted"])
def test_it_needs_pairs(kind: str) -> None:
    with pytest.raises(ValidationError, match=f"objective {kind} compares clips of pairs: name a folder .* data.pairs.path"):
        config(kind, {"pairs": None})


def test_others_take_no_pairs() -> None:
    with pytest.raises(ValidationError, match="data.pairs: objective flow_matching reads single clips"):
        config("flow_matching", {"pairs": {"path": "preferences"}})


def test_tokens_are_not_what_it_trains_on() -> None:
    with pytest.raises(ValidationError, match="data.cache.mode tokens: objective dpo trains on text or latents or full"):
        config("dpo", {"cache": {"path": "encoded", "mode": "tokens"}, "start": "first"})


def test_flow_matching_with_the_same_fields() -> None:
    """What held-out loss and samples are made with: the shared fields, each as it is set."""
    shared = {
        "noise_levels": {"kind": "uniform"},
        "causal_fix": True,
        "caption_dropout": 0.3,
        "latent_statistics_hash": "abc",
    }
    found = DPOConfig.model_validate(OBJECTIVES["dpo"] | shared).flow_matching
    assert found == FlowMatchingConfig.model_validate({"kind": "flow_matching"} | shared)
