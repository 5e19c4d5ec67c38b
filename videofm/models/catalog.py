"""From a name and a size to a module."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from videofm.errors import ConfigError
from videofm.registry import MODELS, lookup, nearest
from videofm.types import ModelSpec, StateDictAdapter


def names() -> list[str]:
    """All models."""
    return list(MODELS)


def model_spec(name: str) -> ModelSpec:
    """The parts of the model called `name`.

    Raises:
        ConfigError: there is no such model.
    """
    return lookup(MODELS, name, "model")


def sizes(name: str) -> list[str]:
    """The sizes of the model called `name`."""
    return list(model_spec(name).sizes)


def adapter(name: str) -> StateDictAdapter:
    """The translation between our layout and the public one."""
    return model_spec(name).adapter


def config(name: str, size: str | None = None, **overrides: Any) -> Any:
    """The config of a size with some fields replaced; lists become tuples.

    Args:
        name: of the model.
        size: one of `sizes(name)`; None for the defaults of the config (the first public release).
        overrides: fields of the model's config.

    Raises:
        ConfigError: no such model, size or field, or values that cannot work together.
    """
    parts = model_spec(name)
    if size is not None and size not in parts.sizes:
        raise ConfigError(f"{name} has no size {size!r}{nearest(size, parts.sizes)}. There are: {', '.join(parts.sizes)}.")
    fields = [field.name for field in dataclasses.fields(parts.config)]
    for key in overrides:
        if key not in fields:
            raise ConfigError(f"{name} has no option {key!r}{nearest(key, fields)}. There are: {', '.join(fields)}.")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in overrides.items()}
    base = parts.config() if size is None else parts.sizes[size]
    return dataclasses.replace(base, **values)


def build(name: str, size: str | None = None, device: str | torch.device = "cpu", **overrides: Any) -> nn.Module:
    """A model with fresh weights (drawn from torch's generator) on `device`; on `"meta"` none are allocated.

    Arguments and errors are those of `config`. The module carries `config` and `spec_name`.
    """
    values = config(name, size, **overrides)
    with torch.device(device):
        return model_spec(name).build(values)


def inflate(model: nn.Module, folder: str | Path) -> None:
    """Fill a fresh video VAE, in place, with the weights of the smaller model that it starts from.

    That is an image VAE for `vae/cv_vae` and `vae/od_vae` (a local folder of diffusers' `AutoencoderKL`, or a run of
    `vae/image_kl`), and a run of training stage one for `vae/step_video`.

    Raises:
        ConfigError: this model has no smaller one to start from.
        CheckpointError: nothing there, or a model of another shape.
    """
    name = str(model.spec_name)
    fill = model_spec(name).inflate
    if fill is None:
        able = [other for other in names() if model_spec(other).inflate is not None]
        raise ConfigError(
            f"{name} cannot start from a smaller model: its layers have no counterpart there. These can: {', '.join(able)}."
        )
    fill(model, folder)
