"""Activation checkpointing of transformer blocks: the same gradients, bit for bit, from less memory."""

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.models.block_cases import NAMES, build, gradients, inputs, treat
from tools.bench.memory import kept_bytes
from videofm.errors import ConfigError
from videofm.models import recompute


@dataclass(frozen=True)
class Shared:
    """As a rotary table is."""

    scale: torch.Tensor


POLICIES = ("none", "selective", "full")


class Products(TorchDispatchMode):
    """Counts matrix products and attention."""

    def __init__(self):
        super().__init__()
        self.count = {"products": 0, "attention": 0}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().partition(".")[0]
        self.count["products"] += name in recompute.PRODUCT_OPS
        self.count["attention"] += name in recompute.ATTENTION_OPS
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_without_checkpointing(name, dtype):
    model = build(name)
    made = inputs(model)
    expected = gradients(model, made, dtype)
    for policy in POLICIES[1:]:
        for every in (1, 2):
            treat(model, activation_checkpointing=policy, checkpoint_every_blocks=every)
            found = gradients(model, made, dtype)
            different = [key for key, value in expected.items() if not torch.equal(found[key], value)]
            assert different == [], (policy, every)


@pytest.mark.parametrize("name", NAMES)
def test_the_backward_pass_is_left_with_less(name):
    """Bytes between forward and backward, in the order of the policies; of two blocks in four, between all and none."""
    model = build(name)
    made = inputs(model)

    def kept(**options):
        treat(model, **options)
        return kept_bytes(partial(model, *made))

    none, selective, full = (kept(activation_checkpointing=policy) for policy in POLICIES)
    assert none > 2 * selective > 4 * full
    assert full < kept(activation_checkpointing="full", checkpoint_every_blocks=2) < none


@pytest.mark.parametrize(("name", "num_products"), [("dit/ltx", 10), ("dit/step_video", 7)])
def test_what_is_computed_again(name, num_products):
    """A block has 10 (or 7) products and 2 attentions; a backward pass of it has two products for each of the former.

    Selective recomputes the first of each two products, and no attention; full recomputes everything, the feed-forward's last
    product too, because the gradient of its gate needs the result.
    """
    model = build(name, num_layers=1)
    made = inputs(model)
    counts = {}
    for policy in POLICIES:
        treat(model, activation_checkpointing=policy)
        velocity = model(*made)
        with Products() as counter:
            velocity.square().mean().backward()
        counts[policy] = counter.count
    assert all(counts[policy]["attention"] == (2 if policy == "full" else 0) for policy in POLICIES), counts
    extra = {policy: counts[policy]["products"] - counts["none"]["products"] for policy in POLICIES}
    assert extra == {"none": 0, "selective": -(-num_products // 2), "full": num_products}


def test_one_block_in_every_few_and_back_again():
    model = build("dit/ltx")
    treat(model, activation_checkpointing="full", checkpoint_every_blocks=3)
    assert [("forward" in vars(block)) for block in model.blocks] == [True, False, False, True]
    names = list(model.state_dict())
    treat(model)
    assert not any("forward" in vars(block) for block in model.blocks)
    assert list(model.state_dict()) == names


def test_a_copy_of_a_treated_model_uses_its_own_weights():
    """As a moving average or a reference model of it would."""
    model = build("dit/ltx", num_layers=1)
    made = inputs(model)
    before = model(*made)
    treat(model, activation_checkpointing="full")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(*made), before)
    assert model(*made).abs().max() == 0


def test_offload_is_refused_where_there_is_nothing_to_offload_from():
    with pytest.raises(ConfigError, match=r"offload_activations is true, but the model is on cpu: .* Set it to false"):
        treat(build("dit/ltx", num_layers=1), offload_activations=True)


def test_what_is_offloaded_comes_back(monkeypatch):
    """Large results of a block move; its weights, what it shares with other blocks, and small tensors stay. No GPU: copied."""
    moved = []

    def copy_of(tensor):
        moved.append(tensor.shape)
        return tensor.clone()

    monkeypatch.setattr(recompute, "_to_host", copy_of)
    layer = nn.Linear(512, 513)
    x, shared = torch.randn(1024, 512, requires_grad=True), Shared(torch.randn(1025, 1, 513))

    def forward(x, shared):
        return layer(x).tanh() * shared.scale[:1024, 0] * x[0, 0]

    inputs = [x, *layer.parameters()]
    plain = torch.autograd.grad(forward(x, shared).sum(), inputs)
    offloaded = torch.autograd.grad(recompute.offloaded(forward, layer)(x, shared).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, offloaded, strict=True))
    assert sorted(set(moved)) == [
        torch.Size([1024, 512]),
        torch.Size([1024, 513]),
    ]  # x, and what tanh and the last product keep
