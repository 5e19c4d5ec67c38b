"""Flow matching in the latent space of a frozen VAE (LTX-Video, arXiv 2501.00103; spec C.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from einops import repeat
from torch import Tensor, nn

from videofm.config.flow_matching import FlowMatchingConfig
from videofm.objectives.conditioning import MODES, Given, draw_given, probabilities
from videofm.objectives.features import DrawnFeatures, FeatureSource, check_injection
from videofm.objectives.host import on_host
from videofm.objectives.latents import check_statistics, clean_latents
from videofm.objectives.noise_levels import ClipShape, NoiseLevelLaw
from videofm.objectives.packing import join, join_texts, take_apart
from videofm.objectives.texts import cut_shares, drop_captions, encode_captions, encoded_conditioning
from videofm.objectives.tokens import Features, TokenBatch, draw_subset, loss_weight
from videofm.ops.patchify import tokens_from_latents
from videofm.types import Batch, Compression, Conditioning, Loss, SampleRng


@dataclass(frozen=True)
class _Drawn:
    """What was drawn for clips of one size: their tokens, what is given, the captions that are told, and sums for the log about
    what guides them."""

    tokens: TokenBatch
    given: Given | None
    captions: list[str]
    metrics: dict[str, Tensor]


class FlowMatchingObjective:
    """Mean squared error of the velocity that `dit` predicts for noisy latents of `vae`, given text of `text_encoder`.

    With `config.features` the dit is also guided by features of the frozen role `tokenizer` (see `FeatureSource`).
    """

    roles: tuple[str, ...] = ("dit", "vae", "text_encoder")

    def __init__(self, config: FlowMatchingConfig) -> None:
        self.config = config
        self.noise_levels = NoiseLevelLaw(config.noise_levels)
        self.features = None if config.features is None else FeatureSource(config.features)
        if self.features is not None:
            self.roles = (*FlowMatchingObjective.roles, *self.features.roles)
        trained = ("dit", "text_encoder") if config.train_text_encoder else ("dit",)
        self.phases: Mapping[str, tuple[str, ...]] = {"train": trained}

    def loss(self, models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng, phase: str) -> Loss:
        """Sums over the local samples of the loss and of the metrics.

        The loss of a sample is a mean over its tokens that bear loss, so it does not depend on how many are given. `mse` is
        the same without weights, `sigma` the mean level of those tokens. Where anything is ever given, `given` is the share
        of given tokens and `share_MODE` the share of samples in each mode. `cut_text` is the share of captions that are longer
        than the text encoder takes, `cut_clip` that of its second one where there are two. What a sample costs: `tokens`,
        `text_tokens` with `padding_share`, the share of them that is padding, and `flops` where the model has a formula.

        A pack goes through the model as one sequence, and gives what its clips would give one by one.

        Nothing here waits for the device: what decides about shapes is known to the host.

        Draws, each keyed by sample: `posterior` (latents are sampled), `noise`, `sigma`, `caption` (dropout), and those of
        `draw_given`, `draw_subset` and `FeatureSource.draw`, whose metrics are added.
        """
        parts = batch.parts or (batch,)
        ends = [0, *accumulate(len(part.captions) for part in parts)]
        rngs = [rng.rows(*rows) for rows in pairwise(ends)]
        clean = [clean_latents(models["vae"], part, draws) for part, draws in zip(parts, rngs, strict=True)]
        guides: Sequence[DrawnFeatures | None] = [None] * len(parts)
        if self.features is not None:
            guides = self.features.draw(models, clean, parts, rngs)
        drawn = [self._draw(models, *of) for of in zip(parts, clean, guides, rngs, strict=True)]
        captions = [caption for part in drawn for caption in part.captions]
        if parts[0].text is None:
            text = self._conditioning(models["text_encoder"], captions)
        else:
            text = join_texts([encoded_conditioning(part, of.captions) for part, of in zip(parts, drawn, strict=True)])
        tokens = [part.tokens for part in drawn]
        if batch.parts:
            squares = self.packed_squared_errors(models["dit"], tokens, text)
        else:
            squares = [self.squared_errors(models["dit"], tokens[0], text)]
        losses = [
            self._loss(models["dit"], part, errors, text.rows(slice(*rows)))
            for part, errors, rows in zip(drawn, squares, pairwise(ends), strict=True)
        ]
        total = torch.stack([loss.total for loss in losses]).sum()
        metrics = {name: torch.stack([loss.metrics[name] for loss in losses]).sum() for name in losses[0].metrics}
        return Loss(total, metrics | cut_shares(models["text_encoder"], captions, total))

    def _draw(
        self, models: Mapping[str, nn.Module], batch: Batch, clean: Tensor, guide: DrawnFeatures | None, rng: SampleRng
    ) -> _Drawn:
        noise = rng.normal("noise", tuple(clean.shape[1:]))
        captions = self.drop_captions(batch.captions, on_host(rng).uniform("caption"))
        sigma = self.draw_sigma(clean, models["vae"].compression, rng)
        given = draw_given(self.config.conditioning, _cells(clean), rng)
        features, metrics = (None, {}) if guide is None else (guide.features, guide.metrics)
        tokens = self.tokens(models, clean, noise, sigma, batch.fps, given, features)
        if dropping := self.config.token_dropping:
            tokens = tokens.subset(draw_subset(tokens.clean.shape[1], tokens.given, dropping.num_tokens, rng))
        return _Drawn(tokens, given, captions, metrics)

    def _loss(self, dit: nn.Module, drawn: _Drawn, squares: Tensor, text: Conditioning) -> Loss:
        """Loss and metrics of clips of one size from squared errors `(B, L, C)`; `text` has B rows."""
        tokens = drawn.tokens
        mse = tokens.means(squares)
        weight = loss_weight(self.config.loss_weighting, tokens.sigma)
        total = (mse if weight is None else tokens.means(squares, weight)).sum()
        level = tokens.sigma if tokens.sigma.ndim == 1 else tokens.means(tokens.sigma[:, :, None])
        metrics = {"loss": total.detach(), "mse": mse.detach().sum(), "sigma": level.sum()}
        return Loss(total, metrics | drawn.metrics | self._shares(drawn.given, tokens) | cost(dit, tokens, text))

    def check(self, models: Mapping[str, nn.Module]) -> None:
        """Refuse models that do not fit the config, or each other.

        Raises:
            ConfigError: latent statistics of the VAE with another hash than the config names; a dit with an injection of
                features where none are configured, or the reverse; a tokenizer of another VAE's latents.
        """
        check_statistics(models["vae"], self.config.latent_statistics_hash)
        check_injection(models.get("dit"), self.features is not None)
        if self.features is not None:
            self.features.check(models)

    def draw_sigma(self, clean: Tensor, compression: Compression, rng: SampleRng) -> Tensor:
        """Noise levels for latents `clean` `(B, C, T, H, W)`: `(B,)`, or `(B, L)` where each frame has its own.

        The law looks at the size of the whole clip, as the sampler's schedule does, also where tokens are dropped.
        """
        num_frames, rows, columns = _cells(clean)
        draws = rng.uniform("sigma", (num_frames,) if self.config.sigma_per == "frame" else ())
        sigma = self.noise_levels.quantile(draws, ClipShape.of(clean, compression))
        return sigma if sigma.ndim == 1 else repeat(sigma, "b t -> b (t h w)", h=rows, w=columns)

    def tokens(
        self,
        models: Mapping[str, nn.Module],
        clean: Tensor,
        noise: Tensor,
        sigma: Tensor,
        fps: Tensor,
        given: Given | None = None,
        features: Features | None = None,
    ) -> TokenBatch:
        """The tokens of latents `clean` and `noise` `(B, C, T, H, W)` at levels `sigma` `(B,)` or `(B, L)`.

        Args:
            models: roles `dit` and `vae`, which say where a token lies.
            clean: normalised latents.
            noise: unit Gaussian.
            sigma: levels of the tokens that are not given.
            fps: `(B,)` frames a second.
            given: what is given at its own level.
            features: what guides them.
        """
        coordinates = models["dit"].coordinates(_cells(clean), fps, models["vae"].compression, self.config.causal_fix)
        levels, mask = (sigma, None) if given is None else (given.levels(sigma), given.mask)
        return TokenBatch(tokens_from_latents(clean), tokens_from_latents(noise), levels, coordinates, mask, features)

    def residuals(self, dit: nn.Module, tokens: TokenBatch, text: Conditioning) -> Tensor:
        """Predicted velocity minus `noise - clean`, `(B, L, C)` float32, also under autocast; `text` has B rows."""
        predicted = dit(tokens.noisy, tokens.sigma, text, tokens.coordinates, **_guidance(tokens.features))
        return predicted.float() - tokens.velocity.float()

    def squared_errors(self, dit: nn.Module, tokens: TokenBatch, text: Conditioning) -> Tensor:
        """Squares of `residuals`."""
        return self.residuals(dit, tokens, text).square()

    def packed_squared_errors(self, dit: nn.Module, parts: Sequence[TokenBatch], text: Conditioning) -> list[Tensor]:
        """`squared_errors` of each part, all of which go through the model in one sequence; `text` has a row for each clip."""
        packed = join(parts)
        predicted = dit(packed.noisy, packed.sigma, text, packed.coordinates, packed.documents, **_guidance(packed.features))
        return [
            (velocity.float() - part.velocity.float()).square()
            for velocity, part in zip(take_apart(predicted, parts), parts, strict=True)
        ]

    def velocity_errors(
        self,
        models: Mapping[str, nn.Module],
        clean: Tensor,
        captions: list[str],
        fps: Tensor,
        sigma: Tensor,
        noise: Tensor,
    ) -> Tensor:
        """Each sample's mean squared error of the predicted velocity, `(B,)` float32, with nothing given or dropped.

        Features that guide are those of `clean` itself, as the role `tokenizer` makes them. Arguments as in `tokens`;
        `captions` are B texts.
        """
        features = None if self.features is None else self.features.exact(models, clean)
        tokens = self.tokens(models, clean, noise, sigma, fps, features=features)
        text = self._conditioning(models["text_encoder"], captions)
        return tokens.means(self.squared_errors(models["dit"], tokens, text))

    def drop_captions(self, captions: list[str], uniform: Tensor) -> list[str]:
        """Captions with those made empty whose draw lies below `caption_dropout`; the draws lie on the CPU."""
        return drop_captions(captions, uniform, self.config.caption_dropout)

    def _conditioning(self, text_encoder: nn.Module, captions: list[str]) -> Conditioning:
        """The captions' text: each distinct one is encoded once, and columns that only hold padding are cut off.

        The model masks padding, so the cut changes no number; it spares a quarter of the step for short captions.
        """
        return encode_captions(text_encoder, captions, self.config.train_text_encoder)

    def _shares(self, given: Given | None, tokens: TokenBatch) -> dict[str, Tensor]:
        """Sums over the samples for the log; the same names at every step, whatever was drawn."""
        modes = [mode for mode, share in probabilities(self.config.conditioning).items() if share]
        if not modes:
            return {}
        if given is None or tokens.given is None:
            return dict.fromkeys(("given", *(f"share_{mode}" for mode in modes)), tokens.clean.new_zeros(()))
        shares = {f"share_{mode}": (given.mode == MODES.index(mode)).float().sum() for mode in modes}
        return {"given": tokens.given.float().mean(dim=1).sum()} | shares


def _guidance(features: Features | None) -> dict[str, Tensor]:
    """Arguments of a dit that has an injection; none for one that has not."""
    return {} if features is None else {"features": features.tokens, "features_kept": features.kept}


def _cells(latents: Tensor) -> tuple[int, int, int]:
    num_frames, rows, columns = latents.shape[2:]
    return num_frames, rows, columns


def cost(dit: nn.Module, tokens: TokenBatch, text: Conditioning) -> dict[str, Tensor]:
    """Sums over the samples of what they cost; made on the device, without a copy from the host."""
    size, num_tokens = tokens.clean.shape[:2]
    num_text = text.embeddings.shape[1] + (0 if text.clip_embeddings is None else text.clip_embeddings.shape[1])
    counts = {"tokens": num_tokens, "text_tokens": num_text}
    if formula := getattr(getattr(dit, "config", None), "flops", None):
        counts["flops"] = formula(num_tokens, num_text)
        if (injection := getattr(dit, "injection", None)) is not None:
            counts["flops"] += injection.flops(dit.config, num_tokens, num_text)
    padding = (~text.mask).float().mean(dim=1).sum()
    return {name: tokens.clean.new_full((), size * count) for name, count in counts.items()} | {"padding_share": padding}
