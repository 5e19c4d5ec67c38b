"""What `videofm doctor` looks at where ranks meet: this process's place, ports, and two processes that sum (`python -m
videofm.doctor_ranks BACKEND` is one of the two)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path

from videofm.doctor_machine import Absent
from videofm.errors import ParallelError, VideofmError

_PATIENCE = 120.0
_MET = "two processes meet over TCP"


def place() -> str:
    """What the environment says of this process; a training started here would take it at its word."""
    found = import_module("videofm.parallel.rendezvous").find_place()
    if found.world_size == 1:
        return "one process: `videofm train` starts its own ranks"
    return f"rank {found.rank} of {found.world_size}, number {found.local_rank} on this node; meets through {found.store}"


def port() -> str:
    """A port of those at which Slurm jobs meet can be listened at, and reached under this machine's name."""
    number, name = free_port(), socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise VideofmError(f"this machine's name, {name}, has no address: {error}") from error
    with socket.create_server(("", number)):
        try:
            socket.create_connection((name, number), timeout=5).close()
        except OSError as error:
            raise VideofmError(f"nothing can be reached at {name}:{number} ({address}): {error}") from error
    local = address.startswith("127.")
    more = "; the name is known to this machine only: over several nodes set MASTER_ADDR" if local else ""
    return f"{number} is free and reached as {name} ({address}){more}"


def free_port() -> int:
    """One that nobody listens at, of those that `parallel.rendezvous` gives to Slurm jobs.

    Raises:
        ParallelError: there is none among the first hundred that are tried.
    """
    rendezvous = import_module("videofm.parallel.rendezvous")
    for attempt in range(100):
        number = rendezvous.slurm_port(os.getpid() + 625 * attempt, attempt)
        try:
            socket.create_server(("", number)).close()
        except OSError:
            continue
        return int(number)
    raise ParallelError(
        f"of the ports from {rendezvous.FIRST_PORT} on, at which Slurm jobs meet, a hundred were tried and none is free; set "
        "MASTER_PORT"
    )


def two_processes() -> str:
    """Two processes on this machine meet over TCP and sum by gloo."""
    return _meet("gloo")


def two_gpus() -> str:
    """Two processes, each with a GPU of its own, sum by NCCL."""
    torch = import_module("torch")
    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        raise Absent("fewer than two CUDA devices")
    return _meet("nccl")


def _meet(backend: str) -> str:
    own = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if sys.platform == "linux":
        own["GLOO_SOCKET_IFNAME"] = "lo"
    foreign = ("VIDEOFM_RENDEZVOUS", "TORCHELASTIC_")
    held = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    with tempfile.TemporaryDirectory(prefix="videofm-doctor-") as folder:
        files = [Path(folder) / f"rank_{rank}" for rank in range(2)]
        ranks = [_start(backend, {**held, **own, "RANK": str(n), "LOCAL_RANK": str(n)}, file) for n, file in enumerate(files)]
        try:
            _wait(ranks, files)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        return _last_line(files[0], _MET)


def _start(backend: str, environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
    with output.open("wb") as file:
        command = [sys.executable, "-m", "videofm.doctor_ranks", backend]
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], files: Sequence[Path]) -> None:
    """Until both have ended, or one has failed, for which the other might wait long."""
    deadline = time.monotonic() + _PATIENCE
    while any(process.poll() is None for process in ranks):
        _raise_failed(ranks, files)
        if time.monotonic() > deadline:
            raise VideofmError(f"two processes did not meet within {_PATIENCE:.0f} s")
        time.sleep(0.05)
    _raise_failed(ranks, files)


def _raise_failed(ranks: Sequence[subprocess.Popen[bytes]], files: Sequence[Path]) -> None:
    for rank, (process, file) in enumerate(zip(ranks, files, strict=True)):
        if process.poll() not in (None, 0):
            raise VideofmError(f"rank {rank} of two ended with code {process.returncode}: {_last_line(file, 'Error: ')}")


def _last_line(file: Path, part: str) -> str:
    """The last line with `part` in it: libraries write theirs at any time."""
    lines = file.read_text(errors="replace").strip().splitlines()
    return next((line for line in reversed(lines) if part in line), lines[-1] if lines else "it said nothing")


def rank(backend: str) -> str:
    """One of the two: meet, sum, and say how fast."""
    torch, dist = import_module("torch"), import_module("torch.distributed")
    rendezvous, health = import_module("videofm.parallel.rendezvous"), import_module("videofm.parallel.health")
    own = rendezvous.find_place()
    device = torch.device("cuda", own.local_rank) if backend == "nccl" else torch.device("cpu")
    patience = timedelta(seconds=_PATIENCE / 2)
    store = rendezvous.meet(own, _PATIENCE / 2)
    dist.init_process_group(backend, store=store, rank=own.rank, world_size=own.world_size, timeout=patience)
    try:
        wrong = health.wrong_summands(own.rank, own.world_size, device)
        if wrong:
            raise VideofmError(f"a sum over two processes lacks the part of rank {wrong[0]}")
        bandwidth = health.measure_bandwidth(own.world_size, device)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return f"{_MET} and sum by {backend} at {bandwidth / 1e9:.2f} GB/s"


if __name__ == "__main__":
    print(rank(sys.argv[1]))
