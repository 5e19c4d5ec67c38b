"""Learning rate by its formula, groups of parameters, and the moving average by its recursion."""

import pytest
import torch
from torch import nn

from videofm.config.train import OptimizerConfig
from videofm.train.optim import MovingAverage, averaged_weights, learning_rate, parameter_groups


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
    groups = parameter_groups(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), 0.1)
    assert [[tuple(p.shape) for p in group["params"]] for group in groups] == [[(4, 3)], [(4,), (4,), (4,)]]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


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
