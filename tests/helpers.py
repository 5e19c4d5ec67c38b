"""Help for tests that need several processes."""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[1]


def run_distributed(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `fn(rank, world_size, *args)` in `world_size` fresh processes that share a gloo group; return the results by rank.

    `fn` is a module-level function; results are plain values or CPU tensors. The default group exists when `fn` runs, and
    RANK, WORLD_SIZE, LOCAL_RANK are set. The ranks meet through a file, so that no port can clash.

    Raises:
        AssertionError: a rank raised (its traceback is in the message), died, or was not done after `timeout` seconds.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="videofm-test-") as folder:
        answers = context.Queue()
        processes = [
            context.Process(target=_rank, args=(fn, rank, world_size, folder, timeout, answers, args), daemon=False)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            return _collect(processes, answers, world_size, timeout)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def launch_ranks(
    script: str | Path, world_size: int, *arguments: str | Path, codes: Sequence[int] | None = None, timeout: float = 150.0
) -> None:
    """Run `python script *arguments` as `world_size` ranks of one machine, with the environment that a launcher sets.

    For what needs whole processes: DeepSpeed keeps state in its modules, and some ranks are to be killed.

    Args:
        script: a file, most often the test's own `__file__`.
        world_size: number of ranks.
        arguments: of the script.
        codes: the exit code of each rank; all zero unless given. Negative is the signal that ends it.
        timeout: seconds for each rank.
    """
    shared = {
        "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]
    try:
        assert [process.wait(timeout=timeout) for process in ranks] == list(codes or [0] * world_size)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


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


def _rank(
    fn: Callable[..., Any], rank: int, world_size: int, folder: str, timeout: float, answers: Any, args: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
        # Pickled here, by value: a tensor in shared memory would vanish with this process.
        answers.put((rank, True, pickle.dumps(fn(rank, world_size, *args))))
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))
    finally:
        # Wait until the answer has left before the group, which peers may still use, goes down.
        answers.close()
        answers.join_thread()
        if dist.is_initialized():
            dist.destroy_process_group()
