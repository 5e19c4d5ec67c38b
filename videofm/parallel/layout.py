"""The layout of a mesh as arithmetic: which rank stands where, and who is in a group with whom. Starts nothing.

Axes, fastest first: `tensor`, `context` (within it `ulysses`, then `ring`), `data`. Neighbouring ranks talk the most: those of
one node share a model first, then a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from videofm.config.train import ParallelConfig
from videofm.errors import ParallelError

AXES = ("tensor", "ulysses", "ring", "data")
"""Fastest first; `context` is `ulysses` and `ring` together."""

GROUPS = {
    "tensor": ("tensor",),
    "ulysses": ("ulysses",),
    "ring": ("ring",),
    "context": ("ulysses", "ring"),
    "data": ("data",),
    "gradient": ("ulysses", "ring", "data"),
    "sample": ("tensor", "ulysses", "ring"),
}
"""Name of a group -> the axes along which its ranks differ."""


@dataclass(frozen=True)
class MeshLayout:
    """Degrees of the axes; `context_degree` is `ulysses_degree` times `ring_degree`."""

    data_degree: int = 1
    context_degree: int = 1
    tensor_degree: int = 1
    ulysses_degree: int = 1

    @property
    def ring_degree(self) -> int:
        """Context ranks among which keys and values go round."""
        return self.context_degree // self.ulysses_degree

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.data_degree * self.context_degree * self.tensor_degree

    def place(self, rank: int) -> dict[str, int]:
        """The coordinates of `rank`: axis -> number, of all `AXES` and of `context`."""
        found = {}
        for axis, degree in self._degrees().items():
            rank, found[axis] = divmod(rank, degree)
        return {**found, "context": found["ring"] * self.ulysses_degree + found["ulysses"]}

    def leader(self, rank: int) -> int:
        """The rank that reads for the sample group of `rank`: the first of it."""
        return rank - rank % (self.context_degree * self.tensor_degree)

    def groups(self, name: str) -> list[tuple[int, ...]]:
        """Every group called `name` (one of `GROUPS`) as its ranks, in the order of their ranks within it."""
        fixed = [axis for axis in AXES if axis not in GROUPS[name]]
        together: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.place(rank)
            together.setdefault(tuple(place[axis] for axis in fixed), []).append(rank)
        return [tuple(ranks) for ranks in together.values()]

    def describe(self) -> str:
        """In words: `8 processes: 2 data x 2 context x 2 tensor`; axes of degree one are left out."""
        degrees = {"data": self.data_degree, "context": self.context_degree, "tensor": self.tensor_degree}
        parts = [f"{degree} {axis}" for axis, degree in degrees.items() if degree > 1]
        if self.world_size == 1:
            return "1 process"
        return f"{self.world_size} processes: {' x '.join(parts)}"

    def _degrees(self) -> dict[str, int]:
        return dict(zip(AXES, (self.tensor_degree, self.ulysses_degree, self.ring_degree, self.data_degree), strict=True))


def layout_of(config: ParallelConfig, gpus_per_node: int | None = None, num_heads: Sequence[int] = ()) -> MeshLayout:
    """The layout that `config` asks for.

    The context ranks that exchange heads are all of them under `ulysses`, none under `ring` and `allgather_kv`. Otherwise they
    are `ulysses_degree` or, where that is null, the largest divisor of `context_degree` whose groups stay on a node and which
    divides the heads of every model.

    Args:
        config: the degrees and the strategy.
        gpus_per_node: ranks that share a node; None where that is not known.
        num_heads: heads of the attention layers that the context ranks share, a number a model.

    Raises:
        ParallelError: `ulysses_degree` does not divide `context_degree` or has nothing to say under the chosen strategy; or
            heads would be exchanged between nodes.
    """
    context, strategy, wanted = config.context_degree, config.context_strategy, config.ulysses_degree
    if wanted is not None and context % wanted:
        raise ParallelError(
            f"parallel.ulysses_degree {wanted} does not divide parallel.context_degree {context}; take one of "
            f"{', '.join(map(str, _divisors(context)))}, or leave it out."
        )
    fixed = {"ulysses": context, "ring": 1, "allgather_kv": 1}.get(strategy)
    if fixed is not None and wanted not in (None, fixed):
        raise ParallelError(
            f"parallel.context_strategy {strategy} exchanges heads among {fixed} context ranks, so parallel.ulysses_degree "
            f"{wanted} cannot hold; leave it out, or set parallel.context_strategy=unified."
        )
    chosen = fixed or wanted
    if chosen is None:
        chosen = _largest_ulysses(config, gpus_per_node, num_heads)
    elif chosen > 1 and _crosses_nodes(chosen, config, gpus_per_node):
        raise ParallelError(
            f"{chosen} context ranks that exchange heads x {config.tensor_degree} tensor ranks = "
            f"{chosen * config.tensor_degree} processes, which do not lie on one node of {gpus_per_node}; between nodes it is "
            "faster to pass keys and values on. Set parallel.context_strategy=unified with a smaller parallel.ulysses_degree, "
            "or ring."
        )
    return MeshLayout(config.data_degree, context, config.tensor_degree, chosen)


def _largest_ulysses(config: ParallelConfig, gpus_per_node: int | None, num_heads: Sequence[int]) -> int:
    fit = [
        degree
        for degree in _divisors(config.context_degree)
        if not _crosses_nodes(degree, config, gpus_per_node)
        and all(heads // config.tensor_degree % degree == 0 for heads in num_heads)
    ]
    return max(fit, default=1)


def _crosses_nodes(ulysses_degree: int, config: ParallelConfig, gpus_per_node: int | None) -> bool:
    """Whether a group of this many context ranks, with their tensor ranks, lies on two nodes."""
    world_size = prod((config.data_degree, config.context_degree, config.tensor_degree))
    if gpus_per_node is None or world_size <= gpus_per_node:
        return False
    return gpus_per_node % (ulysses_degree * config.tensor_degree) != 0


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
