"""What the busy time of a rank counts, on the CPU by the clock and on CUDA by events."""

import logging
import time

import pytest
import torch

from videofm.progress import LOG
from videofm.train import busy
from videofm.train.busy import BusyTime, Slowest, Stragglers, slowest_rank


class FakeEvent:
    """A CUDA event that is recorded at a clock of milliseconds."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.clock

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at


class FakeMesh:
    """Rank 1 of three whose busy times are 1, `busy` and `last` seconds; the others replaced 5 samples."""

    data_degree, data_rank, device, sample_degree, leader, is_main = 3, 1, torch.device("cpu"), 1, 0, True

    def __init__(self, last: float = 4.0) -> None:
        self.last = last
        self.gathered = 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        assert value[0] == value[2] == 0
        return value.add_(torch.tensor([1.0, 0.0, self.last, 5.0]))

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        self.gathered += 1
        return torch.cat(
            [torch.tensor(list(b"first\n"), dtype=torch.uint8), value, torch.tensor(list(b"third\n"), dtype=torch.uint8)]
        )


def test_pieces_add_up_and_what_lies_between_does_not_count(monkeypatch):
    times = iter([0.0, 1.5, 10.0, 12.0, 20.0, 20.25])
    monkeypatch.setattr(busy.time, "perf_counter", lambda: next(times))
    watch = BusyTime(torch.device("cpu"))
    for _ in range(2):
        with watch.piece():
            pass
    assert watch.take() == 3.5 and watch.take() == 0
    with watch.piece():
        pass
    assert watch.take() == 0.25


def test_on_cuda_events_are_read_once_they_are_asked_for(monkeypatch):
    """Pieces of 250 and 500 ms with 1 s between them."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    watch = BusyTime(torch.device("cuda"))
    for milliseconds in (250, 500):
        with watch.piece():
            FakeEvent.clock += milliseconds
        FakeEvent.clock += 1000
    assert watch.take() == pytest.approx(0.75) and watch.take() == 0


def test_the_largest_over_the_mean():
    """Of 1, 1 and 4 seconds 4 / 2, of the third; a rank alone waits for nobody, whatever it measures."""
    assert slowest_rank(FakeMesh(), 1.0, 2) == Slowest(2.0, 2, 7)
    alone = FakeMesh()
    alone.data_degree = 1
    assert slowest_rank(alone, time.perf_counter(), 3) == Slowest(1.0, 0, 3)


def test_ranks_that_share_samples_go_by_the_first_of_them():
    """Groups of four: the third begins with rank 8."""
    mesh = FakeMesh()
    mesh.sample_degree = 4
    assert slowest_rank(mesh, 1.0).rank == 8


def warnings_of(shares, steps=3, rank=2, mesh=None):
    """What is logged; by a handler of our own, since a log that was set up does not reach pytest's."""
    mesh, stragglers, told, handler = mesh or FakeMesh(), Stragglers(1.5, steps), [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    LOG.addHandler(handler)
    try:
        for index, share in enumerate(shares):
            stragglers.see(Slowest(share, rank if isinstance(rank, int) else rank[index], 0), mesh)
    finally:
        LOG.removeHandler(handler)
    return told


def test_a_rank_that_stays_slow_is_told_once_with_its_host(monkeypatch):
    monkeypatch.setattr(LOG, "propagate", True)
    mesh = FakeMesh()
    (told,) = warnings_of([1.6, 2.0, 1.75, 1.6, 1.6, 1.6], mesh=mesh)
    assert "rank 2 on host third was the slowest for 3 steps, busy for 1.75 times the mean" in told and mesh.gathered == 1


@pytest.mark.parametrize(
    ("shares", "rank"),
    [
        ([1.0] * 50, 2),  # all alike
        ([1.6, 1.6, 1.4] * 20, 2),  # now and then
        ([1.6] * 60, [index // 2 % 3 for index in range(60)]),  # now one, now another, as with mixed sizes
    ],
)
def test_no_false_alarm(monkeypatch, shares, rank):
    monkeypatch.setattr(LOG, "propagate", True)
    mesh = FakeMesh()
    assert warnings_of(shares, rank=rank, mesh=mesh) == [] and mesh.gathered == 0


def test_a_rank_that_is_slow_again_is_told_again(monkeypatch):
    monkeypatch.setattr(LOG, "propagate", True)
    assert len(warnings_of([1.6] * 4 + [1.0] + [1.6] * 3)) == 2
