"""What the busy time of a rank counts, on the CPU by the clock and on CUDA by events."""

import time

import pytest
import torch

from videofm.train import busy
from videofm.train.busy import BusyTime, slowest_rank


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
    """Rank 1 of three whose busy times are 1, `busy` and 4 seconds; the others replaced 5 samples."""

    data_degree, data_rank, device = 3, 1, torch.device("cpu")

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        assert value[0] == value[2] == 0
        return value.add_(torch.tensor([1.0, 0.0, 4.0, 5.0]))


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
    """Of 1, 1 and 4 seconds 4 / 2; a rank alone waits for nobody, whatever it measures."""
    assert slowest_rank(FakeMesh(), 1.0, 2) == (2.0, 7)
    alone = FakeMesh()
    alone.data_degree = 1
    assert slowest_rank(alone, time.perf_counter(), 3) == (1.0, 3)
