"""State that no gradient keeps equal, on ranks that work on the same samples."""

from __future__ import annotations

import torch
import torch.distributed as dist

from videofm.parallel.collectives import naming
from videofm.parallel.mesh import Mesh


class Replicated:
    """`types.Ranks` of a mesh: what is summed or gathered over samples, the same to the last bit on ranks that share samples.

    Each of these does the same sums, in groups of their own and with kernels that add in no fixed order, so that last bits
    may differ; codebooks that follow such sums would drift apart. The leader of those that share samples tells the others its
    result.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    @property
    def data_degree(self) -> int:
        """How many ranks read different samples."""
        return self._mesh.data_degree

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """`Mesh.sum`, that of the leader."""
        return self._of_leader(self._mesh.sum(value))

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        """`Mesh.gather`, that of the leader; it has the same shape on all ranks that share samples."""
        return self._of_leader(self._mesh.gather(value))

    def _of_leader(self, value: torch.Tensor) -> torch.Tensor:
        if self._mesh.sample_degree == 1:
            return value
        value = value.contiguous()
        with naming("statistics of the leader", self._mesh.sample_group):
            dist.broadcast(value, self._mesh.leader, group=self._mesh.sample_group)
        return value
