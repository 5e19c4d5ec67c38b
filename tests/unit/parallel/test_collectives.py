"""A failed collective is told by its operation, its group and its ranks; other errors pass as they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from videofm.config.train import ParallelConfig
from videofm.parallel.collectives import CollectiveError, group_name, naming
from videofm.parallel.layout import GROUPS
from videofm.parallel.mesh import Mesh, destroy_mesh, split_mesh

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711. Good luck.\nmore"


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    """Rank 0 of 2 data x 4 context (2 ulysses x 2 ring) x 2 tensor."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    config = ParallelConfig(data_degree=2, context_degree=4, tensor_degree=2, ulysses_degree=2)
    yield split_mesh(config, torch.device("cpu"))
    destroy_mesh()


class Broken:
    """Work that ends as gloo's does when a peer is gone."""

    def wait(self) -> None:
        raise RuntimeError(GLOO)


def test_every_group_of_the_mesh_has_its_name(mesh: Mesh) -> None:
    for name in GROUPS:
        group = getattr(mesh, f"{name}_group")
        listed = ", ".join(map(str, dist.get_process_group_ranks(group)))
        assert group_name(group) == f"the {name} group (ranks {listed})"
    assert group_name(None) == f"the world group (ranks {', '.join(map(str, range(16)))})"


def test_many_ranks_are_cut_short(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 512)
    assert group_name(None).endswith("14, 15, ... 512 in all)")


def test_the_call_that_failed_is_named(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the block was about: within one block there are many calls over several groups."""

    def closed(*_: object, **__: object) -> None:
        raise RuntimeError(GLOO)

    monkeypatch.setattr(dist.ProcessGroup, "allreduce", closed)
    told = (
        r"^all_reduce over the gradient group \(ranks 0, 2, 4, 6, 8, 10, 12, 14\) failed after 0\.\d s "
        r"\(in the backward pass\): Connection closed by peer \[127.0.0.1\]:4711\. A rank"
    )
    with pytest.raises(CollectiveError, match=told) as caught, naming("backward pass"):
        dist.all_reduce(torch.ones(1), group=mesh.gradient_group)
    assert caught.value.exit_code == 1 and "parallel.timeout" in str(caught.value) and "more" not in str(caught.value)
    with pytest.raises(CollectiveError, match=r"^all_reduce over the world group"), naming("question", mesh.data_group):
        dist.all_reduce(torch.ones(1))


def test_work_that_is_waited_for_is_named_by_its_block(mesh: Mesh) -> None:
    with pytest.raises(CollectiveError, match=r"^ring exchange over the ring group \(ranks 0, 4\) failed after"):
        with naming("ring exchange", mesh.ring_group):
            Broken().wait()


def test_the_innermost_block_speaks(mesh: Mesh) -> None:
    with pytest.raises(CollectiveError, match=r"^halo exchange over the context group"), naming("backward pass"):
        with naming("halo exchange", mesh.context_group):
            Broken().wait()


def test_errors_of_torch_distributed_count(mesh: Mesh) -> None:
    with pytest.raises(CollectiveError, match=r"^first meeting over the world group .*wait timeout"), naming("first meeting"):
        raise dist.DistStoreError("wait timeout after 300000ms")


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("gloo"), KeyError("a")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, naming("backward pass"):
        raise error
    assert caught.value is error
