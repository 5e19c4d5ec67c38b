"""Processes that are lost together with the one whose loss ended them."""

from __future__ import annotations

import socket
from collections import deque
from typing import Any

import numpy as np
import pytest

from videofm.config.reading import ReadingConfig
from videofm.data import workers
from videofm.data.reader import BadClipError, ClipRequest, ReaderSettings


class NoNursery:
    """Starts nothing."""

    def kill(self) -> None:
        pass

    def close(self) -> None:
        pass


class FakeWorker:
    """Takes one job; when each of two has one, both are lost at the same time."""

    all: list[FakeWorker]
    how: str

    def __class_getitem__(cls, item: Any) -> type[FakeWorker]:
        return cls

    def __init__(self, *_: Any) -> None:
        self.jobs, self.num_given, self.is_ready, self.is_decoding = deque[Any](), 0, True, True
        self.deadline: float | None = None
        self.socket, self._theirs = socket.socketpair()
        self.all.append(self)

    def give(self, job: Any, *_: Any) -> None:
        self.jobs.append(job)
        self.num_given += 1
        if len(self.all) == 2 and all(worker.jobs for worker in self.all):
            for worker in self.all:
                worker.end()

    def end(self) -> None:
        if self.how == "hang":
            self.deadline = 0.0
        else:
            self._theirs.close()

    def receive(self) -> None:
        assert self.socket.recv(1) == b""

    def close(self) -> str:
        self.socket.close()
        self._theirs.close()
        return "killed"


@pytest.mark.parametrize("how", ["hang", "crash"])
def test_two_processes_that_are_lost_over_one_clip_at_once(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The clip has taken a process down before. The loss of the first takes its other draw back from the second, which was
    lost in the same moment; both draws end with the clip's fault."""
    monkeypatch.setattr(FakeWorker, "all", [], raising=False)
    monkeypatch.setattr(FakeWorker, "how", how, raising=False)
    monkeypatch.setattr(workers, "Nursery", NoNursery)
    monkeypatch.setattr(workers, "Worker", FakeWorker)
    request = ClipRequest("k", "p", 0, 1, "s", "s", 1, True, (8, 8), 1, (0, 1, 1), (8, 8), (0, 0, 8, 8))
    pool = workers.WorkerPool(2, ReaderSettings(), ReadingConfig())
    try:
        pool._failures["p", "k"] = workers.MAX_FAILURES - 1
        jobs = [pool.ask(request, np.empty(request.shape, np.uint8)) for _ in range(2)]
        for job in jobs:
            assert job.done.wait(30)
            assert isinstance(job.error, BadClipError), job.error
        assert pool.counts[how] == 1
    finally:
        pool.close()
