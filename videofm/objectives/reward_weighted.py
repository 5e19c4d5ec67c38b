"""Reward-weighted flow matching (Flow-RWR; Liu et al. 2025, arXiv 2501.13918; spec C2) on the clips of pairs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from videofm.config.dpo import RewardWeightedConfig
from videofm.objectives.flow_matching import FlowMatchingObjective
from videofm.objectives.paired import draw_pairs, of_pairs
from videofm.objectives.preference_loss import Sides, frame_errors, reward_weight
from videofm.types import Batch, Loss, SampleRng


class RewardWeightedObjective:
    """Flow matching of `dit` on winners and losers alike, each clip weighted by what its reward says (see `reward_weight`).

    Which of two clips is the winner does not matter here, nor do weights of pairs and ties. The clips of a pair share their
    noise level and noise, as under dpo.
    """

    roles = FlowMatchingObjective.roles
    phases: Mapping[str, tuple[str, ...]] = {"train": ("dit",)}

    def __init__(self, config: RewardWeightedConfig) -> None:
        self.config = config
        self.flow = FlowMatchingObjective(config.flow_matching)

    def check(self, models: Mapping[str, nn.Module]) -> None:
        """Refuse models that do not fit the config.

        Raises:
            ConfigError: latent statistics with another hash than the config names, or a dit that features guide.
        """
        self.flow.check(models)

    def loss(self, models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng, phase: str) -> Loss:
        """Sums over the local pairs of the loss and of the metrics.

        The loss of a pair is the mean over its two clips of weight times mean squared velocity error. Of a pair, `mse` is that
        without weights, `reward` and `reward_weight` are the means over its clips, and `cut_weight` the share of them whose
        weight is cut at `max_weight`; with those of `PairedTokens.metrics`.

        Raises:
            ConfigError: the micro-batch has no rewards of clips.
        """
        rewards = of_pairs(batch, "rewards", "reward_weighted")  # (2P,)
        drawn = draw_pairs(self.flow, models, batch, rng, len(batch.captions) // 2)
        errors = frame_errors(drawn.residuals(self.flow, models["dit"]), 1).squeeze(1)  # (2P,)
        config = self.config
        weights = reward_weight(rewards, config.temperature, config.reward_offset, config.max_weight)
        total = _mean_of_sides(weights * errors).sum()
        metrics = {
            "loss": total.detach(),
            "mse": _mean_of_sides(errors.detach()).sum(),
            "reward": _mean_of_sides(rewards.float()).sum(),
            "reward_weight": _mean_of_sides(weights).sum(),
            "cut_weight": _mean_of_sides((weights >= config.max_weight).float()).sum(),
        }
        return Loss(total, metrics | drawn.metrics(models["dit"], models["text_encoder"]))


def _mean_of_sides(values: Tensor) -> Tensor:
    """Values `(2P,)` of clips as means of the two of each pair, `(P,)`."""
    sides = Sides.of(values)
    return (sides.winner + sides.loser) / 2
