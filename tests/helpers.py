"""Help for tests that need several processes.

A rank is a process of its own, forked from an origin: a process that has made the imports of a rank once, which takes seconds,
and computed nothing. So it starts within milliseconds as a fresh one would, with what the imports leave and nothing else. There
are two origins, for ranks of even and of odd number: like real ranks, neighbours have different seeds of hashes, so that a loop
over a set in which ranks meet fails here too.
"""

from __future__ import annotations

import os
import pickle
import queue
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import IO, Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from videofm.registry import ATTENTION_BACKENDS, ATTENTION_STRATEGIES, MODELS, OBJECTIVES

ROOT = Path(__file__).parents[1]
TARGETS = (*MODELS.values(), *OBJECTIVES.values(), *ATTENTION_BACKENDS.values(), *ATTENTION_STRATEGIES.values())
IMPORTED = (
    "torch", "deepspeed", "megatron.core", "videofm.train.worker", "pytest",
    *dict.fromkeys(target.partition(":")[0] for target in TARGETS),
)  # fmt: skip
"""What an origin imports, with all that belongs to it: the libraries, and what a training may look up in the registry."""

_CONTEXT = get_context("forkserver")
_ORIGINS = tuple(forkserver.ForkServer() for _ in range(2))
for _origin in _ORIGINS:
    _origin.set_forkserver_preload(list(IMPORTED))


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 1800.0) -> list[Any]:
    """Call `fn(rank, world_size, *args)` in `world_size` fresh processes that share a gloo group; return the results by rank.

    `fn` is a module-level function; results are plain values or CPU tensors. The default group exists when `fn` runs, and
    RANK, WORLD_SIZE, LOCAL_RANK are set. The ranks meet through a file, so that no port can clash.

    Raises:
        AssertionError: a rank raised (its traceback is in the message), died, or was not done after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="videofm-test-") as folder:
        answers = _CONTEXT.Queue()
        given = pickle.dumps(args)  # by value: each tensor in shared memory would take a file descriptor
        processes = [
            _start(rank, _environment(rank, world_size), None, _rank, fn, rank, world_size, folder, timeout, answers, given)
            for rank in range(world_size)
        ]
        try:
            return _collect(processes, answers, world_size, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def launch_ranks(
    script: str | Path, world_size: int, *arguments: str | Path, codes: Sequence[int] | None = None, timeout: float = 1800.0
) -> None:
    """Run `python script *arguments` as `world_size` ranks of one machine, with the environment that a launcher sets.

    For what needs whole processes: some ranks are to be killed, and each makes its own groups.

    Args:
        script: a file, most often the test's own `__file__`.
        world_size: number of ranks.
        arguments: of the script.
        codes: the exit code of each rank; all zero unless given. Negative is the signal that ends it.
        timeout: seconds for each rank.
    """
    own = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        ForkedPython([str(script), *map(str, arguments)], _environment(rank, world_size) | own) for rank in range(world_size)
    ]
    try:
        assert [process.wait(timeout=timeout) for process in ranks] == list(codes or [0] * world_size)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


class ForkedPython:
    """`python *arguments` as a rank forked from an origin, with the methods of `subprocess.Popen` that launchers use.

    Args:
        arguments: a script or `-m` and a module, and what it is given.
        environment: the whole of it; RANK is in it.
        output: where the process writes; where this one does, unless given.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], output: Path | None = None) -> None:
        self._process = _start(int(environment["RANK"]), dict(environment), output, _python, list(arguments))

    @classmethod
    def as_started(cls, command: Sequence[str], environment: Mapping[str, str], output: Path | None) -> ForkedPython:
        """What `launch.local` starts, forked; `command` begins with the interpreter."""
        assert command[0] == sys.executable
        return cls(command[1:], environment, output)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(["a forked rank"], timeout or 0.0)
        return code

    def kill(self) -> None:
        """End it, if it has not ended."""
        if self.poll() is None:
            self._process.kill()


def _environment(rank: int, world_size: int) -> dict[str, str]:
    """Of this process, now, and what a launcher adds."""
    sizes = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    return {**os.environ, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def _start(rank: int, environment: dict[str, str], output: Path | None, fn: Callable[..., None], *args: Any) -> Any:
    """Fork a process that calls `fn(*args)`. All origins are started before the first fork: they import at the same time, not
    one after the other while the time of the first rank runs."""
    for origin in _ORIGINS:
        origin.ensure_running()
    process = _CONTEXT.Process(target=_enter, args=(environment, output, fn, args), daemon=False)
    with mock.patch.object(forkserver, "connect_to_new_process", _ORIGINS[rank % len(_ORIGINS)].connect_to_new_process):
        process.start()
    return process


def _enter(environment: dict[str, str], output: Path | None, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)  # an origin has the environment of the time when it was started
    torch.seed(), np.random.seed()  # else they have the origin's; Python's own generator is seeded anew by a fork
    if output is not None:
        file: IO[bytes]
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    fn(*args)


def _python(arguments: list[str]) -> None:
    """Run a script or a module as the interpreter does."""
    sys.argv = arguments if arguments[0] != "-m" else arguments[1:]
    if arguments[0] == "-m":
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


def _collect(processes: list[Any], answers: Any, world_size: int, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    suspects: list[int] = []
    deadline = time.monotonic() + timeout
    while len(results) < world_size:
        try:
            rank, fine, value = answers.get(timeout=0.2)
        except queue.Empty:
            missing = sorted(set(range(world_size)) - set(results))
            dead = [rank for rank in missing if processes[rank].exitcode is not None]
            if dead and not suspects:
                suspects = dead  # what a rank said before it ended may still be on its way: ask once more
                continue
            codes = [processes[rank].exitcode for rank in dead]
            assert not dead, f"ranks {dead} died with exit codes {codes} and left no result"
            assert time.monotonic() < deadline, f"ranks {missing} were not done after {timeout} s"
            continue
        suspects = []
        assert fine, f"rank {rank} of {world_size} raised:\n{value}"
        results[rank] = pickle.loads(value)  # bytes that our own child process wrote a moment ago
    return [results[rank] for rank in range(world_size)]


def _rank(fn: Callable[..., Any], rank: int, world_size: int, folder: str, timeout: float, answers: Any, given: bytes) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
        dist.barrier()  # a rank that has nothing to say may leave at once, while others still connect to it
        # Pickled here, by value: a tensor in shared memory would vanish with this process.
        answers.put((rank, True, pickle.dumps(fn(rank, world_size, *pickle.loads(given)))))
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))
    finally:
        # Wait until the answer has left before the group, which peers may still use, goes down.
        answers.close()
        answers.join_thread()
        if dist.is_initialized():
            dist.destroy_process_group()
