"""A reward model learns from preferences: Bradley-Terry with ties over its scores (Step-Video, arXiv 2502.10248, section on
Video-DPO; Liu et al. 2025, arXiv 2501.13918; spec A9, C2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from videofm.config.reward import RewardTrainingConfig
from videofm.errors import ConfigError
from videofm.objectives.bradley_terry import outcome_nll
from videofm.objectives.host import from_host
from videofm.objectives.latents import check_statistics, clean_latents, encoded_latents
from videofm.objectives.paired import of_pairs
from videofm.objectives.texts import cut_shares, text_of
from videofm.types import Batch, Conditioning, Loss, SampleRng

SIGNS = {"winner": 1.0, "loser": -1.0, "tie": 0.0}
"""What a vote on an axis says of the winner's score minus the loser's."""


@dataclass(frozen=True)
class Votes:
    """What was judged of P pairs on A axes: `sign` `(P, A)` float32 is 1 where the winner of the pair is better on the axis, -1
    where its loser is, 0 where they tie; `judged` `(P, A)` bool is False where nobody said; `weight` `(P, 1)` is the pair's."""

    sign: Tensor
    judged: Tensor
    weight: Tensor


class RewardObjective:
    """Scores by `reward` of the clips of pairs, whose latents are those of `vae` and whose captions `text_encoder` reads."""

    roles: tuple[str, ...] = ("reward", "vae", "text_encoder")

    def __init__(self, config: RewardTrainingConfig) -> None:
        self.config = config
        trained = ("reward", "text_encoder") if config.train_text_encoder else ("reward",)
        self.phases: Mapping[str, tuple[str, ...]] = {"train": trained}

    def check(self, models: Mapping[str, nn.Module]) -> None:
        """Refuse models that do not fit together.

        Raises:
            ConfigError: latents of other channels or statistics, or text that the reward model does not take.
        """
        check_statistics(models["vae"], self.config.latent_statistics_hash)
        check_reward(models)

    def loss(self, models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng, phase: str) -> Loss:
        """Sums over the local pairs of the loss and of the metrics.

        The loss of a pair is the mean over the model's axes of `weight * nll`, with nll that of `bradley_terry.outcome_nll` for
        what was judged on the axis: on `overall` which clip won or that they tie, on any other what `batch.pair_axes` says,
        nothing where it says nothing. The weight is that of the pair, and 1 for ties, whose own weight is 0: a tie prefers
        nothing, but it tells how close two scores are. `centre_weight * ((a + b) / 2)^2`, the mean over axes, is added.

        Of `overall`: `nll` without weights, `accuracy` (1 where the winner scores higher; one half for ties and equal scores),
        `tied`, and `score_gap`, the winner's score minus the loser's, 0 for ties. Of any other axis: `nll/AXIS`,
        `accuracy/AXIS` (one half also where nothing was judged) and `voted/AXIS`. What the clips of a pair cost: `tokens`,
        `text_tokens`, `padding_share`, `flops`. `cut_NAME` is the share of captions longer than the encoder of that name takes.

        One draw, keyed by pair: `posterior`, where latents are sampled; both clips of a pair get the same.

        Raises:
            ConfigError: a micro-batch without pairs, or whose pairs have no votes on an axis of the model; latents in place of
                the pixels that a greyscale model needs; a tie on an axis with theta 1.
        """
        reward: Any = models["reward"]
        num_pairs = len(of_pairs(batch, "pair_weights", self.config.kind))
        captions = batch.captions[:num_pairs]
        latents = _latents(models, batch, rng)
        text = text_of(models["text_encoder"], batch, batch.captions, self.config.train_text_encoder)
        winner, loser = reward(latents, text).chunk(2)  # (P, A) each
        votes = self._votes(batch, reward.config.axes, winner)
        nll = outcome_nll(winner - loser, votes.sign, self.config.theta)
        nll = torch.where(votes.judged, nll, 0.0)
        loss = votes.weight * nll
        if self.config.centre_weight:
            loss = loss + self.config.centre_weight * ((winner + loser) / 2).square()
        total = loss.mean(dim=1).sum()
        metrics = {"loss": total.detach()} | _measures(reward.config.axes, (winner - loser).detach(), nll.detach(), votes)
        metrics |= _cost(reward, latents, text, total)
        return Loss(total, metrics | cut_shares(models["text_encoder"], captions, total))

    def _votes(self, batch: Batch, axes: tuple[str, ...], like: Tensor) -> Votes:
        """What was judged of each pair on each of `axes`, on the device of `like`."""
        ties, weights = batch.pair_ties, batch.pair_weights
        assert ties is not None and weights is not None
        signs, judged = [torch.where(ties, 0.0, 1.0)], [torch.ones_like(ties)]
        for axis in axes[1:]:
            choices = self._choices(batch, axis)
            signs.append(from_host([SIGNS[choice or "tie"] for choice in choices], like.device, torch.float32))
            judged.append(from_host([choice is not None for choice in choices], like.device, torch.bool))
        weight = torch.where(ties, 1.0, weights)[:, None]  # (P,) -> (P, 1)
        return Votes(torch.stack(signs, dim=1), torch.stack(judged, dim=1), weight)

    def _choices(self, batch: Batch, axis: str) -> list[str | None]:
        """`winner`, `loser`, `tie` or None for each pair on `axis`."""
        if batch.pair_axes is None:
            raise ConfigError(
                f"the reward model has the axis {axis!r}, and the pairs of this micro-batch have no votes by axis: read "
                "preferences that have them (`axes` of a pair), or leave the axis out of models.reward.overrides.axes."
            )
        choices = [votes.get(axis) for votes in batch.pair_axes]
        if self.config.theta == 1.0 and "tie" in choices:
            raise ConfigError(
                f"pair {batch.sample_ids[choices.index('tie')]} is a tie on axis {axis!r}, which objective.theta 1 makes "
                "impossible: set theta above 1 (5 is usual), or leave the axis out."
            )
        return choices


def check_reward(models: Mapping[str, nn.Module]) -> None:
    """Refuse a role `reward` that does not take the latents of `vae` and the text of `text_encoder`.

    Raises:
        ConfigError: it does not, or is no reward model.
    """
    reward: Any = models["reward"]
    text_encoder: Any = models["text_encoder"]
    if not hasattr(reward.config, "axes"):
        raise ConfigError(f"role reward is {reward.spec_name}, which scores nothing: take reward/video.")
    wanted, found = reward.config.latent_channels, models["vae"].latent_channels
    if wanted != found:
        raise ConfigError(
            f"the reward model takes latents of {wanted} channels, and the VAE gives {found}: set "
            f"models.reward.overrides.latent_channels to {found}."
        )
    if hasattr(text_encoder.config, "clip_width"):
        raise ConfigError(
            f"{text_encoder.spec_name} gives the text of two encoders, and a reward model takes that of one: take text/t5."
        )
    if reward.config.caption_channels != text_encoder.config.width:
        raise ConfigError(
            f"the reward model takes text of {reward.config.caption_channels} channels, and the text encoder gives "
            f"{text_encoder.config.width}: set models.reward.overrides.caption_channels to {text_encoder.config.width}."
        )


def _latents(models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> Tensor:
    """Normalised latents `(2P, C, T, H, W)` of what the reward model sees of the clips."""
    reward: Any = models["reward"]
    if not reward.config.greyscale:
        return clean_latents(models["vae"], batch, rng)
    if batch.latents is not None:
        raise ConfigError(
            "the reward model is greyscale, so that its VAE encodes grey pixels, and the micro-batch brings latents of "
            "coloured ones: set data.cache.mode to text or data.cache to null, or models.reward.overrides.greyscale to false."
        )
    return encoded_latents(models["vae"], reward.seen(batch.video), rng)


def _measures(axes: tuple[str, ...], gap: Tensor, nll: Tensor, votes: Votes) -> dict[str, Tensor]:
    """Sums over the pairs of what is logged of the gaps `(P, A)`; see `RewardObjective.loss`."""
    right = accuracy(gap, votes.sign)
    tied = (votes.sign[:, 0] == 0).float()
    found = {
        "nll": nll[:, 0].sum(),
        "accuracy": right[:, 0].sum(),
        "tied": tied.sum(),
        "score_gap": (gap[:, 0] * (1 - tied)).sum(),
    }
    for number, axis in enumerate(axes[1:], 1):
        judged = votes.judged[:, number].float()
        found |= {
            f"nll/{axis}": nll[:, number].sum(),
            f"accuracy/{axis}": (0.5 + judged * (right[:, number] - 0.5)).sum(),
            f"voted/{axis}": judged.sum(),
        }
    return found


def accuracy(gap: Tensor, sign: Tensor) -> Tensor:
    """1 where `gap` has the `sign` of what was judged, 0 where it has the other, one half for ties and gaps of 0; float32."""
    return 0.5 + 0.5 * gap.sign().float() * sign.sign().float()


def _cost(reward: Any, latents: Tensor, text: Conditioning, like: Tensor) -> dict[str, Tensor]:
    """Sums over the pairs of what both clips cost; made on the device of `like`, without a copy from the host."""
    num_clips, num_tokens, num_text = len(latents), reward.num_tokens(latents), text.embeddings.shape[1]
    counts = {"tokens": num_tokens, "text_tokens": num_text, "flops": reward.config.flops(num_tokens, num_text)}
    padding = (~text.mask).float().mean(dim=1).sum() / 2  # a share of a pair, not of each clip
    return {name: like.new_full((), float(num_clips * count)) for name, count in counts.items()} | {"padding_share": padding}
