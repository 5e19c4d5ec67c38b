"""Where this process stands among those that share a sequence."""

from __future__ import annotations

from torch.distributed import ProcessGroup

from videofm.attention.comm import degree, rank_in
from videofm.attention.layout import SequenceLayout
from videofm.errors import ParallelError


class SequencePlace:
    """The groups of this process, and the layout of the sequence at hand.

    One object for all attention layers of a model. `context` holds all ranks that share a sequence. Where these form a grid,
    `ulysses` is the row of this rank and `ring` its column, and context rank = ring rank * ulysses degree + ulysses rank.

    `layout` is set by whoever splits the sequence, before the layers run. A layer reads it when it is called; recomputation
    under activation checkpointing reads it again, so it must stay until the backward pass of the same sequence is over.

    Raises:
        ParallelError: `ulysses` and `ring` do not form the grid of `context`.
    """

    def __init__(
        self, context: ProcessGroup | None = None, ulysses: ProcessGroup | None = None, ring: ProcessGroup | None = None
    ) -> None:
        self.context, self.ulysses, self.ring = context, ulysses, ring
        self._layout: SequenceLayout | None = None
        self.layout_text = ""
        if ulysses is None and ring is None:
            return
        rank = self.ring_rank * self.ulysses_degree + self.ulysses_rank
        if (self.ring_degree * self.ulysses_degree, rank) != (self.context_degree, self.context_rank):
            raise ParallelError(
                f"a ring of {self.ring_degree} ranks times ulysses over {self.ulysses_degree} puts this process at {rank}, but "
                f"it is rank {self.context_rank} of a context group of {self.context_degree}: make the groups with ulysses "
                "over neighbours and the ring over every ulysses_degree-th rank."
            )

    @property
    def layout(self) -> SequenceLayout | None:
        """Which tokens each context rank holds; None before a model's entry has set it."""
        return self._layout

    @layout.setter
    def layout(self, layout: SequenceLayout | None) -> None:
        if layout is not None and len(layout.lengths) != self.context_degree:
            raise ParallelError(
                f"the layout has {len(layout.lengths)} parts for a context group of {self.context_degree} ranks: "
                "each rank holds one part."
            )
        self._layout = layout
        self.layout_text = "" if layout is None else layout.to_text()

    @property
    def context_degree(self) -> int:
        """Ranks that share a sequence."""
        return degree(self.context)

    @property
    def context_rank(self) -> int:
        """This process among them: the part of the layout that it holds."""
        return rank_in(self.context)

    @property
    def ulysses_degree(self) -> int:
        """Ranks that trade tokens for heads, where the grid is made."""
        return degree(self.ulysses)

    @property
    def ulysses_rank(self) -> int:
        """This process among those."""
        return rank_in(self.ulysses)

    @property
    def ring_degree(self) -> int:
        """Ranks that pass keys and values on, where the grid is made."""
        return degree(self.ring)

    @property
    def ring_rank(self) -> int:
        """This process among those."""
        return rank_in(self.ring)
