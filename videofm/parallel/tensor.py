"""Tensor parallelism: the ranks of a tensor group share every matrix product of a model, bound by a table of module names.

What goes into a block and what comes out of it is whole and equal on every rank. Inside, a `column` layer gives each rank its
heads (or hidden features) and the `row` layer behind it adds up the shares (Shoeybi et al., arXiv 1909.08053). The rest of the
model is replicated, and gets equal gradients on every rank, because the gradient of what enters a column layer is all-reduced.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from videofm.errors import ParallelError
from videofm.parallel.shards import TensorMesh, TensorShard, split_parameter
from videofm.registry import resolve


@dataclass(frozen=True)
class Split:
    """One line of a table: what becomes of the modules whose names match `pattern` (fnmatch; `*` also spans dots).

    Attributes:
        pattern: of module names.
        kind: `column`: a linear layer, its output features split. `row`: a linear layer, its input features split, its output
            all-reduced. `norm`: an RMS norm over the channels of all heads, whose weight is split and whose mean square is
            taken over the tensor group. `shared`: its parameters are whole and work on a rank's own heads, so that their
            gradient is summed over the tensor group. `heads`: it counts its heads in `num_heads`, which becomes that of the
            rank.
        parts: projections that a column layer stores one behind the other; every rank has its heads of each.
    """

    pattern: str
    kind: Literal["column", "row", "norm", "shared", "heads"]
    parts: int = 1


TensorTable = tuple[Split, ...]


def apply(model: Any, table: TensorTable, mesh: TensorMesh) -> None:
    """Split `model` over the tensor group of `mesh`, in place; names of parameters stay.

    Args:
        model: with whole weights, on any device, and a config with `num_heads`.
        table: of the model.
        mesh: this process's place.

    Raises:
        ParallelError: heads or features that do not divide by the degree, a pattern without a module, or low-rank adapters; the
            model is as it was.
    """
    if getattr(model, "lora", None) is not None:
        raise ParallelError(
            f"low-rank adapters cannot be split: parallel.tensor_degree is {mesh.tensor_degree}, and the model has adapters. "
            "Set parallel.tensor_degree=1 (adapters need little memory; ZeRO stage 3 shards the weights), or leave lora out."
        )
    found = matches(model, table)
    _check(model, found, mesh.tensor_degree)
    for name, split in found.items():
        module = model.get_submodule(name)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, _split(module, split, mesh))


def matches(model: nn.Module, table: TensorTable) -> dict[str, Split]:
    """Name of every module that `table` speaks of -> its line.

    Raises:
        ParallelError: a pattern matches nothing.
    """
    names = [name for name, _ in model.named_modules()]
    found: dict[str, Split] = {}
    for split in table:
        matched = [name for name in names if fnmatch(name, split.pattern)]
        if not matched:
            raise ParallelError(
                f"{split.pattern!r} in the tensor table of {type(model).__name__} matches no module. "
                f"There are such as {', '.join(names[-3:])}."
            )
        assert not found.keys() & matched, f"two lines of the table speak of {sorted(found.keys() & matched)}"
        found |= dict.fromkeys(matched, split)
    return found


def weight_shards(split: Split, degree: int) -> dict[str, TensorShard]:
    """Names of the parameters that a line of the table splits -> how; the other parameters of the module stay whole."""
    features = TensorShard(0, degree, split.parts)
    return {
        "column": {"weight": features, "bias": features},
        "row": {"weight": TensorShard(1, degree)},
        "norm": {"weight": features},
    }.get(split.kind, {})


def check_heads(model: Any, degree: int) -> None:
    """See that each of `degree` tensor ranks gets whole heads of `model`.

    Raises:
        ParallelError: the degree does not divide them.
    """
    num_heads = model.config.num_heads
    if num_heads % degree:
        divisors = ", ".join(str(n) for n in range(1, num_heads + 1) if num_heads % n == 0)
        raise ParallelError(
            f"parallel.tensor_degree {degree} does not divide the {num_heads} heads of {type(model).__name__}: every rank has "
            f"whole heads. It can be {divisors}."
        )


def _check(model: Any, found: dict[str, Split], degree: int) -> None:
    check_heads(model, degree)
    for name, split in found.items():
        for key, shard in weight_shards(split, degree).items():
            weight = getattr(model.get_submodule(name), key)
            if weight is not None and not shard.fits(weight):
                each = f" in {shard.parts} parts" if shard.parts > 1 else ""
                raise ParallelError(
                    f"parallel.tensor_degree {degree} does not divide the {weight.shape[shard.dim]} features{each} of {name}: "
                    "set it to a number that does."
                )


def _split(module: Any, split: Split, mesh: TensorMesh) -> nn.Module:
    """What stands in the place of `module`; the module itself where only its parameters or numbers change."""
    shards = weight_shards(split, mesh.tensor_degree)
    if split.kind in ("column", "row"):
        return resolve(f"videofm.parallel.linear:{split.kind}")(module, shards, mesh)
    if split.kind == "norm":
        return NormAcrossHeads(module, shards["weight"], mesh)
    if split.kind == "shared":
        _sum_gradients(module.parameters(recurse=False), mesh.tensor_group)
    else:
        module.num_heads //= mesh.tensor_degree
    return module


class NormAcrossHeads(nn.Module):
    """`x w / sqrt(mean of x^2 + eps)` with the mean over the channels of all heads, of which each rank holds its own.

    It computes in float32, also under autocast.
    """

    def __init__(self, norm: Any, shard: TensorShard, mesh: TensorMesh) -> None:
        super().__init__()
        self.weight = split_parameter(norm.weight, shard, mesh)
        self.eps, self.num_channels, self._group = norm.eps, norm.weight.numel(), mesh.tensor_group

    def forward(self, x: Tensor) -> Tensor:
        """This rank's channels `(B, L, D / tensor_degree)` -> the same shape and dtype."""
        wide = x.float()
        mean_square = _summed(wide.square().sum(dim=-1, keepdim=True), self._group) / self.num_channels
        return (wide * torch.rsqrt(mean_square + self.eps) * self.weight.float()).to(x.dtype)


@torch.compiler.disable
def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over `group`; a compiled block calls it from outside of its graphs, which then hold no communication."""
    return _AllSum.apply(x, group)


class _AllSum(torch.autograd.Function):
    """The sum over a group. Every rank uses the sum, so the gradient of a term is the sum of the ranks' gradients of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_sum(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_sum(grads[0], ctx.group), None


def _all_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _sum_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Let the gradient of each parameter be summed over `group` before anything else sees it."""
    for parameter in parameters:
        trains = parameter.requires_grad
        # A hook is only taken by a tensor that has a gradient, and stays when that changes.
        parameter.requires_grad_(True).register_hook(lambda grad: _all_sum(grad, group))
        parameter.requires_grad_(trains)
