"""Processes that meet: through our file, under torchrun, as tasks of Slurm, and again in the store of a killed attempt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers import ROOT, ForkedPython
from videofm.parallel.rendezvous import find_place, meet, slurm_port

PATIENCE = 600.0
REPETITIONS = 8


def rank(folder: Path, attempt: int, then: str) -> None:
    """Meet, sum, and write what was found; then `leave`, `wait` to be killed, or `die` as rank 1 of a first start."""
    place = find_place(attempt=attempt)
    store = meet(place, PATIENCE)
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size, timeout=patience)
    value = torch.tensor([10.0**place.rank])
    dist.all_reduce(value)
    # A name that another process sees is there with its content.
    written = folder / f".{attempt}-{place.attempt}-{place.rank}"
    written.write_text(json.dumps({**asdict(place), "file": str(place.file), "sum": value.item(), "pid": os.getpid()}))
    written.rename(folder / f"met-{attempt}-{place.attempt}-{place.rank}")
    if then == "wait":
        signal.pause()
    if then == "die" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if place.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    dist.barrier()
    dist.destroy_process_group()


def clean(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` and nothing of our own that could tell a process its rank."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_", "VIDEOFM_RENDEZVOUS")
    held = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return {**held, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}


def fresh(environment: Mapping[str, str], *arguments: object) -> subprocess.Popen[bytes]:
    """This file as a program in a process of its own, which needs no RANK."""
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)], env=clean(environment), cwd=ROOT)


def forked(environment: Mapping[str, str], *arguments: object) -> ForkedPython:
    """The same without the seconds that imports take; RANK is in `environment`."""
    return ForkedPython([__file__, *map(str, arguments)], clean(environment))


def met(folder: Path, pattern: str, codes: Callable[[], list[int | None]]) -> list[dict[str, Any]]:
    """What both ranks wrote, once they have."""
    deadline = time.monotonic() + PATIENCE
    while len(found := sorted(folder.glob(pattern))) < 2:
        assert set(codes()) <= {None, 0}, codes()
        assert time.monotonic() < deadline, f"only {found} after {PATIENCE} s"
        time.sleep(0.01)
    return [json.loads(path.read_text()) for path in found]


def test_through_our_file_and_as_tasks_of_slurm(tmp_path: Path) -> None:
    """Each rank is told its number by its own kind of environment; 1 + 10 is the sum of both. All four run at once."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "VIDEOFM_RENDEZVOUS": str(tmp_path / "file")}
    job = os.getpid()  # two suites at once have ports of their own
    slurm = {
        "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost",
    }  # fmt: skip
    tasks = [fresh({**slurm, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}, tmp_path, 2, "leave") for n in range(2)]
    ranks = [forked({**shared, "RANK": str(n), "LOCAL_RANK": str(n)}, tmp_path, 1, "leave") for n in range(2)]
    try:
        told = met(tmp_path, "met-1-*", lambda: [process.poll() for process in ranks])
        assert [(place["rank"], place["sum"], place["store"]) for place in told] == [(0, 11.0, "file"), (1, 11.0, "file")]
        told = met(tmp_path, "met-2-*", lambda: [process.poll() for process in tasks])
        assert [(place["rank"], place["sum"], place["local_rank"]) for place in told] == [(0, 11.0, 0), (1, 11.0, 1)]
        assert {(place["address"], place["port"]) for place in told} == {("localhost", slurm_port(job, 2))}
        assert [process.wait(PATIENCE) for process in (*ranks, *tasks)] == [0] * 4
    finally:
        for process in (*ranks, *tasks):
            process.kill()
            process.wait()


def test_under_torchrun_also_after_a_rank_was_killed(tmp_path: Path) -> None:
    """Rank 1 kills itself after the first meeting; torchrun starts both again in the store that its agent hosts."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--standalone",
        __file__, str(tmp_path), "7", "die",
    ]  # fmt: skip
    done = subprocess.run(command, env=clean({}), cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("met-7-*"))]
    assert [(place["attempt"], place["rank"], place["sum"], place["store"]) for place in told] == [
        ("7.0", 0, 11.0, "agent"), ("7.0", 1, 11.0, "agent"), ("7.1", 0, 11.0, "agent"), ("7.1", 1, 11.0, "agent"),
    ]  # fmt: skip
    assert len({place["pid"] for place in told}) == 4


def test_attempts_meet_in_the_store_of_killed_ones(tmp_path: Path) -> None:
    """Eight times in one store: both ranks are killed as soon as they have met, and the next two come at once."""
    host = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(host.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    for attempt in range(1 + REPETITIONS):
        told_all = {**shared, "TORCHELASTIC_RESTART_COUNT": str(attempt)}
        ranks = [forked({**told_all, "RANK": str(n), "LOCAL_RANK": str(n)}, tmp_path, 1, "wait") for n in range(2)]
        try:
            told = met(tmp_path, f"met-1-1.{attempt}-*", lambda now=ranks: [process.poll() for process in now])
            assert [place["sum"] for place in told] == [11.0, 11.0]
        finally:
            for process in ranks:
                process.kill()
        assert [process.wait(PATIENCE) for process in ranks] == [-signal.SIGKILL] * 2


if __name__ == "__main__":
    rank(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
