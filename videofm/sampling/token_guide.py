"""From prompts to features of the latents: text -> autoregressive tokens -> the tokenizer's decoder (ARLON, spec B.7).

Features lie in the space of normalised latents and have their shape, so that they mean the same to a diffusion transformer that
was trained with those of another (coarser) tokenizer of the same VAE.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videofm.errors import CheckpointError, ConfigError
from videofm.registry import resolve
from videofm.sampling.autoregressive import TokenSampling, sample_tokens
from videofm.sampling.source import models_folder, training_config
from videofm.types import Conditioning

ROLES = ("ar", "text_encoder", "tokenizer")
"""Roles of a training run of `ar/transformer`; those that it did not train lie in its `frozen/`."""


@dataclass(frozen=True)
class GuideFeatures:
    """What a guide makes of a batch of prompts: `features` `(B, C, T, H, W)` float32 in normalised latent space, the `indices`
    `(B, T', H', W')` they were decoded from, and the `seconds` that both took, text and all."""

    features: Tensor
    indices: Tensor
    seconds: float


@dataclass
class TokenGuide:
    """An autoregressive model with the text encoder and the tokenizer that it was trained with, all on one device. They are
    put into eval mode: a tokenizer must not learn from what it encodes here. `window` is how many token frames the
    autoregressive model was trained on at most (`objective.window`), and None where it saw whole clips.

    Raises:
        ConfigError: models that do not fit each other, or a tokenizer of several codebooks.
    """

    ar: nn.Module
    text_encoder: nn.Module
    tokenizer: nn.Module
    settings: TokenSampling = field(default_factory=TokenSampling)
    window: int | None = None

    def __post_init__(self) -> None:
        for model in (self.ar, self.text_encoder, self.tokenizer):
            model.eval()
        wanted, found = self._config("ar").vocab_size, self._any("tokenizer").vocab_size
        if wanted != found:
            raise ConfigError(
                f"the autoregressive model draws one of {wanted} tokens, and the tokenizer has {found}: take the tokenizer "
                "that its training had, which lies in its run."
            )

    @classmethod
    def load(
        cls,
        run: str | Path,
        ema: bool = True,
        device: str | torch.device | None = None,
        settings: TokenSampling | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> TokenGuide:
        """The guide of a training run of an autoregressive model, or of a checkpoint of it.

        Args:
            run: the run or checkpoint; what it did not train lies in `frozen/` of the run.
            ema: take the moving average of the weights where the run keeps one.
            device: where the models go; None takes CUDA where there is one.
            settings: how tokens are drawn.
            dtype: of the weights of the text encoder and the autoregressive model; the tokenizer searches codes in float32.

        Raises:
            CheckpointError: `run` is missing or lacks a role.
            ConfigError: its models do not fit each other.
        """
        path = models_folder(run)
        if not path.exists():
            raise CheckpointError(f"{path} does not exist: give a run of objective next_token, or a checkpoint of it.")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        load = resolve("videofm.models:load")
        models = {role: load(path, role=role, ema=ema, device=device) for role in ROLES}
        for role in ("ar", "text_encoder"):
            models[role] = models[role].to(dtype)
        return cls(**models, settings=settings or TokenSampling(), window=trained_window(path))

    @property
    def latent_channels(self) -> int:
        """C of the latents that the features stand for."""
        found: int = self._config("tokenizer").latent_channels
        return found

    def check_latents(self, num_channels: int) -> None:
        """Refuse latents of another VAE than the tokenizer's.

        Raises:
            ConfigError: they have another number of channels.
        """
        if num_channels != self.latent_channels:
            raise ConfigError(
                f"latents of {num_channels} channels, and the tokenizer of the guide was trained on latents of "
                f"{self.latent_channels}: guide a model of the VAE that the tokenizer was trained with."
            )

    def cuts(self, texts: list[str]) -> dict[str, list[bool]]:
        """Which of `texts` are longer than the guide's own text encoder takes, by each of its parts."""
        found: dict[str, list[bool]] = self._any("text_encoder").cuts(texts)
        return found

    def head_lengths(self, num_frames: int) -> range:
        """How many latent frames a head may have before a window of `num_frames`: those that end with a whole token frame.

        A tokenizer of rate r pads latents in front to a multiple of r, so that a head and its window have the same tokens where
        they lack as many frames.
        """
        rate = int(self._config("tokenizer").rate[0])
        return range((num_frames - 1) % rate + 1, num_frames, rate)

    @torch.no_grad()
    def features(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        head: Tensor | None = None,
        on_token: Callable[[], None] | None = None,
    ) -> GuideFeatures:
        """Features for a window of latents, one video for each prompt.

        Args:
            prompts: B captions.
            seeds: B generator seeds; the tokens of a video depend on its own, whatever the batch.
            shape: (T, H, W) of the window, in latent cells.
            head: normalised latents `(B, C, k, H, W)` of the first k frames, which are made already; their tokens are the
                prefix of those drawn. They were encoded as those of a clip that begins there, as the clips of the training
                were, so a window with a head also starts with `start_token`.
            on_token: called before each place of the grid is drawn; may raise to stop.

        Raises:
            ConfigError: a head that does not fit the window or ends inside a token frame; a window of more token frames than
                the autoregressive model was trained on.
            DataError: a height or width that the tokenizer does not divide.
        """
        before, tokenizer = time.perf_counter(), self._any("tokenizer")
        token_shape = tokenizer.token_shape(shape)
        check_trained_window(token_shape[0], self.window)
        prefix = None if head is None else self._prefix(head, shape, len(prompts))
        text = self._encode(prompts)
        negative = self._encode([""] * len(prompts)) if self.settings.guidance_scale != 1.0 else None
        on_step = None if on_token is None else lambda logits: on_token()
        indices = sample_tokens(self.ar, text, negative, token_shape, seeds, self.settings, prefix, on_step=on_step)
        features = tokenizer.decode(indices, shape[0]).float()
        if features.is_cuda:
            torch.cuda.synchronize(features.device)
        return GuideFeatures(features, indices, time.perf_counter() - before)

    def _prefix(self, head: Tensor, shape: tuple[int, int, int], num_videos: int) -> Tensor:
        """Indices `(B, t, H', W')` of `head`."""
        self.check_latents(head.shape[1])
        if len(head) != num_videos or tuple(head.shape[3:]) != shape[1:]:
            raise ConfigError(
                f"a head of shape {tuple(head.shape)} does not begin {num_videos} window(s) of {shape} latent cells: give one "
                f"head for each prompt, of {shape[1]}x{shape[2]} cells."
            )
        allowed = self.head_lengths(shape[0])
        if head.shape[2] not in allowed:
            rate = self._config("tokenizer").rate[0]
            fits = f"it may have {', '.join(map(str, allowed))}" if allowed else "none fits, so take longer windows"
            raise ConfigError(
                f"a head of {head.shape[2]} latent frames in a window of {shape[0]}: a token is {rate} latent frames, "
                f"counted from the end of the window, and a head is whole token frames and shorter than the window; {fits}."
            )
        weight = next(self.tokenizer.parameters())
        indices: Tensor = self._any("tokenizer").encode(head.to(weight.device, weight.dtype))
        return indices

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        """The texts, in the type that the autoregressive model computes in."""
        found: Conditioning = self._any("text_encoder").encode(list(prompts))
        dtype = next(self.ar.parameters()).dtype
        return replace(found, embeddings=found.embeddings.to(dtype))

    def _config(self, role: str) -> Any:
        return self._any(role).config

    def _any(self, role: str) -> Any:
        return getattr(self, role)


def trained_window(run: str | Path) -> int | None:
    """Token frames that the autoregressive model at `run` was trained on at most; None where it saw whole clips."""
    found: int | None = training_config(run).get("objective", {}).get("window")
    return found


def check_trained_window(num_token_frames: int, trained: int | None) -> None:
    """Refuse to draw more token frames at once than the model has seen, whose positions mean nothing to it.

    Raises:
        ConfigError: `num_token_frames` are more than `trained`.
    """
    if trained is not None and num_token_frames > trained:
        raise ConfigError(
            f"{num_token_frames} token frames at once, and the autoregressive model was trained on {trained} at most "
            "(its objective.window): take shorter windows or clips, or train it with a longer objective.window."
        )
