"""Adapters switched off and replaced: against the stored base, and without a trace once it is over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.unit.models.test_lora import adapted, base, run_with, velocity
from videofm import models
from videofm.errors import CheckpointError, ConfigError
from videofm.models.lora import is_lora
from videofm.ops.adapters import (
    adapter_layers,
    adapters_off,
    add_second_adapter,
    has_second_adapter,
    load_second_adapter,
    refresh_second_adapter,
    second_adapter,
    second_adapter_weights,
)


def two_adapters() -> nn.Module:
    """A model whose second adapter is what the first was before it moved."""
    model = adapted()
    add_second_adapter(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora(name):
                parameter.mul_(-1.5)
    return model


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_off_is_the_stored_base_bit_for_bit(tmp_path: Path) -> None:
    """In training and eval mode; with them on it is another model.

    Tensors of a file lie where they lie in it, and the last bit of a product depends on their alignment: hence the copy.
    """
    model = adapted()
    models.save_base(model, tmp_path)
    stored = copy.deepcopy(models.load(tmp_path))
    for training in (True, False):
        model.train(training)
        with adapters_off(model):
            assert torch.equal(velocity(model), velocity(stored))
        assert (velocity(model) - velocity(stored)).abs().max() > 1e-2


def test_everything_is_as_it_was_afterwards_also_after_an_exception() -> None:
    model = two_adapters()
    before, trained = velocity(model), trained_names(model)

    def use_and_fail(switch: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
        with switch(model):
            assert not torch.equal(velocity(model), before)
            assert trained_names(model) == trained, "switches move no requires_grad, which DeepSpeed has settled"
            raise RuntimeError("inside")

    for switch in (adapters_off, second_adapter):
        with pytest.raises(RuntimeError, match="inside"):
            use_and_fail(switch)
        assert torch.equal(velocity(model), before)
        assert trained_names(model) == trained == {name for name, _ in model.named_parameters() if is_lora(name)}


def test_switches_nest() -> None:
    model = two_adapters()
    with second_adapter(model):
        second = velocity(model)
        with adapters_off(model):
            assert torch.equal(velocity(model), velocity(base()))
        assert torch.equal(velocity(model), second)
    assert not torch.equal(velocity(model), second)


def test_the_second_adapter_is_a_copy_that_stays_until_it_is_refreshed() -> None:
    """It is made without a draw: torch's generator is where it was."""
    model = adapted()
    start, state = velocity(model), torch.get_rng_state()
    add_second_adapter(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(velocity(model), start), "it is switched off"
    with torch.no_grad():
        for layer in adapter_layers(model):
            layer.lora_B["default"].weight.mul_(2)
    moved = velocity(model)
    with second_adapter(model):
        assert torch.equal(velocity(model), start) and not torch.equal(start, moved)
    refresh_second_adapter(model)
    with second_adapter(model):
        assert torch.equal(velocity(model), moved)
    with torch.no_grad():  # a copy, not the same memory
        for layer in adapter_layers(model):
            layer.lora_B["default"].weight.mul_(2)
    with second_adapter(model):
        assert torch.equal(velocity(model), moved)


def test_only_the_learner_is_trained_saved_merged_and_exported(tmp_path: Path) -> None:
    """A run of a model with a second adapter is, to everything that reads it, one without."""
    model = two_adapters()
    assert all(not parameter.requires_grad for name, parameter in model.named_parameters() if ".reference." in name)
    models.freeze_all_but_lora(model)
    assert all(map(is_lora, trained_names(model)))
    run = run_with(tmp_path / "run", model)
    stored = load_file(run / "checkpoints" / "step_00000001" / "models" / "dit" / "model.safetensors")
    assert stored and all(map(is_lora, stored))
    plain = load_file(run / "base" / "dit" / "model.safetensors")
    assert plain.keys() == base().state_dict().keys()
    loaded = models.load(run)
    assert not has_second_adapter(loaded) and loaded.state_dict().keys() == base().state_dict().keys()
    torch.testing.assert_close(velocity(loaded), velocity(model), rtol=0, atol=1e-5)
    merged = models.merge_lora(copy.deepcopy(model))
    assert merged.state_dict().keys() == base().state_dict().keys()
    torch.testing.assert_close(velocity(merged), velocity(model), rtol=0, atol=1e-5)
    alone = load_file(models.save_adapter(run, tmp_path / "adapter"))
    assert len(alone) == len(stored) and not any("reference" in name for name in alone)


def test_its_weights_go_and_come_back() -> None:
    model, other = two_adapters(), adapted(seed=9)
    add_second_adapter(other)
    tensors = {name: tensor.clone() for name, tensor in second_adapter_weights(model).items()}
    assert len(tensors) == len(models.weights(model)) and not any(map(is_lora, tensors))
    learner = velocity(other)
    load_second_adapter(other, tensors, "a checkpoint")
    assert torch.equal(velocity(other), learner)
    found = second_adapter_weights(other)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    first = min(tensors)
    less = {name: tensor for name, tensor in tensors.items() if name != first}
    with pytest.raises(
        CheckpointError, match=rf"a checkpoint does not fit the second adapter.*: 1 tensors.*{first} \(missing for"
    ):
        load_second_adapter(other, less, "a checkpoint")


def test_a_compiled_layer_follows_the_switch() -> None:
    """`trainer.compile` compiles blocks while adapters are on; the graph of one setting is not used for the other."""
    layer = adapted().get_submodule("blocks.0.self_attention.q")
    compiled, x = torch.compile(layer, backend="eager"), torch.randn(3, 32)
    wanted = layer(x)
    for _ in range(2):
        assert torch.equal(compiled(x), wanted)
        with adapters_off(layer):
            assert torch.equal(compiled(x), layer.base_layer(x)) and not torch.equal(layer.base_layer(x), wanted)


def test_models_without_adapters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the model has no adapters: set models\.ROLE\.lora"), adapters_off(base()):
        pass
    with pytest.raises(ConfigError, match="the model has no adapters"):
        add_second_adapter(base())
    with pytest.raises(ConfigError, match="has no second adapter to switch to"), second_adapter(adapted()):
        pass
