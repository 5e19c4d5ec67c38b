"""The clips of pairs as flow matching sees them: one noise level, one noise and one caption a pair, for both of its sides.

What a loss of pairs compares is the difference of two errors, in which draws of their own would be noise that says nothing
about the clips (spec C5). So they are drawn for the pairs, and used for both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from einops import repeat
from torch import Tensor, nn

from videofm.errors import ConfigError
from videofm.objectives.flow_matching import FlowMatchingObjective, cost
from videofm.objectives.host import on_host
from videofm.objectives.latents import clean_latents
from videofm.objectives.texts import cut_shares, text_of
from videofm.objectives.tokens import TokenBatch
from videofm.types import Batch, Conditioning, SampleRng


@dataclass(frozen=True)
class PairedTokens:
    """What was drawn for P pairs. `tokens` and `text` have 2P rows, winners first; `captions` are those that the P winners are
    told, some made empty; `sigma` is `(P,)`, and `num_frames` counts latent frames."""

    tokens: TokenBatch
    text: Conditioning
    captions: list[str]
    sigma: Tensor
    num_frames: int

    def residuals(self, flow: FlowMatchingObjective, dit: nn.Module) -> Tensor:
        """Predicted velocity minus the true one, `(2P, L, C)` float32."""
        return flow.residuals(dit, self.tokens, self.text)

    def metrics(self, dit: nn.Module, text_encoder: nn.Module) -> dict[str, Tensor]:
        """Sums over the pairs for the log: `sigma`, what the clips of a pair cost the trained model (`tokens`, `text_tokens`,
        `flops`, of both sides together), and shares of padding and of captions that are cut."""
        costs = cost(dit, self.tokens, self.text)
        costs["padding_share"] = costs["padding_share"] / 2  # a share of a pair, not of each clip
        return {"sigma": self.sigma.sum()} | costs | cut_shares(text_encoder, self.captions, self.sigma)


def draw_pairs(
    flow: FlowMatchingObjective, models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng, num_pairs: int
) -> PairedTokens:
    """Noise the clips of `batch`, which are the winners of its pairs and then their losers.

    Args:
        flow: how clips become tokens, and which noise levels are drawn.
        models: roles `dit`, `vae` and `text_encoder`.
        batch: 2P clips; `sample_ids` are those of the pairs, twice.
        rng: its draws. `noise`, `sigma` and `caption` (dropout) are asked for once a pair; `posterior`, where latents are
            sampled, follows the ids, which are the pair's for both.
        num_pairs: P.
    """
    assert batch.sample_ids[:num_pairs] == batch.sample_ids[num_pairs:], "both clips of a pair have its id"
    clean = clean_latents(models["vae"], batch, rng)
    own = rng.rows(0, num_pairs)
    noise = _twice(own.normal("noise", tuple(clean.shape[1:])))
    sigma = flow.draw_sigma(clean, models["vae"].compression, own)  # type: ignore[arg-type]
    captions = flow.drop_captions(batch.captions, _twice(on_host(own).uniform("caption")))
    text = text_of(models["text_encoder"], batch, captions, trained=False)
    tokens = flow.tokens(models, clean, noise, _twice(sigma), batch.fps)
    return PairedTokens(tokens, text, captions[:num_pairs], sigma, clean.shape[2])


def of_pairs(batch: Batch, name: str, kind: str) -> Tensor:
    """The tensor `name` of a micro-batch of pairs.

    Raises:
        ConfigError: there is none.
    """
    found: Tensor | None = getattr(batch, name)
    if found is None:
        raise ConfigError(f"objective {kind} reads {name} of pairs, and the micro-batch has none: {_MISSING[name]}")
    return found


_MISSING = {
    "pair_weights": "set data.pairs.path to a folder of preferences (`videofm dpo rank`, `annotate` or `import` writes one).",
    "rewards": "every clip of a pair needs a score `overall`, as `videofm dpo rank` writes it; rank the candidates first.",
    "frame_labels": "no pair of data.pairs has segments. Set objective.segments to false, or take preferences that have them.",
}
"""Field of a batch -> what to do where it is missing."""


def _twice(values: Tensor) -> Tensor:
    """Values `(P, ...)` of pairs for winners and then for losers, `(2P, ...)`."""
    return repeat(values, "p ... -> (two p) ...", two=2)
