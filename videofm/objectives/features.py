"""Where the features come from that guide a DiT in training: its clip's own tokens, made as wrong as predicted ones are.

ARLON (arXiv 2410.20502; spec B5 to B7): latents are encoded to tokens and decoded to features of the latents' shape. What is
then done to them, so that the DiT tolerates an autoregressive model's errors, is in `tolerance`; each part is a switch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from videofm.config.flow_matching import FeaturesConfig
from videofm.errors import ConfigError, DataError
from videofm.objectives.host import from_host, on_host
from videofm.objectives.latent_tokens import check_channels, check_started
from videofm.objectives.roles import check_kinds
from videofm.objectives.tokens import Features
from videofm.objectives.tolerance import channel_statistics, corrupt, sample_uncertainty, spreads
from videofm.ops.patchify import tokens_from_latents
from videofm.types import Batch, SampleRng


@dataclass(frozen=True)
class DrawnFeatures:
    """The features of clips of one size, and sums over the clips for the log (see `FeatureSource.draw`)."""

    features: Features
    metrics: dict[str, Tensor]


class FeatureSource:
    """Features of clean latents through the frozen role `tokenizer`, as `config` says.

    `roles` are the models that it needs: `tokenizer` and, where rollouts are mixed in, `fine_tokenizer`, which made the tokens
    that the autoregressive model learned. Tokenizers may have any rates: each decodes to the shape of the latents.
    """

    def __init__(self, config: FeaturesConfig) -> None:
        self.config = config
        self.roles: tuple[str, ...] = ("tokenizer", "fine_tokenizer") if config.rollouts else ("tokenizer",)

    def check(self, models: Mapping[str, nn.Module]) -> None:
        """Refuse models that do not fit together.

        Raises:
            ConfigError: a model is of another kind than its role takes; a tokenizer is for latents of other channels than those
                of the role `vae`, has a codebook that never started, or codes that cannot be corrupted; or the dit takes
                features of other channels.
        """
        check_kinds(models)
        found = models["vae"].latent_channels
        for role in self.roles:
            check_channels(models[role], models["vae"])
            check_started(role, models[role])
        dit: Any = models["dit"]
        if (channels := dit.injection.spec.feature_channels) != found:
            raise ConfigError(
                f"the injection of role dit takes features with {channels} channels, and those of tokenizers have the {found} "
                "of the latents: set models.dit.injection.feature_channels to null."
            )
        if self.config.corruption.probability and (books := models["tokenizer"].num_books) != 1:
            raise ConfigError(
                f"objective.features.corruption replaces ids of one codebook, and role tokenizer has {books}. Set its "
                "probability to 0, or take a tokenizer with one."
            )

    @torch.no_grad()
    def exact(self, models: Mapping[str, nn.Module], clean: Tensor) -> Features:
        """Features of normalised latents `clean` `(B, C, T, H, W)` as they are: for evaluation. All are kept."""
        tokenizer: Any = models["tokenizer"]
        tokens = tokens_from_latents(_decoded(tokenizer, tokenizer.encode(clean), clean))
        return Features(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=clean.device))

    @torch.no_grad()
    def draw(
        self, models: Mapping[str, nn.Module], clean: Sequence[Tensor], batches: Sequence[Batch], rngs: Sequence[SampleRng]
    ) -> list[DrawnFeatures]:
        """Features for training of a micro-batch, whose clips of one size are an entry each of `clean`, `batches` and `rngs`.

        In this order: tokens are corrupted, features of rollouts take the place of a clip's own (they have their errors
        already, and are not corrupted), the statistics are moved, by spreads over the whole micro-batch, features are dropped.

        Metrics, for what is switched on: `features_mse`, the squared difference of the features, as the model gets them where
        they are not dropped, from the latents; `features_spread`, the mean spread of the channels' means over the micro-batch
        (0: uncertainty sampling changes nothing); `features_corrupted`, `features_rolled_out` and `features_dropped`, shares.

        Draws, keyed by sample: `features_corruption`, `features_replaced`, `features_ids`, `features_rollout`,
        `features_uncertainty`, `features_statistics`, `features_dropout`.

        Raises:
            DataError: rollouts are asked for, and the batch has none, or has some of another size.
        """
        config, metrics = self.config, [dict[str, Tensor]() for _ in clean]
        found = []
        for latents, batch, rng, of in zip(clean, batches, rngs, metrics, strict=True):
            own = _decoded(models["tokenizer"], self._tokens(models["tokenizer"], latents, rng, of), latents)
            found.append(self._rolled_out(models, own, latents, batch, rng, of) if config.rollouts else own)
        if config.uncertainty:
            found = self._moved(found, rngs, metrics)
        drawn = []
        for features, latents, rng, of in zip(found, clean, rngs, metrics, strict=True):
            kept = rng.uniform("features_dropout") >= config.dropout  # (B,)
            of["features_mse"] = (features - latents).square().flatten(1).mean(dim=1).sum()
            if config.dropout:
                of["features_dropped"] = (~kept).float().sum()
            tokens = tokens_from_latents(features)
            drawn.append(DrawnFeatures(Features(tokens, repeat(kept, "b -> b l", l=tokens.shape[1])), of))
        return drawn

    def _tokens(self, tokenizer: Any, clean: Tensor, rng: SampleRng, metrics: dict[str, Tensor]) -> Tensor:
        """Indices `(B, T', H', W')` of the clips, some of them replaced."""
        indices: Tensor = tokenizer.encode(clean)
        corruption = self.config.corruption
        if not corruption.probability:
            return indices
        shape = tuple(indices.shape[1:])
        is_corrupted = rng.uniform("features_corruption") < corruption.probability  # (B,)
        replaced = is_corrupted[:, None, None, None] & (rng.uniform("features_replaced", shape) < corruption.fraction)
        metrics["features_corrupted"] = replaced.float().flatten(1).mean(dim=1).sum()
        return corrupt(indices, tokenizer.vocab_size, replaced, rng.uniform("features_ids", shape))

    def _rolled_out(
        self,
        models: Mapping[str, nn.Module],
        own: Tensor,
        clean: Tensor,
        batch: Batch,
        rng: SampleRng,
        metrics: dict[str, Tensor],
    ) -> Tensor:
        """Features `own` `(B, C, T, H, W)` with those of drawn rows replaced by what the autoregressive model predicted."""
        fine: Any = models["fine_tokenizer"]
        if batch.rollouts is None:
            raise DataError(
                f"objective.features.rollouts is {self.config.rollouts:g}, and these clips come without rollouts: make them "
                "with `videofm encode` (tokens.rollouts), read them with data.cache.mode latents_tokens, or set rollouts to 0."
            )
        wanted, given = tuple(fine.token_shape(tuple(clean.shape[2:]))), tuple(batch.rollouts.shape[1:4])
        if wanted != given:
            raise DataError(
                f"the rollouts of these clips are {_by(given)} tokens (frames x rows x columns), and role fine_tokenizer makes "
                f"{_by(wanted)} of their latents: they were made by another tokenizer. Encode again with this one."
            )
        draws = on_host(rng).uniform("features_rollout")
        rows = [row for row, draw in enumerate(draws.tolist()) if draw < self.config.rollouts]
        metrics["features_rolled_out"] = clean.new_full((), float(len(rows)))
        if not rows:
            return own
        index = from_host(rows, clean.device)
        return own.index_copy(0, index, _decoded(fine, batch.rollouts[index], clean))

    def _moved(
        self, features: Sequence[Tensor], rngs: Sequence[SampleRng], metrics: Sequence[dict[str, Tensor]]
    ) -> list[Tensor]:
        """Features of each size with the statistics of some samples moved."""
        statistics = [channel_statistics(values) for values in features]
        over = spreads(statistics)
        moved = []
        for values, of, rng, log in zip(features, statistics, rngs, metrics, strict=True):
            is_moved = (rng.uniform("features_uncertainty") < self.config.uncertainty).float()  # (B,)
            draws = rng.normal("features_statistics", (2, values.shape[1])) * is_moved[:, None, None]
            moved.append(sample_uncertainty(values, of, over, draws))
            log["features_spread"] = len(values) * over.mean.mean()
        return moved


def check_injection(dit: nn.Module | None, is_guided: bool) -> None:
    """Refuse a DiT that takes features where none are made, or the reverse.

    Raises:
        ConfigError: `is_guided` is not whether `dit` has an injection.
    """
    has_injection = getattr(dit, "injection", None) is not None
    if is_guided and not has_injection:
        raise ConfigError(
            "objective.features is set, and role dit has no place for features: set models.dit.injection (its kind "
            "adaptive_norm, say), or leave objective.features out."
        )
    if has_injection and not is_guided:
        raise ConfigError(
            "role dit has an injection of features, and objective.features is null: it would learn to do without them. Set "
            "objective.features ({} takes its defaults) and the role tokenizer, or load a dit without an injection."
        )


def _decoded(tokenizer: Any, indices: Tensor, clean: Tensor) -> Tensor:
    """Features `(B, C, T, H, W)` float32 of `indices`, as many frames as `clean` has."""
    features: Tensor = tokenizer.decode(indices, clean.shape[2])
    return features.float()


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
