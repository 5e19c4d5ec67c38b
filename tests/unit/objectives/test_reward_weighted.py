"""Reward-weighted flow matching: the weight of a clip, and independence of what it is batched with."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tests.unit.objectives.paired_batches import PerToken, pairs, rng_of, roles
from videofm.config.dpo import RewardWeightedConfig
from videofm.errors import ConfigError
from videofm.objectives.reward_weighted import RewardWeightedObjective
from videofm.parallel.rng import KeyedRng
from videofm.types import Batch, Loss

REWARDS = torch.tensor([1.0, 0.5, 0.0, -0.5, 0.25, 2.0])
"""Of three winners, then of three losers."""


def make(**fields: Any) -> RewardWeightedObjective:
    base = {"kind": "reward_weighted", "caption_dropout": 0.0}
    return RewardWeightedObjective(RewardWeightedConfig.model_validate(base | fields))


def loss_of(batch: Batch, dit: PerToken, **fields: Any) -> Loss:
    return make(**fields).loss(roles(dit), batch, rng_of(batch), "train")


def errors_of(batch: Batch, dit: PerToken) -> list[float]:
    """Each clip's mean squared velocity error, one at a time and with all rewards at the offset, where weights are 1."""
    found, num_pairs = [], len(batch.captions) // 2
    for row in range(2 * num_pairs):
        one = replace(
            batch,
            video=batch.video[[row, row]],
            captions=[batch.captions[row]] * 2,
            fps=batch.fps[:2],
            sample_ids=[batch.sample_ids[row]] * 2,
            rewards=torch.zeros(2),
        )
        found.append(make().loss(roles(dit), one, KeyedRng(3, batch.step, one.sample_ids), "train").total.item())
    return found


def test_clips_are_weighted_by_their_rewards() -> None:
    """A pair's loss is the mean over its clips of exp((r - 1) / 0.5) err; only r = 2, whose weight e^2 > 5, is cut."""
    batch, dit = pairs(rewards=REWARDS), PerToken()
    found = loss_of(batch, dit, temperature=0.5, reward_offset=1.0, max_weight=5.0)
    errors = errors_of(batch, dit)
    weights = [min(5.0, math.exp((reward - 1) / 0.5)) for reward in REWARDS.tolist()]
    expected = sum(weight * error for weight, error in zip(weights, errors, strict=True)) / 2
    assert found.total.item() == pytest.approx(expected, rel=1e-5)
    wanted = {
        "loss": expected,
        "mse": sum(errors) / 2,
        "reward": REWARDS.sum().item() / 2,
        "reward_weight": sum(weights) / 2,
        "cut_weight": 0.5,
    }
    got = {name: value.item() for name, value in found.metrics.items()}
    assert {name: got[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert got["tokens"] == 6 * 12


def test_the_gradient_is_the_sum_over_pairs_however_they_are_batched() -> None:
    """No weight is divided by what it is batched with."""
    whole, dit = pairs(rewards=REWARDS), PerToken()
    loss_of(whole, dit, temperature=0.3).total.backward()
    wanted = [parameter.grad.clone() for parameter in dit.parameters() if parameter.grad is not None]
    assert len(wanted) == 3
    dit.zero_grad()
    for number in range(3):
        rows = [number, number + 3]
        fields = {"video": whole.video[rows], "captions": [whole.captions[row] for row in rows], "fps": whole.fps[rows]}
        fields |= {"sample_ids": [whole.sample_ids[row] for row in rows], "rewards": REWARDS[rows]}
        loss_of(replace(whole, **fields), dit, temperature=0.3).total.backward()
    for parameter, gradient in zip(dit.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_the_better_clip_pulls_more() -> None:
    """As the temperature falls, the pair comes to train on its better clip alone."""
    batch, dit = pairs(1, rewards=torch.tensor([0.0, -1.0])), PerToken()
    winner, loser = errors_of(batch, dit)
    for temperature in (1e6, 1.0, 0.01):
        found = loss_of(batch, dit, temperature=temperature).total.item()
        assert found == pytest.approx((winner + math.exp(-1 / temperature) * loser) / 2, rel=1e-5)


def test_clips_without_rewards_are_refused() -> None:
    with pytest.raises(ConfigError, match="objective reward_weighted reads rewards of pairs.*needs a score `overall`"):
        loss_of(pairs(), PerToken())


def test_latents_of_another_normalisation_are_refused() -> None:
    with pytest.raises(ConfigError, match="latent_statistics_hash is other"):
        make(latent_statistics_hash="other").check(roles(PerToken()))


@pytest.mark.parametrize(("field", "value"), [("temperature", 0.0), ("max_weight", 0.0)])
def test_values_that_mean_nothing_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        make(**{field: value})
