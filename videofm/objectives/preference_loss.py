"""The losses of pairs as functions of velocity errors: Flow-DPO and what was added to it, in closed form, without models.

Of a pair, `err` is the mean squared velocity error of a clip, and the inner margin

    m = (err_winner - err_winner_ref) - (err_loser - err_loser_ref)

is negative where the policy prefers the winner more than its reference does; the log shows `-m` as `margin`. The loss is
`-log sigmoid(-(beta / 2) m)`: Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908) with the error of flow matching (Liu et
al. 2025, arXiv 2501.13918; Step-Video, arXiv 2502.10248, section on Video-DPO; spec A9, C2). Its slope in m lies between 0 and
beta / 2, so no gradient is longer than (beta / 2) |grad m|.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Sides:
    """Something of the winner and of the loser of each pair, both `(P, ...)` of one shape."""

    winner: Tensor
    loser: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Sides:
        """The halves of `(2P, ...)`, winners first."""
        winner, loser = values.chunk(2)
        return cls(winner, loser)

    def preferred(self, labels: Tensor) -> Sides:
        """The sides changed over wherever `labels`, which broadcasts to them, is negative: there the loser was the better."""
        swapped = labels < 0
        return Sides(torch.where(swapped, self.loser, self.winner), torch.where(swapped, self.winner, self.loser))


def frame_errors(residuals: Tensor, num_frames: int) -> Tensor:
    """Mean squares of `residuals` `(B, L, C)` over each of `num_frames` equal runs of tokens, `(B, num_frames)`.

    Tokens lie frame by frame, so the runs are the latent frames where `num_frames` is their number; 1 takes the whole clip, all
    dims but the batch. As runs are equal, the mean of the result over its dim 1 is the mean over the whole clip in any case.
    """
    return rearrange(residuals, "b (t l) c -> b t (l c)", t=num_frames).square().mean(dim=2)


def inner_margin(policy: Sides, reference: Sides, labels: Tensor | None = None) -> Tensor:
    """m of each pair, `(P,)`, from the errors `(P, S)` of S equal runs of tokens of each clip.

    Args:
        policy: errors of the model that learns.
        reference: errors of the reference at the same draws.
        labels: `(P, S)`, how much the winner's run is the better one, in [-1, 1]; None is 1 everywhere. Runs of label 0 count
            nothing (DenseDPO, Wu et al. 2025, arXiv 2506.03517). The sum is divided by S, whatever the labels are, so that
            labels of 1 give plain DPO.
    """
    gap = (policy.winner - reference.winner) - (policy.loser - reference.loser)  # (P, S)
    return (gap if labels is None else labels * gap).mean(dim=1)


def scheduled_beta(beta: float, schedule: str, sigma: Tensor) -> Tensor:
    """beta at noise levels `sigma` `(P,)`: `constant`, or `quadratic`, `beta * (1 - sigma)^2`; both are `beta` at the data.

    The second is what the theory of the first-mentioned paper comes to; it does not train high levels, and did worse there.
    """
    full = torch.full_like(sigma, beta)
    return full * (1.0 - sigma).square() if schedule == "quadratic" else full


def margin_loss(margin: Tensor, beta: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`-(1 - e) log sigmoid(-z) - e log sigmoid(z)` with `z = beta / 2 * margin`, of each pair; float32, finite for any z.

    Args:
        margin: m, `(P,)`.
        beta: `(P,)`.
        label_smoothing: e, the share of preferences that are taken to be the wrong way round; 0 is plain DPO (conservative
            DPO, Mitchell 2023).
    """
    z = 0.5 * beta * margin.float()
    loss = -logsigmoid(-z)
    return loss if label_smoothing == 0 else (1.0 - label_smoothing) * loss - label_smoothing * logsigmoid(z)


def implicit_accuracy(margin: Tensor, ties: Tensor) -> Tensor:
    """1 where the policy prefers the winner more than its reference does (m < 0), 0 where less, `(P,)` float32.

    One half where it prefers none, as at the start of a training, and for ties, in which there is nothing to be right about.
    """
    hit = (margin < 0).float() + 0.5 * (margin == 0).float()
    return torch.where(ties, 0.5, hit)


@torch.no_grad()
def loser_scale(residuals: Sides, strength: float) -> Tensor:
    """The factor in [0, 1] of each loser's gradient at which the winner's error cannot rise, `(P,)` (Diffusion-SDPO).

    A step of descent goes along `-(grad err_w - factor * grad err_l)`, by which err_w changes in proportion to
    `-(|grad err_w|^2 - factor * <grad err_w, grad err_l>)`. Gradients are taken in the space of outputs, where that of err is
    2 / n times the residual: exact for a map from parameters to outputs that the two clips share, an approximation else. So the
    factor is `strength * |d_w|^2 / <d_w, d_l>`, at most 1, and 1 where the product is not positive, that is where the loser's
    way leads the winner down by itself.

    Args:
        residuals: predicted velocity minus the true one, `(P, ...)`; with labels of segments, times their absolute values.
        strength: in (0, 1]; at 1 the winner's error may stand still, below it falls wherever the factor is below 1.
    """
    winner, loser = residuals.winner.flatten(1).float(), residuals.loser.flatten(1).float()
    square, product = winner.square().sum(dim=1), (winner * loser).sum(dim=1)
    against = product > 0
    factor = strength * square / torch.where(against, product, 1.0)
    return torch.where(against, factor.clamp(max=1.0), 1.0)


def scale_gradient(values: Tensor, scale: Tensor) -> Tensor:
    """`values`, bit for bit, whose gradient is multiplied by `scale`, which broadcasts to them."""
    held = values.detach()
    return held + scale * (values - held)


def reward_weight(rewards: Tensor, temperature: float, offset: float, max_weight: float) -> Tensor:
    """`exp((reward - offset) / temperature)`, at most `max_weight`, of each clip: reward-weighted regression (Peters & Schaal
    2007; cut as by Peng et al. 2019, arXiv 1910.00177).

    It is not divided by its mean over a batch, so that the weight of a clip, and with it the gradient of a step, does not
    depend on what it is batched with: `offset` is the constant that says which reward has the weight 1.
    """
    # The cut comes before the exponential, which would overflow; what is cut has the limit itself, to the bit.
    highest, exponent = math.log(max_weight), (rewards.float() - offset) / temperature
    weights = exponent.clamp(max=highest).exp().clamp(max=max_weight)
    return torch.where(exponent >= highest, torch.full_like(weights, max_weight), weights)
