"""Whether the frozen tokenizers of a training are of its VAE, seen before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from videofm.config.encode import EncoderConfig
from videofm.config.model import ModelConfig
from videofm.config.train import TrainConfig
from videofm.data.encoded import ClipCache
from videofm.data.loader import StepLoader
from videofm.run_dir import read_json
from videofm.sampling.origin import another_vae, check_vae, same_weights, trained_vae, warn_unchecked
from videofm.train.encoders import load_encoder, weights_hash

ROLES = ("tokenizer", "fine_tokenizer")


def check_tokenizers(
    config: TrainConfig, models: Mapping[str, nn.Module], trained: tuple[str, ...], loader: StepLoader
) -> None:
    """Refuse a frozen tokenizer that was trained on latents of another VAE than those of the training: of its role `vae`, or,
    for an AR model, of what encoded its tokens. Where no run tells, the log says so.

    Args:
        config: of the training.
        models: its models, whole and as they were loaded.
        trained: roles that it trains; a tokenizer among them becomes one of this VAE.
        loader: what it reads.

    Raises:
        ConfigError: one is of another VAE.
    """
    for role in ROLES:
        if role in config.models and role not in trained:
            source = source_of(config.models[role])
            if "vae" in models:
                check_vae(source, models["vae"], f"models.{role}", "models.vae")
            elif isinstance(cache := getattr(loader, "source", None), ClipCache) and "tokens" in cache.kinds:
                _check_cache(config, cache, source, role)


def source_of(model: ModelConfig) -> str | None:
    """Where the weights of a section of `models` come from; None for new ones."""
    return model.path or model.init_from


def _check_cache(config: TrainConfig, cache: ClipCache, source: str | None, role: str) -> None:
    """Refuse cached tokens of latents of another VAE than the one that the tokenizer at `source` was trained on."""
    theirs = trained_vae(source)
    if theirs is None:
        warn_unchecked(f"models.{role}")
        return
    assert config.data.cache is not None
    for dataset in config.data.sources:
        wanted = cache.header(dataset.name, "tokens")["vae"]["weights"]
        if weights_hash(theirs) == wanted:
            continue
        folder = config.data.cache.folder(dataset.name)
        encoded_with = _encoding_vae(Path(folder), wanted)
        if encoded_with is None:
            warn_unchecked(f"models.{role} (of the tokens in {folder})")
        elif not same_weights(theirs, encoded_with):
            raise another_vae(f"models.{role}", source, f"the one whose latents became the tokens in {folder}")


def _encoding_vae(folder: Path, wanted: str) -> nn.Module | None:
    """The VAE that the run of `videofm encode` in `folder` had, if it still lies where that found it: the one with the hash
    `wanted`. A copy in another type has another hash, and only the weights tell that it is the same."""
    if not (folder / "config.yaml").is_file():
        return None
    told: dict[str, Any] = (read_json(folder / "config.yaml").get("tokens") or {}).get("vae") or {}
    if not told.get("path") or not Path(told["path"]).exists():
        return None
    found = load_encoder(EncoderConfig.model_validate(told), "cpu")
    return found if weights_hash(found) == wanted else None
