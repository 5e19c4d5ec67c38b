"""What the tests of Flow-DPO share: the objective with a given reference, and its margins by hand in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.unit.objectives.paired_batches import SEED, STEP, FixedReference, PerToken, PlainVae, rng_of, roles
from videofm.config.dpo import DPOConfig
from videofm.objectives.dpo import DPOObjective
from videofm.objectives.noise_levels import ClipShape
from videofm.ops.patchify import tokens_from_latents
from videofm.parallel.rng import KeyedRng
from videofm.types import Batch, Loss

BETA = 40.0


def make(reference: nn.Module, **fields: Any) -> DPOObjective:
    """The objective with `reference` as its reference; captions are not dropped."""
    base = {"kind": "dpo", "beta": BETA, "caption_dropout": 0.0, "reference": {"kind": "frozen"}}
    objective = DPOObjective(DPOConfig.model_validate(base | fields))
    objective.reference = FixedReference(reference)  # type: ignore[assignment]
    return objective


def loss_of(objective: DPOObjective, dit: nn.Module, batch: Batch) -> Loss:
    return objective.loss(roles(dit), batch, rng_of(batch), "train")


def gradient(total: Tensor, dit: nn.Module) -> Tensor:
    """Of all parameters, flat."""
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(total, list(dit.parameters()))])


class ByHand:
    """Margins of pairs in float64, clip by clip, by nothing of the objective: latents, noise and levels are made anew."""

    def __init__(self, batch: Batch, own_draws: bool = False) -> None:
        self.batch, self.num_pairs, self.own_draws = batch, len(batch.captions) // 2, own_draws
        self.law = DPOObjective(DPOConfig.model_validate({"kind": "dpo", "reference": {"kind": "cached"}})).flow.noise_levels

    def clip(self, number: int) -> tuple[Tensor, Tensor, float]:
        """Clean and noise tokens `(L, C)` and the noise level of a clip. With `own_draws` losers have draws of their own."""
        name = self.batch.sample_ids[number] + ("'" if self.own_draws and number >= self.num_pairs else "")
        rng, video = KeyedRng(SEED, STEP, [name]), self.batch.video[number : number + 1]
        mean = video[:, :, ::2, ::4, ::4]
        clean = (
            mean + 0.1 * KeyedRng(SEED, STEP, [self.batch.sample_ids[number]]).normal("posterior", mean.shape[1:]) - 0.25
        ) / 2
        noise = rng.normal("noise", tuple(clean.shape[1:]))
        sigma = self.law.quantile(rng.uniform("sigma"), ClipShape.of(clean, PlainVae.compression))
        return tokens_from_latents(clean)[0].double(), tokens_from_latents(noise)[0].double(), sigma.item()

    def error(self, number: int, dit: PerToken) -> Tensor:
        """Squared error of each token and channel of a clip, `(L, C)` float64."""
        clean, noise, sigma = self.clip(number)
        weight, level, text = (value.double() for value in (dit.weight, dit.level, dit.text))
        length = len(self.batch.captions[number])
        answer = torch.tanh(((1 - sigma) * clean + sigma * noise) @ weight + sigma * level + length * text)
        return (answer - (noise - clean)) ** 2

    def margins(self, policy: PerToken, reference: PerToken, labels: Tensor | None = None) -> Tensor:
        """m of each pair; `labels` `(P, 3)` of its latent frames, which have 4 tokens each."""
        found = []
        for number in range(self.num_pairs):
            gap = torch.zeros((), dtype=torch.float64)
            for side, sign in ((number, 1.0), (number + self.num_pairs, -1.0)):
                difference = self.error(side, policy) - self.error(side, reference).detach()
                for token in range(len(difference)):
                    label = 1.0 if labels is None else labels[number, token // 4].double()
                    gap = gap + sign * label * difference[token].sum() / difference.numel()
            found.append(gap)
        return torch.stack(found)

    def sigmas(self) -> list[float]:
        return [self.clip(number)[2] for number in range(self.num_pairs)]
