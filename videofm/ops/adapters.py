"""Low-rank adapters of a model that runs: switched off for a while, or replaced by a second one that does not learn.

A layer with adapters is peft's: `base_layer`, and in `lora_A` and `lora_B` a matrix for each adapter by name. What is trained,
saved and merged is the adapter `LEARNER` (`models.lora`); `REFERENCE` stands beside it while preferences are trained. Nothing
here changes which weights get gradients, as peft's own switches do: under DeepSpeed that is settled when a run begins.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from videofm.errors import CheckpointError, ConfigError

LEARNER, REFERENCE = "default", "reference"
_TABLES = ("lora_A", "lora_B", "lora_dropout", "scaling", "r", "lora_alpha")
"""What a layer holds of each adapter, by name: modules and numbers."""


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, layers with adapters compute with their own weights alone: bit for bit the model without adapters.

    Raises:
        ConfigError: the model has no adapters.
    """
    with _switched(model, "_disable_adapters", True):
        yield


@contextmanager
def second_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the adapter `REFERENCE` stands in the place of the one that learns.

    Raises:
        ConfigError: the model has no second adapter.
    """
    if not has_second_adapter(model):
        raise ConfigError("the model has no second adapter to switch to: add_second_adapter puts one in.")
    with _switched(model, "_active_adapter", [REFERENCE]):
        yield


def adapter_layers(model: nn.Module) -> list[Any]:
    """The layers of `model` that have adapters, in the order of its modules."""
    return [module for module in model.modules() if hasattr(module, "base_layer") and hasattr(module, "lora_A")]


def has_second_adapter(model: nn.Module) -> bool:
    """Whether `add_second_adapter` was called on `model`."""
    return any(REFERENCE in layer.lora_A for layer in adapter_layers(model))


def add_second_adapter(model: nn.Module) -> None:
    """Put a copy of the adapter that learns beside it, in place, frozen and switched off.

    Raises:
        ConfigError: the model has no adapters.
    """
    for layer in _layers(model):
        for name in _TABLES:
            table = getattr(layer, name)
            table[REFERENCE] = copy.deepcopy(table[LEARNER])
        layer.lora_A[REFERENCE].requires_grad_(False)
        layer.lora_B[REFERENCE].requires_grad_(False)


@torch.no_grad()
def refresh_second_adapter(model: nn.Module) -> None:
    """Make the second adapter a copy of the one that learns, in place."""
    for layer in _layers(model):
        for matrices in (layer.lora_A, layer.lora_B):
            matrices[REFERENCE].weight.copy_(matrices[LEARNER].weight)


def second_adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the second adapter by their names in the state dict of `model`."""
    return {key: tensor.detach() for key, tensor in model.state_dict().items() if _is_second(key)}


@torch.no_grad()
def load_second_adapter(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Set the second adapter to what `second_adapter_weights` gave.

    Raises:
        CheckpointError: other names or shapes; `source` is named.
    """
    own = second_adapter_weights(model)
    wanted, given = ({key: tuple(tensor.shape) for key, tensor in of.items()} for of in (own, tensors))
    if wanted != given:
        differ = sorted(key for key in wanted | given if wanted.get(key) != given.get(key))
        raise CheckpointError(
            f"{source} does not fit the second adapter of this model: {len(differ)} tensors are missing, too many or of "
            f"another shape, the first {differ[0]} ({given.get(differ[0], 'missing')} for {wanted.get(differ[0], 'none')})."
        )
    for key, tensor in own.items():
        tensor.copy_(tensors[key])


def is_adapter(key: str) -> bool:
    """Whether a tensor of this name belongs to an adapter, the one that learns or the second."""
    return key.endswith(tuple(f".lora_{matrix}.{name}.weight" for matrix in "AB" for name in (LEARNER, REFERENCE)))


def _is_second(key: str) -> bool:
    return is_adapter(key) and f".{REFERENCE}." in key


def _layers(model: nn.Module) -> list[Any]:
    found = adapter_layers(model)
    if not found:
        raise ConfigError("the model has no adapters: set models.ROLE.lora.")
    return found


@contextmanager
def _switched(model: nn.Module, attribute: str, value: Any) -> Iterator[None]:
    """Inside, `attribute` of each layer with adapters is `value`; afterwards what it was, also after an exception."""
    layers = _layers(model)
    before = [getattr(layer, attribute) for layer in layers]  # fails where peft has renamed its switch
    try:
        for layer in layers:
            setattr(layer, attribute, value)
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            setattr(layer, attribute, was)
