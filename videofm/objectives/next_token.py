"""Next-token prediction over the tokens of a latent tokenizer (ARLON, arXiv 2410.20502; spec step-video-arlon-dpo B4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from videofm.config.next_token import NextTokenConfig
from videofm.errors import ConfigError
from videofm.objectives.host import on_host
from videofm.objectives.latent_tokens import check_started
from videofm.objectives.roles import check_kinds
from videofm.objectives.texts import cut_shares, drop_captions, text_of
from videofm.types import Batch, Conditioning, Loss, SampleRng

MAX_NLL = 80.0
"""Nats at which `perplexity` is cut: its exponential is finite in float32, and a bad sample does not stop the run."""


@dataclass(frozen=True)
class Windows:
    """What each sample is trained on: `indices` `(B, T', H', W')`, and whether it begins its clip (`start`) or not
    (`continue`)."""

    indices: Tensor
    starts: list[str]


@dataclass(frozen=True)
class TokenErrors:
    """Of each token `(B, L)`, float32: `nll` is minus the log of its probability, `smooth` the mean of that over the
    vocabulary, `log_z` the log of the sum of exp(logits), `hit` 1 where the token is the likeliest."""

    nll: Tensor
    smooth: Tensor
    log_z: Tensor
    hit: Tensor


class NextTokenObjective:
    """Cross-entropy of the tokens that `ar` predicts, given text of `text_encoder`; the tokens are those of `tokenizer`."""

    roles: tuple[str, ...] = ("ar", "text_encoder", "tokenizer")

    def __init__(self, config: NextTokenConfig) -> None:
        self.config = config
        trained = ("ar", "text_encoder") if config.train_text_encoder else ("ar",)
        self.phases: Mapping[str, tuple[str, ...]] = {"train": trained}

    def check(self, models: Mapping[str, nn.Module]) -> None:
        """Refuse models that do not fit together.

        Raises:
            ConfigError: a model of another kind than its role takes, another vocabulary than the tokenizer's, a tokenizer of
                several codebooks or whose codebook never started, or text that the model does not take.
        """
        check_kinds(models)
        ar: Any = models["ar"]
        tokenizer: Any = models["tokenizer"]
        text_encoder: Any = models["text_encoder"]
        check_started("tokenizer", tokenizer)
        if tokenizer.num_books != 1:
            raise ConfigError(
                f"the tokenizer has {tokenizer.num_books} codebooks: an autoregressive model predicts one token a place. "
                "Take a tokenizer with one, such as vq_ema or fsq."
            )
        if ar.config.vocab_size != tokenizer.vocab_size:
            raise ConfigError(
                f"the ar model has a vocabulary of {ar.config.vocab_size}, the tokenizer one of {tokenizer.vocab_size}: set "
                f"models.ar.overrides.vocab_size to {tokenizer.vocab_size}."
            )
        if hasattr(text_encoder.config, "clip_width"):
            raise ConfigError(
                f"{text_encoder.spec_name} gives the text of two encoders, and an ar model takes that of one: take text/t5."
            )
        if ar.config.caption_channels != text_encoder.config.width:
            raise ConfigError(
                f"the ar model takes text of {ar.config.caption_channels} channels, and the text encoder gives "
                f"{text_encoder.config.width}: set models.ar.overrides.caption_channels to {text_encoder.config.width}."
            )

    def loss(self, models: Mapping[str, nn.Module], batch: Batch, rng: SampleRng, phase: str) -> Loss:
        """Sums over the local samples of the loss and of the metrics.

        With p the softmax of a token's logits, y the token, V the size of the vocabulary, e `label_smoothing` and w `z_loss`,
        a token's loss is

            (1 - e) * -log p(y) + e * mean over V of -log p(v) + w * (log of the sum of exp(logits))^2

        (Szegedy et al., arXiv 1512.00567; Chowdhery et al., arXiv 2204.02311, section 5). That of a sample is the mean over its
        tokens. Of a sample, `nll` is the mean of -log p(y) in nats, `perplexity` its exponential, at most that of `MAX_NLL`
        (the log has the mean of that over samples), `accuracy` the share of tokens that are the likeliest, `z_loss` the
        last term without w, `first_windows` 1 where it begins its clip. What it costs: `tokens`, `text_tokens` with
        `padding_share`, and `flops`. `cut_NAME` is the share of captions that are longer than the encoder of that name
        takes.

        Draws, each keyed by sample: `caption` (dropout), `window` (a cut of a longer clip: whether it is the first, and where
        else it is).

        Raises:
            ConfigError: a micro-batch without tokens.
            DataError: ids out of range (seen on the CPU), or a grid with more rows or columns than the model knows.
        """
        ar: Any = models["ar"]
        windows = self.draw_windows(_indices(batch), rng)
        captions = drop_captions(batch.captions, on_host(rng).uniform("caption"), self.config.caption_dropout)
        text = text_of(models["text_encoder"], batch, captions, self.config.train_text_encoder)
        errors = token_errors(ar, windows, text)
        loss = (1 - self.config.label_smoothing) * errors.nll + self.config.label_smoothing * errors.smooth
        loss = loss + self.config.z_loss * errors.log_z.square()
        total, nll = loss.mean(dim=1).sum(), errors.nll.detach().mean(dim=1)
        metrics = {
            "loss": total.detach(),
            "nll": nll.sum(),
            "perplexity": nll.clamp(max=MAX_NLL).exp().sum(),
            "accuracy": errors.hit.mean(dim=1).sum(),
            "z_loss": errors.log_z.detach().square().mean(dim=1).sum(),
            "first_windows": nll.new_full((), float(windows.starts.count("start"))),
        }
        metrics |= _cost(ar, windows.indices, text, nll) | cut_shares(models["text_encoder"], captions, nll)
        return Loss(total, metrics)

    def draw_windows(self, indices: Tensor, rng: SampleRng) -> Windows:
        """Cut `indices` `(B, T', H', W')` to `config.window` token frames, each sample at its own place; see the config."""
        num_frames, window = indices.shape[1], self.config.window
        if window is None or window >= num_frames:
            return Windows(indices, ["start"] * len(indices))
        share = self.config.first_window_share
        firsts = [
            0 if which < share else 1 + int(where * (num_frames - window))
            for which, where in on_host(rng).uniform("window", (2,)).double().tolist()
        ]
        cut = torch.stack([sample[first : first + window] for sample, first in zip(indices, firsts, strict=True)])
        return Windows(cut, ["continue" if first else "start" for first in firsts])


def _indices(batch: Batch) -> Tensor:
    """The tokens `(B, T', H', W')` of a micro-batch."""
    if batch.indices is None:
        raise ConfigError(
            "objective next_token trains on tokens, and the batch has none: run `videofm encode` with the section `tokens`, "
            "and set data.cache.path to its run and data.cache.mode to tokens (or tokens_text)."
        )
    return batch.indices


def token_errors(ar: Any, windows: Windows, text: Conditioning) -> TokenErrors:
    """How well `ar` predicts each token of `windows`, in float32 also under autocast; `text` has a row for each sample."""
    inputs = ar.inputs_of(windows.indices, windows.starts)
    logits = ar(inputs.tokens, inputs.positions, inputs.cells, text).float()  # (B, L, V)
    log_z = logits.logsumexp(dim=2)
    at_target = logits.gather(2, inputs.targets[:, :, None]).squeeze(2)
    hit = (logits.argmax(dim=2) == inputs.targets).float()
    return TokenErrors(log_z - at_target, log_z - logits.mean(dim=2), log_z, hit)


def _cost(ar: Any, indices: Tensor, text: Conditioning, like: Tensor) -> dict[str, Tensor]:
    """Sums over the samples of what they cost; made on the device of `like`, without a copy from the host."""
    size, num_tokens, num_text = len(indices), indices[0].numel(), text.embeddings.shape[1]
    counts = {"tokens": num_tokens, "text_tokens": num_text, "flops": ar.config.flops(num_tokens, num_text)}
    padding = (~text.mask).float().mean(dim=1).sum()
    return {name: like.new_full((), float(size * count)) for name, count in counts.items()} | {"padding_share": padding}
