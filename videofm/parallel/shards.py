"""Parameters that are split over the ranks of a tensor group: how, and the way between a rank's share and the whole.

A split parameter carries a `TensorShard` and its group, as ZeRO leaves its own marks on parameters. Checkpoints, moving
averages and optimizer moments are whole everywhere outside, so that they say nothing of the layout they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class TensorShard:
    """How a tensor is split.

    Attributes:
        dim: the dim that is split.
        degree: ranks that have a share each.
        parts: tensors stored one behind the other along `dim` (queries, keys, values); each is split by itself.
    """

    dim: int
    degree: int
    parts: int = 1

    def fits(self, whole: Tensor) -> bool:
        """Whether every part of `whole` divides by the degree."""
        return whole.shape[self.dim] % (self.parts * self.degree) == 0

    def take(self, whole: Tensor, rank: int) -> Tensor:
        """The share of `rank`, a tensor of its own, contiguous."""
        parts = whole.chunk(self.parts, self.dim)
        return torch.cat([part.chunk(self.degree, self.dim)[rank] for part in parts], self.dim)

    def join(self, shares: Sequence[Tensor]) -> Tensor:
        """The whole tensor of the shares of all ranks, in their order; the inverse of `take`."""
        by_rank = [share.chunk(self.parts, self.dim) for share in shares]
        return torch.cat([pieces[part] for part in range(self.parts) for pieces in by_rank], self.dim)


class TensorMesh(Protocol):
    """What is asked of a mesh here."""

    @property
    def tensor_rank(self) -> int:
        """Place of this process in its tensor group."""

    @property
    def tensor_degree(self) -> int:
        """Ranks of a tensor group."""

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """The ranks that share the matrix products of a model."""


def split_parameter(whole: nn.Parameter, shard: TensorShard, mesh: TensorMesh) -> nn.Parameter:
    """This rank's share of `whole` as a parameter that says how it is split, in our words and in those of megatron-core.

    DeepSpeed reads the latter for the norm of the gradient, in which a split parameter counts on every rank, others on one.
    """
    own = nn.Parameter(shard.take(whole.detach(), mesh.tensor_rank), requires_grad=whole.requires_grad)
    own.tensor_shard, own.tensor_group = shard, mesh.tensor_group  # type: ignore[attr-defined]
    own.tensor_model_parallel = own.model_parallel = True  # type: ignore[attr-defined]
    own.partition_dim, own.partition_stride = shard.dim, shard.parts  # type: ignore[attr-defined]
    return own


def tensor_shard(parameter: Tensor) -> TensorShard | None:
    """How `parameter` is split over a tensor group; None if it is not."""
    return getattr(parameter, "tensor_shard", None)


def gather_tensor(parameter: nn.Parameter, share: Tensor) -> Tensor:
    """The whole of which every rank of the tensor group of `parameter` holds `share` (the weight, a moment, an average).

    All ranks of the group call it. A parameter that is not split gives `share` itself.
    """
    whole = bring_tensor(parameter, share, None)
    assert whole is not None
    return whole


def bring_tensor(parameter: nn.Parameter, share: Tensor, to: int | None) -> Tensor | None:
    """As `gather_tensor`, for the rank that has the number `to` in the tensor group only; the others get None."""
    shard = tensor_shard(parameter)
    if shard is None:
        return share
    shares = collect(share, parameter.tensor_group, to)  # type: ignore[attr-defined]
    return None if shares is None else shard.join(shares)


def collect(share: Tensor, group: dist.ProcessGroup, to: int | None) -> list[Tensor] | None:
    """`share` of each rank of `group`, in their order, at its rank number `to` (elsewhere None), or with None at all of them.
    All ranks of the group call it, with tensors of one shape."""
    share = share.contiguous()
    there = to is None or dist.get_rank(group) == to
    shares = [torch.empty_like(share) for _ in range(dist.get_world_size(group))] if there else None
    if to is None:
        dist.all_gather(shares, share, group=group)
    else:
        dist.gather(share, shares, group=group, group_dst=to)
    return shares


def take_tensor(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """This rank's share of `whole`, split as `parameter` is; the inverse of `gather_tensor`."""
    shard = tensor_shard(parameter)
    return whole if shard is None else shard.take(whole, dist.get_rank(parameter.tensor_group))  # type: ignore[attr-defined]
