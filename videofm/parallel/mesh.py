"""The mesh of processes, over `megatron.core.parallel_state`. This is the only file that creates process groups.

Axes, fastest first: `tensor`, `context`, `data`. This release splits along `data`; the groups of the other axes exist with
degree one, so that every user of the mesh already asks for the group it means:

- `data_group`: ranks that read different samples;
- `gradient_group`: the ranks with whom gradients are averaged (`data x context`).
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from math import ceil
from pathlib import Path

import torch
import torch.distributed as dist

from videofm.config.train import ParallelConfig
from videofm.errors import ParallelError

with warnings.catch_warnings():
    # megatron-core tells at import which optional CUDA packages it does without; `videofm doctor` is the place for that.
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state


@dataclass(frozen=True)
class Mesh:
    """This process's place among all, and the groups it belongs to."""

    rank: int
    world_size: int
    data_rank: int
    data_degree: int
    device: torch.device
    pipe_degree: int = 1
    context_degree: int = 1
    tensor_degree: int = 1

    @property
    def data_group(self) -> dist.ProcessGroup:
        """Ranks that read different samples."""
        return parallel_state.get_data_parallel_group()

    @property
    def gradient_group(self) -> dist.ProcessGroup:
        """Ranks with whom gradients are averaged: `data x context`."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def any_rank(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank; every rank must ask."""
        if self.world_size == 1:
            return flag
        value = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of `value` over the ranks that read different samples."""
        if self.data_degree > 1:
            dist.all_reduce(value, group=self.data_group)
        return value

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()


def create_mesh(config: ParallelConfig, device: torch.device, rendezvous: Path | None = None) -> Mesh:
    """Join the other processes and make the groups.

    Args:
        config: the degrees.
        device: where this rank computes; CUDA takes NCCL, anything else gloo.
        rendezvous: a file that the ranks of one local launch share; without it the addresses of torchrun's environment
            (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`) are used, and with neither a mesh of one process is made.

    Raises:
        ParallelError: the degrees do not multiply to the number of processes.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if config.data_degree != world_size:
        raise ParallelError(
            f"parallel.data_degree {config.data_degree} must equal the number of processes, {world_size}. "
            f"Start {config.data_degree} processes (`videofm train` does), or set parallel.data_degree={world_size}."
        )
    timeout = timedelta(seconds=config.timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=_store(rank, world_size, rendezvous, timeout),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    parallel_state.initialize_model_parallel(
        create_gloo_process_groups=False, distributed_timeout_minutes=ceil(config.timeout / 60)
    )
    return Mesh(rank, world_size, parallel_state.get_data_parallel_rank(), config.data_degree, device)


def destroy_mesh() -> None:
    """Leave the groups; a new mesh can be made afterwards."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


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
