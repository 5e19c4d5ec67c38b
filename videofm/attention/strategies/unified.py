"""Unified sequence parallelism (arXiv 2405.07719): Ulysses among neighbours, a ring over what they hold together.

Context rank = ring rank * ulysses degree + ulysses rank, so that tokens are traded for heads between the devices that lie
closest, and only blocks of keys and values of these heads cross nodes.
"""

from __future__ import annotations

from torch.distributed import ProcessGroup

from videofm.attention.api import AttentionSpec
from videofm.attention.strategies import ring
from videofm.attention.strategies.place import SequencePlace
from videofm.attention.strategies.ulysses import UlyssesStrategy
from videofm.errors import ParallelError


class UnifiedStrategy(UlyssesStrategy):
    """Ulysses inside, a ring outside."""

    name = "unified"
    inside = ring.STRATEGY

    def refuse(self, spec: AttentionSpec, context_degree: int, ulysses_degree: int) -> str | None:
        """Besides what all strategies refuse: degrees that form no grid."""
        if context_degree % ulysses_degree:
            return (
                f"ulysses over {ulysses_degree} ranks does not divide the {context_degree} ranks that share a sequence: choose "
                f"a divisor of {context_degree}."
            )
        return super().refuse(spec, context_degree, ulysses_degree)

    def check_groups(self, place: SequencePlace) -> None:
        """Raises ParallelError where the grid is missing."""
        if place.ring is None or place.ulysses is None:
            raise ParallelError(
                "attention strategy unified needs a grid: give SequencePlace the groups `ulysses` and `ring` beside `context`."
            )

    def groups(self, place: SequencePlace) -> tuple[ProcessGroup | None, ProcessGroup | None]:
        """The row and the column of this rank."""
        return place.ulysses, place.ring


STRATEGY = UnifiedStrategy()
