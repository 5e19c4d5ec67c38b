"""The learning rate as a function of the step, the groups of parameters, and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from videofm.config.train import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Rate of optimizer step `step` (0 is the first): linear warm-up to `lr`, then `schedule` down to `final_ratio * lr`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, max_steps - 1 - config.warmup_steps)
    progress = min(1.0, progress)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.final_ratio + (1 - config.final_ratio) * fall)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; vectors (biases, norms, tables of one dim) do not."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def local_shard(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of `parameter`: its ZeRO-3 partition (flat), or the whole."""
    return parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data  # type: ignore[union-attr]


def gather_shard(parameter: nn.Parameter, shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole tensor of which every rank of `group` holds `shard`; the inverse of `local_shard`. All ranks call it."""
    if not hasattr(parameter, "ds_tensor"):
        return shard
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return torch.cat(parts)[: parameter.ds_numel].reshape(parameter.ds_shape)  # type: ignore[attr-defined]


def take_shard(parameter: nn.Parameter, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's share of a whole tensor, padded with zeros as ZeRO-3 pads its last partition."""
    if not hasattr(parameter, "ds_tensor"):
        return whole
    size, rank = parameter.ds_tensor.numel(), dist.get_rank(group)
    flat = torch.zeros(size * dist.get_world_size(group), dtype=whole.dtype, device=whole.device)
    flat[: whole.numel()] = whole.flatten()
    return flat[rank * size : (rank + 1) * size]


class MovingAverage:
    """Exponential moving average of the weights in fp32, over what this rank holds of them.

    `average <- d * average + (1 - d) * weights` with `d = min(decay, (1 + step) / (10 + step))`, so that the first weights,
    which are random, fade early.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], decay: float) -> None:
        self.decay = decay
        self.parameters = dict(named_parameters)
        self.shards = {name: local_shard(parameter).detach().float().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (0 is the first)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [local_shard(parameter).float() for parameter in self.parameters.values()]
        torch._foreach_lerp_(list(self.shards.values()), weights, 1 - decay)

    def whole(self, group: dist.ProcessGroup) -> dict[str, Tensor]:
        """The average as whole tensors by name. All ranks of `group` call it."""
        return {name: gather_shard(self.parameters[name], shard, group) for name, shard in self.shards.items()}

    def load(self, tensors: dict[str, Tensor], group: dist.ProcessGroup) -> None:
        """Take whole tensors, by name, as the average."""
        for name, shard in self.shards.items():
            shard.copy_(take_shard(self.parameters[name], tensors[name], group))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights with the average; call it again to undo."""
        for name, shard in self.shards.items():
            weights = local_shard(self.parameters[name])
            kept = weights.clone()
            weights.copy_(shard)
            shard.copy_(kept)


@contextmanager
def averaged_weights(averages: Iterable[MovingAverage]) -> Iterator[None]:
    """Inside, the models carry their moving averages."""
    listed = list(averages)
    for average in listed:
        average.swap()
    try:
        yield
    finally:
        for average in listed:
            average.swap()
