"""Who stands where, by hand for 8 ranks; what does not fit is refused with its numbers."""

from __future__ import annotations

from typing import Any

import pytest

from tools.show_mesh import main, show
from videofm.config.train import ParallelConfig
from videofm.errors import ParallelError
from videofm.parallel.layout import AXES, GROUPS, MeshLayout, layout_of

LAYOUTS = [MeshLayout(2, 2, 2, 2), MeshLayout(1, 8, 1, 4), MeshLayout(2, 6, 1, 3), MeshLayout(1, 4, 2, 1), MeshLayout()]


def layout(gpus_per_node: int | None = None, num_heads: tuple[int, ...] = (), **fields: Any) -> MeshLayout:
    return layout_of(ParallelConfig(**fields), gpus_per_node, num_heads)


def test_groups_of_two_by_two_by_two() -> None:
    """rank = 4 data + 2 context + tensor."""
    found = {name: layout(data_degree=2, context_degree=2, tensor_degree=2).groups(name) for name in GROUPS}
    assert found == {
        "tensor": [(0, 1), (2, 3), (4, 5), (6, 7)],
        "ulysses": [(0, 2), (1, 3), (4, 6), (5, 7)],
        "ring": [(rank,) for rank in range(8)],
        "context": [(0, 2), (1, 3), (4, 6), (5, 7)],
        "data": [(0, 4), (1, 5), (2, 6), (3, 7)],
        "gradient": [(0, 2, 4, 6), (1, 3, 5, 7)],
        "sample": [(0, 1, 2, 3), (4, 5, 6, 7)],
    }


def test_neighbours_exchange_heads_and_rings_join_them() -> None:
    found = layout(context_degree=4, tensor_degree=2, context_strategy="unified", ulysses_degree=2)
    assert found.groups("ulysses") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert found.groups("ring") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert [found.place(rank)["context"] for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3], "ring-major, ulysses-minor"


@pytest.mark.parametrize("found", LAYOUTS)
@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_a_partition_along_their_axes(found: MeshLayout, name: str) -> None:
    """Every rank is in one group; within it exactly the group's axes differ, and two ranks never have one place."""
    groups = found.groups(name)
    assert sorted(rank for ranks in groups for rank in ranks) == list(range(found.world_size))
    for ranks in groups:
        places = [found.place(rank) for rank in ranks]
        assert all(len({place[axis] for place in places}) == 1 for axis in AXES if axis not in GROUPS[name])
        assert len({tuple(place[axis] for axis in AXES) for place in places}) == len(ranks)


def test_a_leader_is_the_first_that_reads_a_sample() -> None:
    found = layout(data_degree=2, context_degree=2, tensor_degree=2)
    assert [found.leader(rank) for rank in range(8)] == [0] * 4 + [4] * 4
    assert all(found.leader(rank) == ranks[0] for ranks in found.groups("sample") for rank in ranks)


@pytest.mark.parametrize(
    ("expected", "gpus_per_node", "num_heads", "fields"),
    [
        (8, None, (), {"context_degree": 8}),
        (8, 8, (32,), {"context_degree": 8}),
        (4, 4, (32,), {"context_degree": 8}),  # two nodes
        (2, 4, (32,), {"context_degree": 8, "tensor_degree": 2}),  # 4 of a node are 2 x 2
        (4, 8, (12,), {"context_degree": 8}),  # 12 heads
        (3, 8, (6,), {"context_degree": 6, "tensor_degree": 2}),  # 3 heads a tensor rank; 3 x 2 of 12 processes: see below
        (1, 8, (5,), {"context_degree": 2}),
        (2, 8, (12, 10), {"context_degree": 4}),  # every model's heads
        (1, 8, (32,), {"context_degree": 8, "context_strategy": "ring"}),
        (1, 8, (32,), {"context_degree": 8, "context_strategy": "allgather_kv"}),
        (8, 8, (12,), {"context_degree": 8, "context_strategy": "ulysses"}),  # chosen: heads may be uneven
        (2, 8, (32,), {"context_degree": 8, "context_strategy": "unified", "ulysses_degree": 2}),
    ],
)
def test_how_many_exchange_heads(
    expected: int, gpus_per_node: int | None, num_heads: tuple[int, ...], fields: dict[str, Any]
) -> None:
    if fields.get("context_degree") == 6:
        gpus_per_node = 12  # on nodes of 8 a group of 3 x 2 would cross
        assert layout(8, num_heads, **fields).ulysses_degree == 1
    assert layout(gpus_per_node, num_heads, **fields).ulysses_degree == expected


@pytest.mark.parametrize(
    ("message", "gpus_per_node", "fields"),
    [
        (r"ulysses_degree 3 does not divide parallel.context_degree 4; take one of 1, 2, 4", 8,
         {"context_degree": 4, "context_strategy": "unified", "ulysses_degree": 3}),
        (r"context_strategy ring exchanges heads among 1 context ranks, so parallel.ulysses_degree 2 cannot hold", 8,
         {"context_degree": 4, "context_strategy": "ring", "ulysses_degree": 2}),
        (r"8 context ranks that exchange heads x 2 tensor ranks = 16 processes, which do not lie on one node of 8; .*"
         r"context_strategy=unified with a smaller parallel.ulysses_degree, or ring", 8,
         {"context_degree": 8, "tensor_degree": 2, "context_strategy": "ulysses"}),
        (r"4 context ranks that exchange heads x 1 tensor ranks = 4 processes, which do not lie on one node of 2", 2,
         {"context_degree": 8, "context_strategy": "unified", "ulysses_degree": 4}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(message: str, gpus_per_node: int, fields: dict[str, Any]) -> None:
    with pytest.raises(ParallelError, match=message):
        layout(gpus_per_node, **fields)


def test_a_mesh_in_words() -> None:
    assert MeshLayout().describe() == "1 process"
    assert layout(data_degree=2, context_degree=2, tensor_degree=2).describe() == "8 processes: 2 data x 2 context x 2 tensor"
    assert layout(data_degree=4).describe() == "4 processes: 4 data"


def test_the_tool_shows_ranks_and_groups(capsys: pytest.CaptureFixture[str]) -> None:
    lines = show(MeshLayout(2, 2, 1, 2), gpus_per_node=2).splitlines()
    assert lines[0] == "4 processes: 2 data x 2 context"
    assert [line.split()[:3] for line in lines[2:6]] == [["0", "0", "0"], ["1", "0", "0"], ["2", "1", "1"], ["3", "1", "1"]]
    assert [line.split("  ")[-1] for line in lines[2:6]] == ["samples 0 of 2", "<- 0", "samples 1 of 2", "<- 2"]
    assert "gradient: (0, 1, 2, 3)" in lines and not any(line.strip().startswith("tensor:") for line in lines)
    assert main(["1", "4", "1", "--ulysses", "3"]) == 2
    assert "does not divide" in capsys.readouterr().err
