"""Compiled blocks: the same numbers and the same names, few graphs, and a clear error without a compiler."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from tests.unit.models.block_cases import build, gradients, inputs, treat
from videofm import models
from videofm.errors import ConfigError

CASES = [
    ("dit/ltx", None, "none"),
    ("dit/ltx", torch.bfloat16, "selective"),
    ("dit/step_video", None, "selective"),
    ("dit/step_video", torch.bfloat16, "none"),
]


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "dtype", "policy"), CASES)
def test_equal_to_eager(name, dtype, policy, fresh, tmp_path):
    """Velocity and gradients, over the largest of each; bfloat16 to two units of its last place. Two blocks, one graph."""
    model = build(name, num_layers=2)
    made, names = inputs(model), list(model.state_dict())
    expected = gradients(model, made, dtype)
    treat(model, compile=True, activation_checkpointing=policy)
    found = gradients(model, made, dtype)
    assert counters["stats"]["unique_graphs"] == 1
    tolerance = 1e-5 if dtype is None else 2**-6
    errors = {key: ((found[key] - value).abs().max() / value.abs().max()).item() for key, value in expected.items()}
    assert {key: error for key, error in errors.items() if not error < tolerance} == {}
    assert list(model.state_dict()) == names
    models.save(model, tmp_path)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in models.load(tmp_path).state_dict().items())


@pytest.mark.parametrize("policy", ["none", "selective"])
def test_buckets_share_a_graph(policy, fresh, monkeypatch):
    """Batches, lengths and texts of other sizes: one graph for the first, then one for all; traced only, as is enough."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = treat(build("dit/ltx", num_layers=2), compile=True, activation_checkpointing=policy)
    graphs = []
    for batch, grid, num_text in ((2, (3, 4, 4), 6), (4, (3, 2, 4), 9), (8, (2, 4, 4), 10), (2, (5, 4, 4), 7)):
        model(*inputs(model, batch, grid, num_text)).square().mean().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == 1 and graphs[1] == graphs[-1] <= 3, graphs


def test_without_a_compiler_the_model_is_not_built(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler 'no-such-compiler' here: install g\+\+, set .* trainer.compile"):
        treat(build("dit/ltx", num_layers=1), compile=True)
