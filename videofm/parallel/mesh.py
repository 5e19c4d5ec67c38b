"""The mesh of processes, over `megatron.core.parallel_state`. This is the only file that creates process groups.

Axes, fastest first: `tensor`, `context` (within it `ulysses`, then `ring`), `data`; `layout.MeshLayout` has the arithmetic.

- `data_group`: ranks that read different samples;
- `context_group`: ranks that share the tokens of a sample, of which `ulysses_group` exchange heads and `ring_group` pass keys
  and values on;
- `tensor_group`: ranks that share each matrix product;
- `gradient_group`: ranks that hold the same weights and sum gradients (`data x context`);
- `sample_group`: ranks that read the same samples (`context x tensor`);
- `checkpoint_group`: all ranks, over gloo, for what they tell each other about checkpoints while they train.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from videofm.config.train import ParallelConfig
from videofm.errors import ParallelError
from videofm.parallel.collectives import CollectiveError, is_communication, naming
from videofm.parallel.interfaces import interface_to_peers
from videofm.parallel.layout import MeshLayout, layout_of
from videofm.parallel.rendezvous import Place, agreed_ranks_per_node, find_place, first_line, meet

with warnings.catch_warnings():
    # megatron-core tells at import which optional CUDA packages it does without; `videofm doctor` is the place for that.
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state


@dataclass(frozen=True)
class Mesh:
    """This process's place among all, and the groups it belongs to."""

    rank: int
    layout: MeshLayout
    device: torch.device
    checkpoint_group: dist.ProcessGroup | None = None
    """All ranks, over gloo, for the thread that writes checkpoints; None for one process, which has nobody to talk to."""

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.layout.world_size

    @property
    def data_degree(self) -> int:
        """Number of groups of ranks that read different samples."""
        return self.layout.data_degree

    @property
    def data_rank(self) -> int:
        """Which samples this rank reads."""
        return self.layout.place(self.rank)["data"]

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Ranks that read different samples."""
        return parallel_state.get_data_parallel_group()

    @property
    def context_degree(self) -> int:
        """Number of ranks that share the tokens of a sample."""
        return self.layout.context_degree

    @property
    def context_rank(self) -> int:
        """Which share of the tokens this rank has; ring-major, ulysses-minor."""
        return self.layout.place(self.rank)["context"]

    @property
    def context_group(self) -> dist.ProcessGroup:
        """Ranks that share the tokens of a sample."""
        return parallel_state.get_context_parallel_group()

    @property
    def ulysses_degree(self) -> int:
        """Number of context ranks that exchange heads."""
        return self.layout.ulysses_degree

    @property
    def ulysses_rank(self) -> int:
        """Number of this rank among those that exchange heads."""
        return self.layout.place(self.rank)["ulysses"]

    @property
    def ulysses_group(self) -> dist.ProcessGroup:
        """Context ranks that exchange heads; neighbours."""
        return self._hierarchical(0)

    @property
    def ring_degree(self) -> int:
        """Number of context ranks among which keys and values go round."""
        return self.layout.ring_degree

    @property
    def ring_rank(self) -> int:
        """Number of this rank in its ring."""
        return self.layout.place(self.rank)["ring"]

    @property
    def ring_group(self) -> dist.ProcessGroup:
        """Context ranks among which keys and values go round."""
        return self._hierarchical(1)

    @property
    def tensor_degree(self) -> int:
        """Number of ranks that share each matrix product."""
        return self.layout.tensor_degree

    @property
    def tensor_rank(self) -> int:
        """Which share of the weights this rank has."""
        return self.layout.place(self.rank)["tensor"]

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """Ranks that share each matrix product."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def gradient_degree(self) -> int:
        """Number of ranks that sum gradients."""
        return self.layout.data_degree * self.layout.context_degree

    def gradient_rank(self, rank: int) -> int:
        """The number of `rank` in its gradient group."""
        place = self.layout.place(rank)
        return place["data"] * self.layout.context_degree + place["context"]

    @property
    def gradient_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same weights and sum gradients: `data x context`."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @property
    def sample_degree(self) -> int:
        """Number of ranks that read the same samples."""
        return self.layout.context_degree * self.layout.tensor_degree

    @property
    def sample_group(self) -> dist.ProcessGroup:
        """Ranks that read the same samples: `context x tensor`."""
        return parallel_state.get_tensor_and_context_parallel_group()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    @property
    def is_leader(self) -> bool:
        """Whether this rank reads for its `sample_group`; it is the first of them."""
        return self.rank == self.leader

    @property
    def leader(self) -> int:
        """The rank that reads for this rank's `sample_group`."""
        return self.layout.leader(self.rank)

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank; every rank must ask."""
        if self.world_size == 1:
            return flag
        value = torch.tensor([int(flag)], device=self.device)
        with naming("question to all ranks"):
            dist.all_reduce(value, op=dist.ReduceOp.MAX)
            return bool(value.item())

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value` over the ranks that read different samples."""
        if self.data_degree > 1:
            with naming("sum over samples", self.data_group):
                dist.all_reduce(value, group=self.data_group)
        return value

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """`value` of each rank that reads different samples, one behind the other along dim 0 in the order of ranks.

        Lengths along dim 0 may differ; the other dims and the dtype are those of all.
        """
        if self.data_degree == 1:
            return value
        with naming("gathering over samples", self.data_group):
            length = torch.tensor([len(value)], device=value.device)
            lengths = [torch.empty_like(length) for _ in range(self.data_degree)]
            dist.all_gather(lengths, length, group=self.data_group)
            counts = [int(count) for count in lengths]
            padded = value.new_zeros((max(counts), *value.shape[1:]))
            padded[: len(value)] = value
            parts = [torch.empty_like(padded) for _ in counts]
            dist.all_gather(parts, padded, group=self.data_group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def sum_gradients(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value`, a gradient of which each rank that holds the weight has a part."""
        if self.gradient_degree > 1:
            with naming("sum of gradients", self.gradient_group):
                dist.all_reduce(value, group=self.gradient_group)
        return value

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            with naming("barrier"):
                dist.barrier()

    def _hierarchical(self, level: int) -> dist.ProcessGroup:
        return parallel_state.get_hierarchical_context_parallel_groups()[level]


def create_mesh(
    config: ParallelConfig, device: torch.device, rendezvous: Path | Place | None = None, num_heads: Sequence[int] = ()
) -> Mesh:
    """Join the other processes and make the groups.

    Args:
        config: the degrees.
        device: where this rank computes; CUDA takes NCCL, anything else gloo.
        rendezvous: the place of this process, as `rendezvous.find_place` gave it; or a file that the ranks of one local
            launch share. Without it the place is looked for in the environment.
        num_heads: of the models whose attention is split, see `layout_of`.

    Raises:
        ParallelError: the degrees do not multiply to the number of processes, or do not fit each other or the nodes.
        CollectiveError: a rank did not come.
    """
    place = rendezvous if isinstance(rendezvous, Place) else find_place(file=rendezvous)
    _layout(config, place.world_size, place.ranks_per_node, num_heads)  # what cannot be fails before anybody is waited for
    ranks_per_node = _join(place, "nccl" if device.type == "cuda" else "gloo", config.timeout)
    return _split(_layout(config, place.world_size, ranks_per_node, num_heads), device, config.timeout)


def _join(place: Place, backend: str, timeout: float) -> int | None:
    """Meet the other ranks, and make the group of all. Returns `ranks_per_node` of the run."""
    store = meet(place, timeout)
    ranks_per_node = agreed_ranks_per_node(store, place)
    interface = interface_to_peers(place)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    patience = timedelta(seconds=timeout)
    try:
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=patience)
    except RuntimeError as error:
        if not is_communication(error):
            raise
        raise CollectiveError(
            f"all {place.world_size} ranks came, but rank {place.rank} on {socket.gethostname()} cannot connect to them: "
            f"{first_line(error)}. A rank died just now, or the nodes are joined by another network interface: name the one "
            "that they share in GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME), such as eth0."
        ) from error
    return ranks_per_node


def split_mesh(config: ParallelConfig, device: torch.device, num_heads: Sequence[int] = ()) -> Mesh:
    """Make the groups among processes that have joined already (`torch.distributed` is initialized); see `create_mesh`.

    `LOCAL_WORLD_SIZE`, where it is set, has to be the same on all of them.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE")
    layout = _layout(config, dist.get_world_size(), int(local) if local else None, num_heads)
    return _split(layout, device, config.timeout)


def destroy_mesh() -> None:
    """Leave the groups; a new mesh can be made afterwards."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _layout(config: ParallelConfig, world_size: int, ranks_per_node: int | None, num_heads: Sequence[int]) -> MeshLayout:
    layout = layout_of(config, ranks_per_node, num_heads)
    if layout.world_size != world_size:
        raise ParallelError(
            f"parallel.data_degree {config.data_degree} x context_degree {config.context_degree} x tensor_degree "
            f"{config.tensor_degree} = {layout.world_size} must equal the number of processes, {world_size}. Start "
            f"{layout.world_size} processes (`videofm train` does), or choose degrees whose product is {world_size}."
        )
    return layout


def _split(layout: MeshLayout, device: torch.device, timeout: float) -> Mesh:
    """The groups of `layout`. Hierarchical sizes are innermost first: neighbours exchange heads."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_degree,
        context_parallel_size=layout.context_degree,
        hierarchical_context_parallel_sizes=[layout.ulysses_degree, layout.ring_degree],
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout / 60,
    )
    return Mesh(dist.get_rank(), layout, device, _checkpoint_group(layout.world_size, device, timeout))


def _checkpoint_group(world_size: int, device: torch.device, timeout: float) -> dist.ProcessGroup | None:
    """A group apart from the training's: collectives of two threads must not meet in one. On the CPU the backend is that of all
    ranks (gloo, or none at all where a layout is only tried out)."""
    if world_size == 1:
        return None
    backend = dist.get_backend() if device.type == "cpu" else "gloo"
    return dist.new_group(backend=backend, timeout=timedelta(seconds=timeout), group_desc="checkpoint")
