"""Megatron's groups are those of the arithmetic, and DeepSpeed's unit names the right ones; ranks are played one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from videofm.config.train import ParallelConfig
from videofm.errors import ParallelError
from videofm.parallel.layout import GROUPS
from videofm.parallel.mesh import Mesh, create_mesh, destroy_mesh, split_mesh
from videofm.parallel.mpu import DeepSpeedMpu

DEGREES = [(2, 2, 2, None), (1, 4, 2, 2), (2, 4, 1, 2), (1, 8, 1, 4), (8, 1, 1, None), (1, 1, 8, None), (1, 1, 1, None)]
CPU = torch.device("cpu")


@contextmanager
def played(rank: int, data: int, context: int, tensor: int, ulysses: int | None) -> Iterator[Mesh]:
    """The mesh as `rank` sees it; a fake backend answers for all others."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=data * context * tensor)
    try:
        yield split_mesh(
            ParallelConfig(data_degree=data, context_degree=context, tensor_degree=tensor, ulysses_degree=ulysses, timeout=7),
            CPU,
        )
    finally:
        destroy_mesh()


def ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


@pytest.mark.parametrize("degrees", DEGREES)
def test_groups_are_those_of_the_layout(degrees: tuple[int, int, int, int | None]) -> None:
    """Of every rank and every name, with the ranks in order; degree and rank are those within the group."""
    world_size = degrees[0] * degrees[1] * degrees[2]
    for rank in range(world_size):
        with played(rank, *degrees) as mesh:
            assert (mesh.rank, mesh.world_size) == (rank, world_size)
            for name in GROUPS:
                group = getattr(mesh, f"{name}_group")
                assert (ranks(group),) == tuple(found for found in mesh.layout.groups(name) if rank in found), (rank, name)
                if name not in ("gradient", "sample"):
                    assert getattr(mesh, f"{name}_rank") == dist.get_rank(group), (rank, name)
                assert getattr(mesh, f"{name}_degree") == dist.get_world_size(group), (rank, name)
            assert mesh.is_leader == (rank == ranks(mesh.sample_group)[0]) and mesh.leader == ranks(mesh.sample_group)[0]
            assert mesh.is_main == (rank == 0)


@pytest.mark.parametrize("degrees", DEGREES)
def test_deepspeed_is_told_which_ranks_share_weights(degrees: tuple[int, int, int, int | None]) -> None:
    """Its model parallel is the tensor axis, its data parallel all that hold the same weights; it hears of no sequence axis,
    for which it would divide otherwise."""
    for rank in range(degrees[0] * degrees[1] * degrees[2]):
        with played(rank, *degrees) as mesh:
            unit = DeepSpeedMpu()
            assert ranks(unit.get_model_parallel_group()) == ranks(mesh.tensor_group)
            assert unit.get_model_parallel_rank() == mesh.tensor_rank
            assert unit.get_model_parallel_world_size() == mesh.tensor_degree
            assert ranks(unit.get_data_parallel_group()) == ranks(mesh.gradient_group)
            assert unit.get_data_parallel_rank() == dist.get_rank(mesh.gradient_group)
            assert unit.get_data_parallel_world_size() == mesh.gradient_degree
            assert not any("sequence" in name for name in dir(unit))


def test_groups_wait_as_long_as_configured() -> None:
    """To the second: megatron counts in minutes."""
    given: list[Any] = []
    new_group = dist.new_group
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "new_group", lambda **chosen: given.append(chosen["timeout"]) or new_group(**chosen))
        with played(0, 2, 2, 1, None):
            pass
    assert given and set(given) == {timedelta(seconds=7)}


def test_degrees_must_multiply_to_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "6", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    config = ParallelConfig(data_degree=2, context_degree=2, tensor_degree=2)
    told = r"data_degree 2 x context_degree 2 x tensor_degree 2 = 8 must equal the number of processes, 6. Start 8 processes"
    with pytest.raises(ParallelError, match=told):
        create_mesh(config, CPU)


def test_the_environment_says_how_many_ranks_share_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ParallelError, match=r"= 8 processes, which do not lie on one node of 4"):
        create_mesh(ParallelConfig(context_degree=8, context_strategy="ulysses"), CPU)


def test_one_process_is_a_mesh_of_size_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    mesh = create_mesh(ParallelConfig(), CPU)
    try:
        assert mesh.is_main and mesh.is_leader and not mesh.any_rank(False) and mesh.any_rank(True)
        value = torch.tensor([3.0])
        assert mesh.sum(value) is value and value.item() == 3.0
        mesh.barrier()
    finally:
        destroy_mesh()
