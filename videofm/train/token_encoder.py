"""Clips to the indices of a frozen latent tokenizer, and to what an AR model makes of their beginnings (`videofm encode`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from videofm import models
from videofm.config.encode import RolloutsConfig, TokensConfig
from videofm.data.sidecar import differences
from videofm.errors import ConfigError, DataError
from videofm.objectives.roles import check_kinds
from videofm.parallel.rng import derive_seed
from videofm.sampling.autoregressive import TokenSampling, sample_tokens
from videofm.sampling.origin import check_vae
from videofm.sampling.token_guide import check_trained_window, trained_window
from videofm.train.encoders import codebook_hash, identity, load_encoder, tiled, tiles


class TokenEncoder:
    """Clips to what a sidecar stores of their tokens: `indices` `(T', H', W')` int32, of the most likely latents, so that they
    are a function of the pixels; with an AR model also its `rollouts`, of the same shape.
    """

    def __init__(
        self,
        tokenizer: nn.Module,
        vae: nn.Module,
        config: TokensConfig,
        device: str | torch.device = "cpu",
        rollouts: Rollouts | None = None,
    ) -> None:
        """
        Raises:
            ConfigError: the tokenizer has several codebooks, or is for latents of another VAE; tiles off the grid of the VAE.
        """
        self.tokenizer: Any = tokenizer
        self.vae: Any = vae
        if self.tokenizer.num_books != 1:
            raise ConfigError(
                f"tokens: the tokenizer has {self.tokenizer.num_books} codebooks, and one id a cell is stored, for a model "
                "that predicts one token after the other. Take a tokenizer whose quantizer has one codebook"
            )
        if self.tokenizer.config.latent_channels != self.vae.latent_channels:
            raise ConfigError(
                f"tokens: the tokenizer takes latents of {self.tokenizer.config.latent_channels} channels, and the VAE's have "
                f"{self.vae.latent_channels}; take the VAE that the tokenizer was trained on"
            )
        self.config, self.device, self.rollouts = config, torch.device(device), rollouts
        self.tiled = tiled(vae, config)
        self.batch_size = config.batch_size

    @classmethod
    def load(cls, config: TokensConfig, device: str) -> TokenEncoder:
        """The encoder of a config, on `device`; where no run tells which VAE the tokenizer is of, the log says so.

        Raises:
            CheckpointError: a model is missing.
            ConfigError: the tokenizer was trained on latents of another VAE, or is none.
            DataError: see `Rollouts.load`.
        """
        tokenizer, vae = load_encoder(config.tokenizer, device), load_encoder(config.vae, device)
        check_kinds({"tokenizer": tokenizer, "vae": vae})
        check_vae(config.tokenizer.path, vae, "tokens.tokenizer", "tokens.vae")
        rollouts = None if config.rollouts is None else Rollouts.load(config.rollouts, tokenizer, device)
        return cls(tokenizer, vae, config, device, rollouts)

    def header(self) -> dict[str, Any]:
        """The part of a header that the models decide."""
        config = self.config
        return {
            "encoder": identity(self.tokenizer), "vae": identity(self.vae), "codebook": codebook_hash(self.tokenizer),
            "vocab_size": self.tokenizer.vocab_size, "dtype": "int32", "precision": config.precision, "tiles": tiles(config),
            "batch_size": config.batch_size, "rollouts": None if self.rollouts is None else self.rollouts.header(),
        }  # fmt: skip

    @torch.no_grad()
    def encode(self, video: Tensor, sources: Sequence[str], captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """What is stored of each clip of `video` `(B, 3, T, H, W)`; `sources` name the clips, for the draws of rollouts, which
        alone read the captions.

        Raises:
            ConfigError: clips have no token frames beyond those that rollouts keep, or more than their AR model was trained on.
            DataError: latents do not divide into the tokenizer's cells.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16_autocast"):
            latents = self.vae.normalize(self.tiled.encode(video.to(self.device)).mode().float())
            indices = self.tokenizer.encode(latents)
        stored = {"indices": indices}
        if self.rollouts is not None:
            # Outside of autocast: in sampling a guide draws without it, too.
            stored["rollouts"] = self.rollouts.roll(indices, sources, captions)
        plain = {name: tensor.to(torch.int32).cpu() for name, tensor in stored.items()}
        return [{name: tensor[row] for name, tensor in plain.items()} for row in range(len(video))]


class Rollouts:
    """Continuations of token frames by an AR model, under captions; `window` is how many it was trained on at most."""

    def __init__(self, ar: nn.Module, text_encoder: nn.Module, config: RolloutsConfig, window: int | None = None) -> None:
        self.ar, self.config, self.window = ar, config, window
        self.text_encoder: Any = text_encoder
        self.settings = TokenSampling(config.temperature, config.top_k, config.top_p, config.guidance_scale)

    @classmethod
    def load(cls, config: RolloutsConfig, tokenizer: nn.Module, device: str) -> Rollouts:
        """The AR model of a run, with its text encoder, for the indices of `tokenizer`.

        Raises:
            CheckpointError, ConfigError: the run has no such roles; see `models.load`.
            DataError: it was trained on the tokens of another tokenizer.
        """
        if changed := differences(identity(models.load(config.run, role="tokenizer")), identity(tokenizer)):
            raise DataError(
                f"rollouts: the AR model of {config.run} was trained on tokens of another tokenizer than tokens.tokenizer: "
                f"{'; '.join(changed)}. Give the tokenizer of that run, or an AR model of this one"
            )
        roles = [models.load(config.run, role=role).to(device).requires_grad_(False) for role in ("ar", "text_encoder")]
        return cls(roles[0], roles[1], config, trained_window(config.run))

    def header(self) -> dict[str, Any]:
        """What decides a rollout, besides the indices and the caption."""
        settings = {name: value for name, value in self.config.model_dump(mode="json").items() if name != "run"}
        return {"ar": identity(self.ar), "text_encoder": identity(self.text_encoder), **settings}

    def roll(self, indices: Tensor, sources: Sequence[str], captions: Sequence[str]) -> Tensor:
        """`indices` `(B, T', H', W')` with all but the first token frames drawn by the AR model.

        Draws are keyed by the clip, so that neither the batch nor the order enters.

        Raises:
            ConfigError: no token frame would be left to draw, or there are more than the AR model was trained on.
        """
        check_trained_window(indices.shape[1], self.window)
        keep = self.config.keep_frames
        if keep >= indices.shape[1]:
            raise ConfigError(
                f"tokens.rollouts.keep_frames is {keep}, and these clips have {indices.shape[1]} token frames, so that nothing "
                f"is left to predict; keep at most {indices.shape[1] - 1}, or encode longer clips"
            )
        text = self.text_encoder.encode(list(captions))
        guided = self.settings.guidance_scale != 1
        return sample_tokens(
            self.ar,
            text,
            self.text_encoder.encode([""] * len(captions)) if guided else None,
            tuple(indices.shape[1:]),
            [derive_seed("rollouts", source) for source in sources],
            self.settings,
            prefix=indices[:, :keep],
        )
