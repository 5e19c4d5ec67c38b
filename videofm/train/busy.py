"""How long a rank works for itself: what tells an idle rank from a busy one, where every rank's step ends at the same time, and
which rank keeps the others waiting."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from videofm.parallel.mesh import Mesh
from videofm.progress import LOG


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


@dataclass(frozen=True)
class Slowest:
    """Who was busy longest in a step: its `share`, the time of that rank over the mean of the ranks; 1 where none waits for
    another. Of ranks that share samples the first stands for all. `num_replaced` is the sum over the ranks that read."""

    share: float
    rank: int
    num_replaced: int


def slowest_rank(mesh: Mesh, busy: float, num_replaced: int = 0) -> Slowest:
    """Compare the seconds that the ranks were `busy` in a step, and add up what each of them replaced. Every rank calls it."""
    if mesh.data_degree == 1:
        return Slowest(1.0, mesh.leader, num_replaced)
    seconds = torch.zeros(mesh.data_degree + 1, dtype=torch.float64, device=mesh.device)
    seconds[mesh.data_rank], seconds[-1] = busy, num_replaced
    mesh.sum(seconds)
    *times, replaced = seconds.tolist()
    worst = max(range(len(times)), key=times.__getitem__)
    return Slowest(times[worst] * len(times) / sum(times), worst * mesh.sample_degree, int(replaced))


class Stragglers:
    """Warns of a rank that is the slowest, by a `share` and more, for so many `steps` in a row; once for each such row."""

    def __init__(self, share: float, steps: int) -> None:
        self.share, self.steps = share, steps
        self._rank, self._count = -1, 0

    def see(self, found: Slowest, mesh: Mesh) -> None:
        """Take in the slowest rank of the step. Every rank calls it, as all are asked for the names of their hosts."""
        if found.share < self.share:
            self._count = 0
            return
        self._count = self._count + 1 if found.rank == self._rank else 1
        self._rank = found.rank
        if self._count != self.steps:
            return
        hosts = hosts_of(mesh)
        if mesh.is_main:
            place = found.rank // mesh.sample_degree
            group = f" (and the {mesh.sample_degree - 1} behind it)" if mesh.sample_degree > 1 else ""
            LOG.warning(
                "rank %d%s on host %s was the slowest for %d steps, busy for %.2f times the mean of all ranks "
                "(faults.straggler_share %g): the others wait for it. Look at that node: its clocks, temperature, disks, and "
                "what else runs there",
                found.rank, group, hosts[place], self.steps, found.share, self.share,
            )  # fmt: skip


def hosts_of(mesh: Mesh) -> list[str]:
    """The host of each rank that reads different samples, in their order. Every rank calls it."""
    name = f"{socket.gethostname()}\n".encode()
    joined = mesh.gather(torch.tensor(list(name), dtype=torch.uint8, device=mesh.device))
    return bytes(joined.cpu().tolist()).decode().splitlines()
