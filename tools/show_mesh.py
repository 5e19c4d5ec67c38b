"""Print a mesh of processes: which rank holds what, and who is in a group with whom. Starts nothing.

python tools/show_mesh.py DATA CONTEXT TENSOR [--ulysses U] [--gpus-per-node G]
"""

from __future__ import annotations

import argparse
import sys

from videofm.config.train import ParallelConfig
from videofm.errors import ParallelError
from videofm.parallel.layout import GROUPS, MeshLayout, layout_of

AXES = ("data", "context", "ring", "ulysses", "tensor")


def show(layout: MeshLayout, gpus_per_node: int | None = None) -> str:
    """A line a rank: its node, its place on each axis, whether it reads; then the groups that have more than one rank."""
    lines = [layout.describe(), "  ".join(["rank", "node", *AXES, "reads"] if gpus_per_node else ["rank", *AXES, "reads"])]
    for rank in range(layout.world_size):
        place = layout.place(rank)
        cells = [f"{rank:4d}"] + ([f"{rank // gpus_per_node:4d}"] if gpus_per_node else [])
        cells += [f"{place[axis]:{len(axis)}d}" for axis in AXES]
        reads = (
            f"samples {place['data']} of {layout.data_degree}" if rank == layout.leader(rank) else f"<- {layout.leader(rank)}"
        )
        lines.append("  ".join([*cells, reads]))
    for name in GROUPS:
        groups = layout.groups(name)
        if len(groups[0]) > 1:
            lines.append(f"{name:>8}: " + " ".join(f"({', '.join(map(str, ranks))})" for ranks in groups))
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Print the mesh of the degrees in `arguments`; 2 where they do not fit each other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for axis in ("data", "context", "tensor"):
        parser.add_argument(axis, type=int, help=f"degree of the {axis} axis")
    parser.add_argument("--ulysses", type=int, help="context ranks that exchange heads; the most that a node allows")
    parser.add_argument("--gpus-per-node", type=int, help="ranks that share a node; one node holds all")
    chosen = parser.parse_args(arguments)
    config = ParallelConfig(
        data_degree=chosen.data,
        context_degree=chosen.context,
        tensor_degree=chosen.tensor,
        ulysses_degree=chosen.ulysses,
    )
    try:
        print(show(layout_of(config, chosen.gpus_per_node), chosen.gpus_per_node))
    except ParallelError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
