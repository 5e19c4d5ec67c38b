"""The learning rate as a function of the step, groups of parameters, clipping, the spike guard, and the moving average of the
weights."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from videofm.config.train import OptimizerConfig, ParameterGroupConfig
from videofm.errors import ConfigError
from videofm.parallel.mesh import Mesh
from videofm.parallel.shards import bring_tensor, collect, gather_tensor, take_tensor, tensor_shard


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


_ALL = ParameterGroupConfig(match="*")


@dataclass(frozen=True)
class Group:
    """Parameters that share weight decay, rate and start."""

    rule: ParameterGroupConfig
    weight_decay: float
    parameters: list[nn.Parameter]

    def lr_scale(self, step: int) -> float:
        """Their rate over that of the others at optimizer step `step`; 0 while they are frozen."""
        since = step - self.rule.start_step
        if since < 0:
            return 0.0
        warm = min(1.0, (since + 1) / self.rule.warmup_steps) if self.rule.warmup_steps else 1.0
        return self.rule.lr_scale * warm


def parameter_groups(named_parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[Group]:
    """The parameters in groups, by the first pattern of `config.groups` that matches `ROLE.NAME`, the rest by themselves;
    matrices and kernels decay, vectors (biases, norms, tables of one dim) and what `config.no_decay` matches do not.

    Raises:
        ConfigError: a pattern matches no parameter.
    """
    sorted_in: dict[tuple[int, bool], list[nn.Parameter]] = {}
    rules = [*config.groups, _ALL]
    for name, parameter in named_parameters.items():
        first = next(index for index, rule in enumerate(rules) if fnmatch(name, rule.match))
        decays = parameter.dim() >= 2 and not any(fnmatch(name, pattern) for pattern in config.no_decay)
        sorted_in.setdefault((first, decays), []).append(parameter)
    for index, pattern in enumerate(config.no_decay):
        if not any(fnmatch(name, pattern) for name in named_parameters):
            raise ConfigError(f"optimizer.no_decay.{index} = {pattern!r} matches no parameter. {_some(named_parameters)}")
    used = {index for index, _ in sorted_in}
    for index, rule in enumerate(config.groups):
        if index not in used:
            raise ConfigError(
                f"optimizer.groups.{index}.match = {rule.match!r} matches no parameter that an earlier group left. "
                f"{_some(named_parameters)}"
            )
    order = sorted(sorted_in, key=lambda key: (key[0], not key[1]))
    return [Group(rules[index], config.weight_decay if decays else 0.0, sorted_in[index, decays]) for index, decays in order]


def _some(named_parameters: Mapping[str, nn.Parameter]) -> str:
    return f"Names are such as {', '.join(list(named_parameters)[:3])}."


class GradientClip:
    """What becomes of a gradient, by its norm before clipping: it is cut to a limit, or its step is skipped.

    The limit is a constant, a multiple of the norm's moving average, or the smaller. A step is skipped whose norm is not finite
    or, with `spike_factor`, beyond that multiple of the same average: nothing moves, as if its samples had never been read.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self.config = config
        self.average = 0.0
        self.num_taken = 0
        self.num_skipped = 0

    @property
    def limit(self) -> float:
        """For the next step; 0 does not clip."""
        limits = [self.config.grad_clip, self.config.grad_clip_ema * self.average]
        return min((limit for limit in limits if limit > 0), default=0.0)

    @property
    def spike(self) -> float:
        """The largest norm that the next step may have without being skipped."""
        guards = self.config.spike_factor > 0 and self.num_taken >= self.config.spike_warmup and self.average > 0
        return self.config.spike_factor * self.average if guards else sys.float_info.max

    def admits(self, norm: float) -> bool:
        """Whether a step of norm `norm` is taken."""
        return norm <= self.spike  # false for NaN

    def update(self, norm: float) -> None:
        """Take in the norm of a step, and count it as taken or skipped.

        A norm enters the average as at most `grad_clip_ema` times the average, and that of a skipped step not at all, so that
        neither raises it. The constant `grad_clip` does not bound it: where that cuts every step, norms still differ.
        """
        if not self.admits(norm):
            self.num_skipped += 1
            return
        most, decay = self.config.grad_clip_ema * self.average, self.config.grad_clip_ema_decay
        counted = min(norm, most) if most else norm
        self.average = decay * self.average + (1 - decay) * counted if self.average else counted
        self.num_taken += 1


def local_shard(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of `parameter`: its ZeRO-3 partition (flat), or its share of a tensor group, or the whole."""
    return parameter.ds_tensor.data if hasattr(parameter, "ds_tensor") else parameter.data  # type: ignore[union-attr]


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole of `parameter`, of which this rank may hold a share."""
    shape = list(getattr(parameter, "ds_shape", parameter.shape))
    shard = tensor_shard(parameter)
    if shard is not None:
        shape[shard.dim] *= shard.degree
    return tuple(shape)


def num_elements(parameter: nn.Parameter) -> int:
    """Elements of the whole of `parameter`, of which this rank may hold a share."""
    own = int(getattr(parameter, "ds_numel", parameter.numel()))
    shard = tensor_shard(parameter)
    return own if shard is None else own * shard.degree


def gather_shard(parameter: nn.Parameter, shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole tensor of which this rank holds `shard`; the inverse of `local_shard`.

    ZeRO-3 partitions lie in `group` (the gradient group), shares of a tensor group in the one that `parameter` names. All ranks
    of both call it.
    """
    return gather_tensor(parameter, _gather_partition(parameter, shard, group))


def bring_shard(parameter: nn.Parameter, shard: Tensor, mesh: Mesh, to: int | None) -> Tensor | None:
    """As `gather_shard`, for rank `to` only (None: for all); the others get None, and never hold the whole.

    Of each tensor rank's partitions the whole share meets at the rank that stands in its gradient group as `to` does in its
    own; these are the tensor group of `to`.
    """
    if to is None:
        return gather_shard(parameter, shard, mesh.gradient_group)
    if hasattr(parameter, "ds_tensor"):
        parts = collect(shard, mesh.gradient_group, mesh.gradient_rank(to))
        return None if parts is None else bring_to_tensor_rank(parameter, _joined(parameter, parts), mesh, to)
    return bring_to_tensor_rank(parameter, shard, mesh, to)


def bring_to_tensor_rank(parameter: nn.Parameter, share: Tensor, mesh: Mesh, to: int) -> Tensor | None:
    """The whole tensor at rank `to`, of which this rank holds the whole share of its tensor rank; None elsewhere. The ranks
    that stand in their gradient groups as `to` does call it, others may."""
    if mesh.gradient_rank(mesh.rank) != mesh.gradient_rank(to):
        return None
    whole = bring_tensor(parameter, share, mesh.layout.place(to)["tensor"])
    return whole if mesh.rank == to else None


def take_shard(parameter: nn.Parameter, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's share of a whole tensor, shaped as `local_shard`; padded with zeros as ZeRO-3 pads its last partition."""
    own = take_tensor(parameter, whole)
    if not hasattr(parameter, "ds_tensor"):
        return own
    size, rank = parameter.ds_tensor.numel(), dist.get_rank(group)
    flat = torch.zeros(size * dist.get_world_size(group), dtype=own.dtype, device=own.device)
    flat[: own.numel()] = own.flatten()
    return flat[rank * size : (rank + 1) * size]


def _gather_partition(parameter: nn.Parameter, shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What ZeRO-3 has cut into the flat `shard` of each rank of `group`; any other tensor as it is."""
    if not hasattr(parameter, "ds_tensor"):
        return shard
    parts = collect(shard, group, None)
    assert parts is not None
    return _joined(parameter, parts)


def _joined(parameter: nn.Parameter, parts: list[Tensor]) -> Tensor:
    """The tensor of which ZeRO-3 has given each rank one of `parts`; the last is padded."""
    return torch.cat(parts)[: parameter.ds_numel].reshape(parameter.ds_shape)  # type: ignore[attr-defined]


def _spread(parameter: nn.Parameter) -> None:
    """Bring a parameter that ZeRO-3 keeps whole beside its shards, as it does small ones, up to them. All ranks call it."""
    if hasattr(parameter, "ds_tensor") and parameter.shape == parameter.ds_shape:
        parameter.data.copy_(_gather_partition(parameter, local_shard(parameter), parameter.ds_process_group))


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

    def bring(self, name: str, mesh: Mesh, to: int | None) -> Tensor | None:
        """The average of one parameter as `bring_shard` brings it."""
        return bring_shard(self.parameters[name], self.shards[name], mesh, to)

    def load(self, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
        """Take whole tensors, by name, as the average."""
        for name, shard in self.shards.items():
            shard.copy_(take_shard(self.parameters[name], tensors[name], group))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights with the average; call it again to undo. All ranks call it."""
        for name, shard in self.shards.items():
            weights = local_shard(self.parameters[name])
            kept = weights.clone()
            weights.copy_(shard)
            shard.copy_(kept)
            _spread(self.parameters[name])


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
