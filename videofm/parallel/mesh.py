"""The mesh of processes, over `megatron.core.parallel_state`. This is the only file that creates process groups.

Axes, fastest first: `tensor`, `context` (within it `ulysses`, then `ring`), `data`; `layout.MeshLayout` has the arithmetic.

- `data_group`: ranks that read different samples;
- `context_group`: ranks that share the tokens of a sample, of which `ulysses_group` exchange heads and `ring_group` pass keys
  and values on;
- `tensor_group`: ranks that share each matrix product;
- `gradient_group`: ranks that hold the same weights and sum gradients (`data x context`);
- `sample_group`: ranks that read the same samples (`context x tensor`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from videofm.config.train import ParallelConfig
from videofm.errors import ParallelError
from videofm.parallel.collectives import naming
from videofm.parallel.layout import MeshLayout, layout_of

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
    config: ParallelConfig, device: torch.device, rendezvous: Path | None = None, num_heads: Sequence[int] = ()
) -> Mesh:
    """Join the other processes and make the groups.

    Args:
        config: the degrees.
        device: where this rank computes; CUDA takes NCCL, anything else gloo.
        rendezvous: a file that the ranks of one local launch share; without it the addresses of torchrun's environment
            (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`) are used, and with neither a mesh of one process is made.
            `LOCAL_WORLD_SIZE`, where it is set, says how many ranks share a node.
        num_heads: of the models whose attention is split, see `layout_of`.

    Raises:
        ParallelError: the degrees do not multiply to the number of processes, or do not fit each other or the nodes.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    layout = _layout(config, world_size, num_heads)
    timeout = timedelta(seconds=config.timeout)
    with naming("first meeting"):
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_store(rank, world_size, rendezvous, timeout),
            rank=rank,
            world_size=world_size,
            timeout=timeout,
        )
    return _split(layout, device, config.timeout)


def split_mesh(config: ParallelConfig, device: torch.device, num_heads: Sequence[int] = ()) -> Mesh:
    """Make the groups among processes that have joined already (`torch.distributed` is initialized); see `create_mesh`."""
    return _split(_layout(config, dist.get_world_size(), num_heads), device, config.timeout)


def destroy_mesh() -> None:
    """Leave the groups; a new mesh can be made afterwards."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _layout(config: ParallelConfig, world_size: int, num_heads: Sequence[int]) -> MeshLayout:
    gpus_per_node = os.environ.get("LOCAL_WORLD_SIZE")
    layout = layout_of(config, int(gpus_per_node) if gpus_per_node else None, num_heads)
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
    return Mesh(dist.get_rank(), layout, device)


def _store(rank: int, world_size: int, rendezvous: Path | None, timeout: timedelta) -> dist.Store:
    if rendezvous is not None:
        return dist.FileStore(str(rendezvous), world_size)
    if world_size == 1:
        return dist.HashStore()
    # Under torchrun the agent hosts the store and outlives an attempt: without a prefix of its own a restarted worker
    # reads the addresses of dead peers.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    hosted = "TORCHELASTIC_RUN_ID" in os.environ
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size, is_master=not hosted and rank == 0, timeout=timeout)
    return dist.PrefixStore(f"attempt{attempt}", store)
