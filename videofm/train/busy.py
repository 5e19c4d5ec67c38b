"""How long a rank works for itself: what tells an idle rank from a busy one, where every rank's step ends at the same time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from videofm.parallel.mesh import Mesh


class BusyTime:
    """Sums the time of pieces of work on a device that wait for no other rank."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pieces: list[Callable[[], float]] = []

    @contextmanager
    def piece(self) -> Iterator[None]:
        """Count what happens inside. On CUDA by events, so that the host does not wait."""
        if self._cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._pieces.append(lambda: first.elapsed_time(last) / 1000)  # ms -> s
            return
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._pieces.append(lambda: seconds)

    def take(self) -> float:
        """Seconds since the last call. The device must be done with them, as it is once the losses were read."""
        seconds = sum(piece() for piece in self._pieces)
        self._pieces.clear()
        return seconds


def slowest_rank(mesh: Mesh, busy: float, num_replaced: int = 0) -> tuple[float, int]:
    """The largest `busy` of the ranks over their mean, 1 where none waits for another, and the sum of `num_replaced` over the
    ranks that read. Every rank calls it."""
    if mesh.data_degree == 1:
        return 1.0, num_replaced
    seconds = torch.zeros(mesh.data_degree + 1, dtype=torch.float64, device=mesh.device)
    seconds[mesh.data_rank], seconds[-1] = busy, num_replaced
    mesh.sum(seconds)
    return float(seconds[:-1].max() / seconds[:-1].mean()), int(seconds[-1])
