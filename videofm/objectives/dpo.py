"""Flow-DPO: tune a diffusion transformer on pairs of clips, one of which is preferred (Step-Video, arXiv 2502.10248, section on
Video-DPO; Liu et al. 2025, arXiv 2501.13918; spec A9, C)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from einops import repeat
from torch import Tensor, nn

from videofm.config.dpo import DPOConfig
from videofm.objectives.flow_matching import FlowMatchingObjective
from videofm.objectives.paired import PairedTokens, draw_pairs, of_pairs
from videofm.objectives.preference_loss import (
    Sides,
    frame_errors,
    implicit_accuracy,
    inner_margin,
    loser_scale,
    margin_loss,
    scale_gradient,
    scheduled_beta,
)
from videofm.objectives.reference import reference_of
from videofm.objectives.segments import latent_labels
from videofm.types import Batch, Loss, SampleRng


@dataclass(frozen=True)
class _Compared:
    """Of each pair, `(P,)`: its loss without its weight, m, and by what the loser's gradient is scaled, or None."""

    loss: Tensor
    margin: Tensor
    loser_scale: Tensor | None


class DPOObjective:
    """`-log sigmoid(-(beta / 2) m)` of each pair, times its weight; m compares the velocity errors of `dit` with those of a
    reference (see `preference_loss`).

    A micro-batch is the winners of P pairs and then their losers. It goes through the models as one batch of 2P clips, so a
    pair is never split over ranks that read different samples. Under context parallelism a transformer gives every rank the
    whole velocity, so errors are whole before the log-sigmoid, which is not linear in them; ranks that share samples draw the
    same numbers, by the keys of the draws.
    """

    def __init__(self, config: DPOConfig) -> None:
        self.config = config
        self.flow = FlowMatchingObjective(config.flow_matching)
        self.reference = reference_of(config.reference)
        self.roles: tuple[str, ...] = (*self.flow.roles, *self.reference.roles)
        self.phases: Mapping[str, tuple[str, ...]] = {"train": ("dit",)}
        self.precomputed = self.reference.precomputed(self.measure)

    def extend(self, models: Mapping[str, nn.Module]) -> None:
        """Add to the policy what the reference needs of it (`types.Objective.extend`)."""
        self.reference.extend(models)

    def check(self, models: Mapping[str, nn.Module]) -> None:
        """Refuse models that do not fit the config.

        Raises:
            ConfigError: latent statistics with another hash than the config names, a dit that features guide, or a policy that
                has not what the reference is made of.
        """
        self.flow.check(models)
        self.reference.check(models)

    def loss(self, models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng, phase: str) -> Loss:
        """Sums over the local pairs of the loss and of the metrics.

        The loss of a pair is its weight times the sum of `margin_loss` and of `winner_weight` times the winner's error. With
        `segments`, "winner" is in each latent frame the side that its label calls the better one (see `inner_margin`).

        Metrics: `margin` (-m) and `implicit_accuracy` (see there); `winner_error`, `loser_error`, `winner_reference_error` and
        `loser_reference_error`, means over whole clips; `effective_beta`, what multiplies half of a margin of means; `tied`,
        the share of ties; `loser_scale` with a safeguard; and those of `PairedTokens.metrics`, in which the forward passes of
        the reference do not count.

        Raises:
            ConfigError: the micro-batch has no pairs, or no labels of segments where they are asked for.
        """
        weights = of_pairs(batch, "pair_weights", "dpo")  # (P,), 0 for ties
        ties = of_pairs(batch, "pair_ties", "dpo")
        drawn = self._draw(models, batch, self.reference.draws(rng, batch.step))
        labels = self._labels(models, batch, drawn)
        if labels is not None:
            weights = weights * labels.any(dim=1)  # a pair of which nothing is labelled is a tie
        # First, so that what it computes is gone before the policy's activations are kept.
        reference = Sides.of(self.reference.errors(models, batch, partial(self._errors, drawn)))  # (P, S)
        residuals = drawn.residuals(self.flow, models["dit"])
        policy = Sides.of(frame_errors(residuals, self._num_runs(drawn)))
        beta = self._beta(drawn)
        found = self._compare(policy, reference, residuals, labels, beta)
        total = (weights * found.loss).sum()
        metrics = {
            "loss": total.detach(),
            "margin": -found.margin.sum(),
            "implicit_accuracy": implicit_accuracy(found.margin, ties).sum(),
            "effective_beta": beta.sum(),
            "tied": ties.float().sum(),
        }
        for name, sides in (("", policy), ("reference_", reference)):
            metrics[f"winner_{name}error"] = sides.winner.detach().mean(dim=1).sum()
            metrics[f"loser_{name}error"] = sides.loser.detach().mean(dim=1).sum()
        if found.loser_scale is not None:
            metrics["loser_scale"] = found.loser_scale.sum()
        return Loss(total, metrics | drawn.metrics(models["dit"], models["text_encoder"]))

    @torch.no_grad()
    def measure(self, models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> Tensor:
        """The errors of the policy at the draws of `rng`, `(2P, S)` float32, winners first; S is 1, or the latent frames where
        segments are compared."""
        return self._errors(self._draw(models, batch, rng), models["dit"])

    def _draw(self, models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng) -> PairedTokens:
        return draw_pairs(self.flow, models, batch, rng, len(batch.captions) // 2)

    def _errors(self, drawn: PairedTokens, dit: nn.Module) -> Tensor:
        return frame_errors(drawn.residuals(self.flow, dit), self._num_runs(drawn))

    def _compare(self, policy: Sides, reference: Sides, residuals: Tensor, labels: Tensor | None, beta: Tensor) -> _Compared:
        """The loss of each pair without its weight.

        Args:
            policy: errors of the policy, `(P, S)`.
            reference: those of the reference.
            residuals: what the errors of the policy are the mean squares of, `(2P, L, C)`.
            labels: `(P, S)` of latent frames, or None.
            beta: `(P,)`.
        """
        config, better, held, share, scale = self.config, policy, reference, None, None
        if labels is not None:
            better, held, share = policy.preferred(labels), reference.preferred(labels), labels.abs()
        if config.loser_safeguard is not None:
            scale = loser_scale(_shared_out(Sides.of(residuals.detach()), labels), config.loser_safeguard)
            better = Sides(better.winner, scale_gradient(better.loser, scale[:, None]))
        margin = inner_margin(better, held, share)
        loss = margin_loss(margin, beta, config.label_smoothing)
        if config.winner_weight:
            winner = better.winner if share is None else share * better.winner
            loss = loss + config.winner_weight * winner.mean(dim=1)
        return _Compared(loss, margin.detach(), scale)

    def _num_runs(self, drawn: PairedTokens) -> int:
        return drawn.num_frames if self.config.segments else 1

    def _beta(self, drawn: PairedTokens) -> Tensor:
        """What multiplies half of a margin of mean errors, `(P,)`. A sum of squares is their mean times the number of them."""
        beta = scheduled_beta(self.config.beta, self.config.beta_schedule, drawn.sigma)
        return beta * drawn.tokens.clean[0].numel() if self.config.error_reduction == "sum" else beta

    def _labels(self, models: Mapping[str, nn.Module], batch: Batch, drawn: PairedTokens) -> Tensor | None:
        """Labels of latent frames `(P, T)`, or None where clips are compared as wholes."""
        if not self.config.segments:
            return None
        frames = of_pairs(batch, "frame_labels", "dpo")
        return latent_labels(frames, drawn.num_frames, models["vae"].compression)  # type: ignore[arg-type]


def _shared_out(residuals: Sides, labels: Tensor | None) -> Sides:
    """Residuals `(P, L, C)` of the better and of the worse run of tokens, times how much it is so; labels `(P, T)`."""
    if labels is None:
        return residuals
    per_token = repeat(labels, "p t -> p (t cells) 1", cells=residuals.winner.shape[1] // labels.shape[1])
    sides = residuals.preferred(per_token)
    return Sides(per_token.abs() * sides.winner, per_token.abs() * sides.loser)
