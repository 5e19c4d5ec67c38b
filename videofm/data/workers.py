"""Decoding processes that can be killed: a clip whose decoder hangs or crashes costs its own time limit and nothing else.

A thread gives clips to the processes in the order in which they were asked for, two at a time so that none waits for the
trainer, takes the frames over and replaces processes: one that hangs, one that died, one that has decoded enough. What is asked
for is bounded by the caller.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from videofm.config.reading import ReadingConfig
from videofm.data import storage
from videofm.data.nursery import KINDS, NUM_SLOTS
from videofm.data.processes import Nursery, Worker
from videofm.data.reader import BadClipError, ClipReader, ClipRequest, ReaderSettings
from videofm.errors import DataError, TransientError
from videofm.progress import LOG

MAX_FAILURES = 2
"""Times that a clip may take its decoding process down."""

_MAX_BAD_STARTS = 3


@dataclass(eq=False)
class Job:
    """A clip that was asked for, and the array that its frames go to."""

    request: ClipRequest
    out: np.ndarray
    error: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def finish(self, error: Exception | None = None) -> None:
        """The frames are in `out`, or will never be."""
        self.error = error
        self.done.set()


class Decoding(Protocol):
    """Something that decodes what it is asked for, maybe ahead of time."""

    counts: Counter[str]

    def ask(self, request: ClipRequest, out: np.ndarray, first: bool = False) -> Job:
        """Begin to decode into `out`; `first` goes before all that waits."""
        ...

    def wait(self, job: Job) -> None:
        """Until the frames of a job are in its array.

        Raises:
            BadClipError: the clip is damaged, does not decode, or takes its decoder down.
            DataError: it could not be read; see `storage`.
        """
        ...

    def close(self) -> None:
        """Give up what was not waited for."""
        ...


class InProcess:
    """Decodes in this process, when a job is waited for. A decoder that hangs or crashes hangs or crashes this process."""

    def __init__(self, reader: ClipReader) -> None:
        self.reader, self.counts = reader, Counter[str]()

    def ask(self, request: ClipRequest, out: np.ndarray, first: bool = False) -> Job:
        return Job(request, out)

    def wait(self, job: Job) -> None:
        np.copyto(job.out, self.reader.read(job.request))
        self.counts.update(self.reader.counts)
        self.reader.counts.clear()

    def close(self) -> None:
        pass


class WorkerPool:
    """Decodes in processes of its own; see `Decoding`.

    Attributes:
        counts: clips that took their process down by `hang` or `crash`, processes that were `recycled`, and what
            `ShardCache.counts` has.
    """

    def __init__(self, num_workers: int, settings: ReaderSettings, reading: ReadingConfig) -> None:
        self.settings, self.reading, self.counts = settings, reading, Counter[str]()
        self._nursery = Nursery()
        self._workers: list[Worker[Job]] = []
        self._num_workers, self._num_bad_starts = num_workers, 0
        self._lock, self._waiting = threading.Lock(), deque[Job]()
        self._failure: Exception | None = None
        self._failures: Counter[tuple[str, str]] = Counter()  # of a clip, as `_clip` names it
        self._blamed: dict[tuple[str, str], Exception] = {}
        self._closing = False
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    def ask(self, request: ClipRequest, out: np.ndarray, first: bool = False) -> Job:
        job = Job(request, out)
        with self._lock:
            if self._failure is not None:
                job.finish(self._failure)
                return job
            (self._waiting.appendleft if first else self._waiting.append)(job)
        self._wake_up()
        return job

    def wait(self, job: Job) -> None:
        job.done.wait()
        if job.error is not None:
            raise job.error

    def close(self) -> None:
        """End all processes, also those that hang. What was not waited for never comes."""
        if self._closing:
            return
        self._closing = True
        self._nursery.kill()  # the thread may be waiting for it
        self._wake_up()
        self._thread.join()
        self._wake.close()
        self._woken.close()

    def _wake_up(self) -> None:
        with suppress(BlockingIOError):  # what it has not read yet will wake it
            self._wake.send(b"x")

    def _run(self) -> None:
        try:
            while not self._closing:
                self._recycle()
                self._start()
                self._give()
                for key, _ in self._selector.select(self._seconds_left()):
                    if key.data is None:
                        self._woken.recv(1 << 12)
                    elif key.data in self._workers:  # the loss of another one may have ended it a moment ago
                        self._hear(key.data)
                self._end_overdue()
        except Exception as error:
            self._give_up(error)
        finally:
            self._give_up(DataError("the loader was closed"))
            self._nursery.close()
            for worker in self._workers:
                worker.close()
            self._selector.close()

    def _give_up(self, error: Exception) -> None:
        with self._lock:
            self._failure = self._failure or error
            lost = [*(job for worker in self._workers for job in worker.jobs), *self._waiting]
            self._waiting.clear()
        for job in lost:
            job.finish(self._failure)

    def _recycle(self) -> None:
        for worker in [worker for worker in self._workers if self._is_used_up(worker) and not worker.jobs]:
            self.counts["recycled"] += 1
            self._remove(worker)

    def _is_used_up(self, worker: Worker[Job]) -> bool:
        return worker.num_given >= self.reading.clips_per_worker

    def _start(self) -> None:
        while len(self._workers) < self._num_workers:
            worker = Worker[Job](self._nursery, self.settings)
            self._workers.append(worker)
            self._selector.register(worker.socket, selectors.EVENT_READ, worker)

    def _give(self) -> None:
        """Give out what waits: to those first that have nothing to do."""
        self._drop_blamed()
        for depth in range(NUM_SLOTS):
            for worker in self._workers:
                if len(worker.jobs) != depth or not worker.is_ready or self._is_used_up(worker):
                    continue
                with self._lock:
                    if not self._waiting:
                        return
                    job = self._waiting.popleft()
                worker.give(job, job.request, self._read_limit(job.request))

    def _drop_blamed(self) -> None:
        """Finish what waits for clips that took processes down before."""
        if not self._blamed:
            return
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
            for job in waiting:
                if (error := self._blamed.get(_clip(job))) is not None:
                    job.finish(error)
                else:
                    self._waiting.append(job)

    def _read_limit(self, request: ClipRequest) -> float | None:
        """Seconds for fetching a clip: requests to a store are limited one by one, but a file system may hang for ever."""
        return self.reading.read_timeout * (storage.NUM_RETRIES + 1) if storage.is_local(request.place) else None

    def _seconds_left(self) -> float | None:
        deadlines = [worker.deadline for worker in self._workers if worker.deadline is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _hear(self, worker: Worker[Job]) -> None:
        """Act on what a process says, or on its end."""
        messages = worker.receive()
        if messages is None:
            self._lost(worker, "crash", None)
            return
        for message in messages:
            said = message["say"]
            if said == "unfit":
                raise _error(message)
            if said == "ready":
                worker.is_ready, worker.deadline, self._num_bad_starts = True, None, 0
            elif said == "fetched":
                worker.is_decoding, worker.deadline = True, time.monotonic() + self.reading.decode_timeout
            elif said == "done":
                job = worker.jobs[0]
                np.copyto(job.out, worker.frames(job.out.shape))
                self.counts.update(message["counts"])
                worker.next().finish()
            else:
                worker.next().finish(_error(message))

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.deadline is not None and worker.deadline <= now]:
            if worker in self._workers:  # the loss of another one may have ended it
                self._lost(worker, "hang", "no answer in time")

    def _lost(self, worker: Worker[Job], kind: str, how: str | None) -> None:
        """A process hangs or has died: what it worked on is tried once more, what it had not begun is not to blame."""
        jobs, is_decoding = list(worker.jobs), worker.is_decoding
        ended = self._remove(worker)
        if self._closing:
            return
        how = how or ended
        self.counts[kind] += 1
        if not worker.is_ready:
            self._num_bad_starts += 1
            if self._num_bad_starts >= _MAX_BAD_STARTS:
                raise DataError(
                    f"decoding processes do not start ({self._num_bad_starts} times: {how}); try data.num_workers: 0"
                )
        if jobs:
            LOG.warning("%s took its decoding process down: %s", jobs[0].request.describe(), how)
            name = _clip(jobs[0])
            self._failures[name] += 1
            if self._failures[name] >= MAX_FAILURES:
                error = self._verdict(jobs[0].request, kind, how, is_decoding)
                jobs.pop(0).finish(error)
                if isinstance(error, BadClipError):
                    self._blamed[name] = error
                    jobs += self._take_back(name)
        with self._lock:
            self._waiting.extendleft(reversed(jobs))

    def _take_back(self, name: tuple[str, str]) -> list[Job]:
        """What was given to processes that have another draw of a clip that is to blame: they would hang or crash in turn."""
        jobs: list[Job] = []
        for worker in [worker for worker in self._workers if name in map(_clip, worker.jobs)]:
            jobs += worker.jobs
            self._remove(worker)
        return jobs

    def _verdict(self, request: ClipRequest, kind: str, how: str, is_decoding: bool) -> Exception:
        if not is_decoding:
            return TransientError(
                f"{request.describe()}: its bytes could not be fetched ({how}, {MAX_FAILURES} times); see that its file system "
                "answers, then run again"
            )
        if kind == "hang":
            how = f"no end within data.reading.decode_timeout, {self.reading.decode_timeout:g} s"
        return BadClipError(f"{request.describe()}: its decoder took the process down {MAX_FAILURES} times ({how})")

    def _remove(self, worker: Worker[Job]) -> str:
        """End a process; how it ended."""
        self._selector.unregister(worker.socket)
        self._workers.remove(worker)
        return worker.close()


def _clip(job: Job) -> tuple[str, str]:
    """The clip that a job reads: the place of its shard, and its key."""
    return job.request.place, job.request.key


def _error(message: dict[str, Any]) -> Exception:
    """The error that a process met; one that is none of ours is a mistake in the code."""
    return KINDS.get(message["kind"], RuntimeError)(message["message"])
