"""The tokens of a micro-batch as flow matching sees them: clean, noise, noise level, place; and a subset of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor

from videofm.errors import DataError
from videofm.ops import flow
from videofm.types import SampleRng


@dataclass(frozen=True)
class Features:
    """What guides each token of a DiT: `tokens` `(B, L, C)`, and `kept` `(B, L)` bool, False where the null feature stands."""

    tokens: Tensor
    kept: Tensor

    def subset(self, index: Tensor) -> Features:
        """Those of the tokens with the numbers `index` `(B, N)`."""
        rows = repeat(index, "b n -> b n c", c=self.tokens.shape[2])
        return Features(self.tokens.gather(1, rows), self.kept.gather(1, index))


@dataclass(frozen=True)
class TokenBatch:
    """`clean` and `noise` `(B, L, C)`, `sigma` `(B,)` or `(B, L)`, `coordinates` `(B, 3, L)`.

    `given` is `(B, L)` bool, True for tokens that bear no loss, or None where all do; `features` guide the tokens, or None.
    """

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    coordinates: Tensor
    given: Tensor | None = None
    features: Features | None = None

    @property
    def noisy(self) -> Tensor:
        """What the model sees, `(B, L, C)`."""
        return flow.add_noise(self.clean, self.noise, self.sigma)

    @property
    def velocity(self) -> Tensor:
        """What it should answer, `(B, L, C)`."""
        return flow.velocity(self.clean, self.noise)

    def subset(self, index: Tensor) -> TokenBatch:
        """The tokens with the numbers `index` `(B, N)`, with all that belongs to them."""
        rows = repeat(index, "b n -> b n c", c=self.clean.shape[2])
        places = repeat(index, "b n -> b xyz n", xyz=3)
        return TokenBatch(
            self.clean.gather(1, rows),
            self.noise.gather(1, rows),
            self.sigma if self.sigma.ndim == 1 else self.sigma.gather(1, index),
            self.coordinates.gather(2, places),
            None if self.given is None else self.given.gather(1, index),
            None if self.features is None else self.features.subset(index),
        )

    def means(self, values: Tensor, weight: Tensor | None = None) -> Tensor:
        """Each sample's mean of `values` `(B, L, C)` over the tokens that bear loss, however many; `(B,)`.

        Args:
            values: for example squared errors.
            weight: a factor for each token, `(B,)` or `(B, L)`; None is 1.
        """
        if self.given is None and weight is None:
            return values.flatten(1).mean(dim=1)
        per_token = values.mean(dim=2)  # (B, L, C) -> (B, L)
        if weight is not None:
            per_token = per_token * flow.broadcast_sigma(weight, per_token)
        if self.given is None:
            return per_token.mean(dim=1)
        return per_token.masked_fill(self.given, 0.0).sum(dim=1) / (~self.given).sum(dim=1)


def draw_subset(num_tokens: int, given: Tensor | None, num_kept: int, rng: SampleRng) -> Tensor:
    """Which tokens of each sample stay (LTX-Video, arXiv 2501.00103; spec C.4): a random subset, one of which bears loss.

    Args:
        num_tokens: L, of a whole clip.
        given: `(B, L)` bool, True for tokens that bear no loss, or None.
        num_kept: how many stay.
        rng: draws `token_dropping`, keyed by sample.

    Returns:
        `(B, num_kept)` rising token numbers.

    Raises:
        DataError: clips of fewer than `num_kept` tokens.
    """
    if num_tokens < num_kept:
        raise DataError(
            f"objective.token_dropping.num_tokens is {num_kept}, but these clips have {num_tokens} latent tokens: tokens are "
            f"dropped, never made. Read larger or longer clips (latent frames x rows x columns of at least {num_kept}), or set "
            f"num_tokens to at most {num_tokens}."
        )
    score = rng.uniform("token_dropping", (num_tokens,))  # the lowest stay
    if given is not None:
        first = score.masked_fill(given, 2.0).argmin(dim=1, keepdim=True)
        score = score.scatter(1, first, -1.0)
    return score.argsort(dim=1, stable=True)[:, :num_kept].sort(dim=1).values


def loss_weight(weighting: str, sigma: Tensor) -> Tensor | None:
    """The factor of the squared velocity error at `sigma`, of its shape (Esser et al. 2024, arXiv 2403.03206, section 3.1).

    `sigma_sqrt` takes levels below 1e-3 for 1e-3; None stands for 1 everywhere.
    """
    match weighting:
        case "sigma_sqrt":
            return sigma.clamp_min(1e-3) ** -2
        case "cosmap":
            return 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma.square()))
        case _:
            return None
