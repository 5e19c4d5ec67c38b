"""What ranks tell each other about a checkpoint. It goes through a gloo group of its own, so that the thread that writes never
stands in the way of a collective of the training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from videofm.parallel.collectives import naming


@dataclass(frozen=True)
class Peers:
    """This process among those that write or check a checkpoint together; by itself unless a group is given."""

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank makes, renames and deletes folders."""
        return self.rank == 0

    def share(self, value: Any) -> list[Any]:
        """The `value` of each rank, in their order. All ranks call it; values are what JSON holds (lists come for tuples).

        Raises:
            CollectiveError: a rank ended, or came too late.
        """
        if self.world_size == 1:
            return [value]
        with naming("checkpoint", self.group):
            said = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
            length = torch.tensor([len(said)])
            lengths = [torch.empty_like(length) for _ in range(self.world_size)]
            dist.all_gather(lengths, length, group=self.group)
            sizes = [int(size) for size in lengths]
            padded = torch.zeros(max(sizes), dtype=torch.uint8)
            padded[: len(said)] = said
            answers = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(answers, padded, group=self.group)
        return [json.loads(bytes(answer[:size].numpy())) for answer, size in zip(answers, sizes, strict=True)]
