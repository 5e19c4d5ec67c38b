"""The frozen encoders apart from a training step: what identifies one, and what it makes of clips and captions.

`videofm encode` and the pool of `data.online` reach these through `registry.ENCODERS`; a training that reads a cache compares
its own models with what the cache was made by.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videofm import models
from videofm.config.encode import EncoderConfig, LatentsConfig, TextConfig, TokensConfig
from videofm.errors import DataError

ENCODER_VERSION = 1
"""Part of every content key: raise it when a change of code changes what an encoder gives."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_PLACES = ("path", "tokenizer_path")
"""Fields of a model's config that say where files lie, and not what is in them."""
_TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".vocab")
_NO_TOKENIZER = ("config.json", "generation_config.json", "preprocessor_config.json")


def identity(model: nn.Module) -> dict[str, Any]:
    """What names a frozen encoder: its model, its config without places, the SHA-256 of its weights and of its tokenizer.

    `model` is whole and as it was loaded: not yet split, cast, or given to an engine.
    """
    described = models.describe(model)
    config = {name: value for name, value in described["config"].items() if name not in _PLACES}
    found = {
        "version": ENCODER_VERSION,
        "model": described["name"],
        "config": json.loads(json.dumps(config)),
        "weights": weights_hash(model),
    }
    if "tokenizer_path" in described["config"]:
        found["tokenizer"] = tokenizer_hash(described["config"]["tokenizer_path"])
    return found


def codebook_hash(tokenizer: nn.Module) -> str:
    """SHA-256 (hex) of what turns ids into codes: the config of the quantizer and all its tensors.

    Not of the codes themselves: those of some quantizers are products of matrices, whose last bits differ between machines.
    Of two tokenizers with one hash, every id has the same code.
    """
    config = dataclasses.asdict(tokenizer.config.quantizer)  # type: ignore[union-attr, call-overload, arg-type]
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    quantizer: nn.Module = tokenizer.quantizer  # type: ignore[assignment]
    total.update(tensors_hash(quantizer.state_dict()).encode())
    return total.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 (hex) over names, types, shapes and bytes of all tensors of a model."""
    return tensors_hash(models.weights(model))


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, types, shapes and bytes of tensors."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def tokenizer_hash(folder: str | None) -> str:
    """SHA-256 (hex) over the files of a tokenizer by name; without a folder, a name for that of bytes."""
    if folder is None:
        return "bytes"
    total = hashlib.sha256()
    for file in sorted(Path(folder).rglob("*")):
        named = file.suffix in _TOKENIZER_SUFFIXES and file.name not in _NO_TOKENIZER
        if file.is_file() and named and not file.name.endswith(".index.json"):
            total.update(f"{file.relative_to(folder).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def load_encoder(config: EncoderConfig, device: str | torch.device) -> nn.Module:
    """The model, frozen, in eval mode, as the training loads it.

    Raises:
        CheckpointError, ConfigError: see `models.load` and `models.build`.
    """
    if config.path is not None:
        model = models.load(config.path, role=config.role)
    else:
        assert config.name is not None
        model = models.build(config.name, size=config.size or "tiny", **config.overrides)
    return model.to(device).eval().requires_grad_(False)


def tiled(vae: nn.Module, config: LatentsConfig | TokensConfig) -> Any:
    """What encodes as `vae` does, in the tiles of `config`.

    Raises:
        ConfigError: tiles off the grid of the VAE.
    """
    return vae if config.tile is None else vae.tiled(config.tile, config.tile, config.tile_overlap)  # type: ignore[operator]


def tiles(config: LatentsConfig | TokensConfig) -> list[int] | None:
    """The tiles of `config` as a header has them."""
    return None if config.tile is None else [config.tile, config.tile_overlap]


class LatentEncoder:
    """Clips to what a sidecar stores of their latents: `mean` and `logvar`, or `sample`, each `(C, T, H, W)`, raw."""

    def __init__(self, vae: nn.Module, config: LatentsConfig, device: str | torch.device = "cpu") -> None:
        """
        Raises:
            ConfigError: tiles off the grid of the VAE.
        """
        self.vae, self.config, self.device = vae, config, torch.device(device)
        self.tiled = tiled(vae, config)
        self.batch_size = config.batch_size

    @classmethod
    def load(cls, config: LatentsConfig, device: str) -> LatentEncoder:
        """The encoder of a config, on `device`."""
        return cls(load_encoder(config.vae, device), config, device)

    @staticmethod
    def describe(encoder: Mapping[str, Any], config: LatentsConfig) -> dict[str, Any]:
        """The part of a header that the encoder decides; `encoder` is its `identity`."""
        return {
            "encoder": dict(encoder), "store": config.store, "dtype": config.dtype, "precision": config.precision,
            "tiles": tiles(config), "batch_size": config.batch_size,
        }  # fmt: skip

    def header(self) -> dict[str, Any]:
        """`describe` of this encoder."""
        return self.describe(identity(self.vae), self.config)

    @torch.no_grad()
    def encode(self, video: Tensor, sources: Sequence[str]) -> list[dict[str, Tensor]]:
        """What is stored of each clip of `video` `(B, 3, T, H, W)`; `sources` name the clips, for the noise of samples."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16_autocast"):
            posterior = self.tiled.encode(video.to(self.device))
        dtype, mean, logvar = DTYPES[self.config.dtype], posterior.mean.float().cpu(), posterior.logvar.float().cpu()
        if self.config.store == "mean_logvar":
            return [{"mean": m.to(dtype), "logvar": v.to(dtype)} for m, v in zip(mean, logvar, strict=True)]
        noise = [torch.randn(mean.shape[1:], generator=_generator(source)) for source in sources]
        samples = mean + (0.5 * logvar).exp() * torch.stack(noise)
        return [{"sample": sample.to(dtype)} for sample in samples]


class TextEncoder:
    """Captions to what a sidecar stores of them: `text` `(L, D)` without padding and, of a second encoder, `clip_text`."""

    def __init__(self, model: nn.Module, config: TextConfig, device: str | torch.device = "cpu") -> None:
        self.model, self.config, self.device = model, config, torch.device(device)
        self.batch_size = config.batch_size

    @classmethod
    def load(cls, config: TextConfig, device: str) -> TextEncoder:
        """The encoder of a config, on `device`."""
        return cls(load_encoder(config.encoder, device), config, device)

    @staticmethod
    def describe(encoder: Mapping[str, Any], config: TextConfig) -> dict[str, Any]:
        """The part of a header that the encoder decides; `encoder` is its `identity`."""
        return {
            "encoder": dict(encoder), "dtype": config.dtype, "precision": config.precision, "batch_size": config.batch_size,
            "max_length": encoder["config"]["max_length"],
        }  # fmt: skip

    def header(self) -> dict[str, Any]:
        """`describe` of this encoder."""
        return self.describe(identity(self.model), self.config)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """What is stored of each caption.

        Raises:
            DataError: real tokens do not come first, so that they cannot be stored without padding.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16_autocast"):
            text = self.model.encode(list(captions))  # type: ignore[operator]
        dtype, mask = DTYPES[self.config.dtype], text.mask.cpu()
        lengths: list[int] = mask.sum(dim=1).tolist()
        if any(not bool(row[:length].all()) for row, length in zip(mask, lengths, strict=True)):
            raise DataError(
                f"the tokenizer of {self.model.spec_name} pads before the text; only padding behind it can be cut off"
            )
        embeddings = text.embeddings.float().cpu()
        rows = [{"text": row[:length].to(dtype)} for row, length in zip(embeddings, lengths, strict=True)]
        if text.clip_embeddings is not None:
            clip = text.clip_embeddings.float().cpu().to(dtype)
            rows = [{**row, "clip_text": second} for row, second in zip(rows, clip, strict=True)]
        return rows


def _generator(source: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(f"latents:{source}".encode()).digest()[:8], "big")
    return torch.Generator().manual_seed(seed >> 1)
