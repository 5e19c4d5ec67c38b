"""Learning rate by its formula, groups of parameters, the spike guard, and the moving average by its recursion."""

import math

import pytest
import torch
from torch import nn

from videofm.config.train import OptimizerConfig
from videofm.errors import ConfigError
from videofm.parallel.shards import TensorShard
from videofm.train.optim import (
    GradientClip,
    MovingAverage,
    averaged_weights,
    learning_rate,
    num_elements,
    parameter_groups,
)


def test_learning_rate_at_the_corners():
    """Warm-up of 10 of 110 steps: 1/10 of the peak at step 0, the peak at 9 and 10, half-way cosine (0.1 + 0.9/2) at the middle
    of what is left, the final ratio at the last step."""
    config = OptimizerConfig(lr=2.0, warmup_steps=10, final_ratio=0.1)
    rates = [learning_rate(config, step, 111) for step in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 / 2)) and rates[110] == pytest.approx(0.2)
    assert learning_rate(OptimizerConfig(lr=2.0, schedule="linear"), 50, 101) == pytest.approx(1.0)
    assert learning_rate(OptimizerConfig(lr=2.0, schedule="constant"), 99, 100) == 2.0


def test_only_matrices_decay():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    groups = parameter_groups(dict(module.named_parameters()), OptimizerConfig(lr=1.0, weight_decay=0.1))
    assert [[tuple(p.shape) for p in group.parameters] for group in groups] == [[(4, 3)], [(4,), (4,), (4,)]]
    assert [group.weight_decay for group in groups] == [0.1, 0.0]


def test_groups_by_name_and_step():
    """The first pattern wins; decay is split within a group; a frozen group has rate 0 until its start, then a ramp."""
    module = nn.ModuleDict({"new": nn.Linear(2, 2), "old": nn.Linear(2, 2, bias=False)})
    late = {"match": "vae.*", "start_step": 10, "warmup_steps": 4, "lr_scale": 0.5}
    rules = [{"match": "vae.new.bias"}, {"match": "vae.new.*"}, late]
    config = OptimizerConfig.model_validate({"lr": 1.0, "weight_decay": 0.1, "groups": rules})
    groups = parameter_groups({f"vae.{name}": value for name, value in module.named_parameters()}, config)
    assert [(group.rule.match, group.weight_decay) for group in groups] == [
        ("vae.new.bias", 0.0), ("vae.new.*", 0.1), ("vae.*", 0.1)
    ]  # fmt: skip
    assert groups[2].parameters[0] is module["old"].weight
    assert [groups[2].lr_scale(step) for step in (0, 9, 10, 11, 13, 50)] == [0, 0, 0.125, 0.25, 0.5, 0.5]
    assert groups[0].lr_scale(0) == 1.0
    wrong = OptimizerConfig.model_validate({"lr": 1.0, "groups": [{"match": "dit.*"}]})
    with pytest.raises(ConfigError, match=r"optimizer.groups.0.match = 'dit.\*' matches no parameter .* vae.new.weight"):
        parameter_groups({f"vae.{name}": value for name, value in module.named_parameters()}, wrong)


def test_the_clip_follows_the_norm_and_is_not_fooled_by_a_spike():
    """Limit 2 * average: norms 1, 1, 100, 1. The spike counts as 2, so the average is 0.9 + 0.2 = 1.1 after it."""
    clip = GradientClip(OptimizerConfig(lr=1.0, grad_clip=0.0, grad_clip_ema=2.0, grad_clip_ema_decay=0.9))
    limits = []
    for norm in (1.0, 1.0, 100.0, 1.0):
        limits.append(clip.limit)
        clip.update(norm)
    assert limits == pytest.approx([0.0, 2.0, 2.0, 2.2])
    assert GradientClip(OptimizerConfig(lr=1.0, grad_clip=0.5, grad_clip_ema=2.0)).limit == 0.5


def test_named_tables_need_not_decay():
    """A pattern takes a matrix out of decay, within its group; what is a vector has none anyway."""
    module = nn.ParameterDict({"table": torch.ones(6, 4), "weight": torch.ones(4, 4), "bias": torch.ones(4)})
    named = {f"dit.{name}": value for name, value in module.items()}
    config = OptimizerConfig(lr=1.0, weight_decay=0.1, no_decay=["*table"])
    decaying, still = parameter_groups(named, config)
    assert decaying.parameters == [module["weight"]] and decaying.weight_decay == 0.1
    assert {id(p) for p in still.parameters} == {id(module["table"]), id(module["bias"])} and still.weight_decay == 0.0
    assert sum(len(group.parameters) for group in parameter_groups(named, OptimizerConfig(lr=1.0, weight_decay=0.1))[:1]) == 2
    with pytest.raises(ConfigError, match=r"optimizer.no_decay.0 = '\*embed' matches no parameter. Names are such as dit."):
        parameter_groups(named, OptimizerConfig(lr=1.0, no_decay=["*embed"]))


def test_a_spike_is_one_of_the_average_norm_and_leaves_it_as_it_was():
    """Factor 3 after two steps, decay 0.9. Norms 1, 8 (warm-up: taken), average 1 + 0.1 * 7 = 1.7, so 5.1 is the most: 5.2 is
    skipped, 5 is taken and makes 2.03; NaN and infinity are skipped. The limit of 0.5 bounds no norm in the average."""
    clip = GradientClip(OptimizerConfig(lr=1.0, grad_clip=0.5, grad_clip_ema_decay=0.9, spike_factor=3.0, spike_warmup=2))
    seen = []
    for norm in (1.0, 8.0, 5.2, 5.0, math.nan, math.inf, 2.0):
        seen.append((clip.admits(norm), clip.limit))
        clip.update(norm)
        if norm == 5.0:
            assert clip.average == pytest.approx(2.03)
    assert seen == [(True, 0.5), (True, 0.5), (False, 0.5), (True, 0.5), (False, 0.5), (False, 0.5), (True, 0.5)]
    assert (clip.num_taken, clip.num_skipped) == (4, 3)


def test_without_a_factor_only_what_is_not_finite_is_skipped():
    clip = GradientClip(OptimizerConfig(lr=1.0, spike_warmup=1))
    clip.update(1e-3)
    assert clip.admits(1e30) and not clip.admits(math.inf) and not clip.admits(math.nan)
    assert not GradientClip(OptimizerConfig(lr=1.0)).admits(math.nan), "not even the first step"


def test_moving_average_follows_its_recursion():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average, expected = MovingAverage(model.named_parameters(), 0.5), 0.0
    for step in range(6):
        model.weight.data.fill_(float(step + 1))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step + 1)
    assert average.shards["weight"].item() == pytest.approx(expected)
    with averaged_weights([average]):
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 6.0 and average.shards["weight"].item() == pytest.approx(expected)
    assert not torch.equal(average.shards["weight"], model.weight)


def test_elements_are_counted_of_the_whole():
    """A parameter of 4 x 6, whole; half of its rows (tensor ranks); nothing of it, and nothing of the half (ZeRO 3)."""
    whole, split, sharded, both = (nn.Parameter(torch.zeros(shape)) for shape in ((4, 6), (2, 6), (0,), (0,)))
    sharded.ds_numel, both.ds_numel = 24, 12
    split.tensor_shard = both.tensor_shard = TensorShard(0, 2)
    assert [num_elements(parameter) for parameter in (whole, split, sharded, both)] == [24] * 4
