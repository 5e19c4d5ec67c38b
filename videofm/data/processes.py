"""The trainer's ends of the processes in `videofm.data.nursery`."""

from __future__ import annotations

import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from videofm.data.nursery import NUM_SLOTS
from videofm.data.reader import ClipRequest, ReaderSettings
from videofm.errors import DataError

START_TIMEOUT = 600.0
"""Seconds until a process is ready; imports are slow on a machine that is busy."""

COMMAND = (sys.executable, "-m", "videofm.data.nursery")
_ROOT = Path(__file__).resolve().parents[2]

Job = TypeVar("Job")


class Nursery:
    """The process that forks decoding processes."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(START_TIMEOUT)
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # One thread: the processes share the cores, and a fork takes no other thread along.
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with theirs:
            self._process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,
            )

    def start(self, settings: ReaderSettings, descriptors: list[int]) -> int:
        """Fork a decoding process that has the given socket and files; its number."""
        return int(self._ask({"start": asdict(settings)}, descriptors)["pid"])

    def end(self, pid: int) -> str:
        """Kill a decoding process; how it ended, which may be before."""
        return str(self._ask({"end": pid}, [])["how"])

    def kill(self) -> None:
        """End the nursery, and with it all of its children."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Free what the trainer holds of it."""
        self.kill()
        self._socket.close()

    def _ask(self, question: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        answer = b""
        try:
            socket.send_fds(self._socket, [json.dumps(question).encode()], descriptors)
            answer = self._socket.recv(1 << 12)
        except OSError:
            pass
        if not answer:
            raise DataError(
                "the parent of the decoding processes ended or does not answer; see whether the machine ran out of memory, or "
                "try data.num_workers: 0"
            )
        value: dict[str, Any] = json.loads(answer)
        return value


class Worker(Generic[Job]):
    """A decoding process.

    Attributes:
        jobs: what it was given and has not answered, the one that it works on first.
        deadline: when it must have said something, on `time.monotonic`; None: whenever.
        is_ready: whether its decoder has passed the self-test.
        is_decoding: whether the bytes of the first job are there.
        num_given: jobs that it got so far.
    """

    def __init__(self, nursery: Nursery, settings: ReaderSettings) -> None:
        self.jobs: deque[Job] = deque()
        self._limits: deque[float | None] = deque()
        self.num_given, self.is_ready, self.is_decoding = 0, False, False
        self.deadline: float | None = time.monotonic() + START_TIMEOUT
        self._nursery, self._pending = nursery, b""
        self._files = [_anonymous_file() for _ in range(NUM_SLOTS)]
        self._maps: dict[int, mmap.mmap] = {}
        self.socket, theirs = socket.socketpair()
        with theirs:
            self.pid = nursery.start(settings, [theirs.fileno(), *self._files])

    def give(self, job: Job, request: ClipRequest, read_limit: float | None) -> None:
        """Ask for a clip; at most `NUM_SLOTS` at a time. `read_limit` is how long it may take to fetch it, in seconds."""
        slot, num_bytes = self.num_given % NUM_SLOTS, int(np.prod(request.shape))
        if slot not in self._maps or len(self._maps[slot]) < num_bytes:
            os.ftruncate(self._files[slot], num_bytes)
            self._maps[slot] = mmap.mmap(self._files[slot], num_bytes)
        self.num_given += 1
        self.jobs.append(job)
        self._limits.append(read_limit)
        if len(self.jobs) == 1:
            self._begin()
        with suppress(OSError):  # it died; that shows when it is listened to
            self.socket.sendall(json.dumps({"slot": slot, "request": request.to_json()}).encode() + b"\n")

    def next(self) -> Job:
        """The job that was answered; the one after it has begun."""
        job = self.jobs.popleft()
        self._limits.popleft()
        self._begin()
        return job

    def frames(self, shape: tuple[int, ...]) -> np.ndarray:
        """The frames of the job that `next` gives next; until another job is given."""
        slot = (self.num_given - len(self.jobs)) % NUM_SLOTS
        return np.ndarray(shape, np.uint8, self._maps[slot])

    def receive(self) -> list[dict[str, Any]] | None:
        """What it says, once there is something to hear; None when it has ended."""
        try:
            content = self.socket.recv(1 << 16)
        except OSError:
            content = b""
        if not content:
            return None
        *lines, self._pending = (self._pending + content).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> str:
        """End the process; how it ended, which may be before."""
        how = "unknown"
        with suppress(DataError):
            how = self._nursery.end(self.pid)
        self.socket.close()
        for descriptor in self._files:
            os.close(descriptor)
        return how

    def _begin(self) -> None:
        self.is_decoding = False
        limit = self._limits[0] if self._limits else None
        self.deadline = None if limit is None else time.monotonic() + limit


def _anonymous_file() -> int:
    """A file in memory that ends with its last holder, unlike a name in /dev/shm, which containers also keep small."""
    make: Callable[[str], int] | None = getattr(os, "memfd_create", None)
    if make is not None:
        return make("videofm-frames")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
