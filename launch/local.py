"""Launch on this machine: one process a rank, joined through a file, watched until they end.

Ranks run in a session of their own, so that Ctrl-C at a terminal reaches only the verb, which asks them to save and stop. They
die with the process that launched them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from videofm.errors import CheckpointError, ConfigError, DataError, Interrupted, ParallelError, VideofmError
from videofm.run_dir import RunDirectory, read_json

_GRACE_SECONDS = 20.0
_ERRORS = {kind.__name__: kind for kind in (ConfigError, DataError, CheckpointError, ParallelError)}
"""What a rank calls its failure -> what the verb raises, so that a wrong request has its own exit code."""
_NOTICED = "CollectiveError"
"""What a rank calls its failure where another rank is the cause."""


@dataclass
class LocalHandle:
    """The ranks of one attempt."""

    run: RunDirectory
    attempt: Path
    processes: list[subprocess.Popen[bytes]]
    _codes: dict[int, int] = field(default_factory=dict)
    _ended: set[int] = field(default_factory=set)

    def wait(self) -> None:
        """Wait for all ranks.

        Raises:
            Interrupted: they saved and stopped on request.
            VideofmError: a rank failed (then of the class that the rank raised) or died; the others are ended.
        """
        try:
            while len(self._codes) < len(self.processes):
                self._collect()
                if any(code not in (0, 75) for code in self._codes.values()):
                    self._end_rest()
                time.sleep(0.05)
        finally:
            self._end_rest()
        self._raise_outcome()

    def _collect(self) -> None:
        for rank, process in enumerate(self.processes):
            code = process.poll()
            if code is not None:
                self._codes.setdefault(rank, code)

    def _end_rest(self) -> None:
        """End ranks that wait for one that is gone."""
        alive = [process for process in self.processes if process.poll() is None]
        if not alive:
            return
        deadline = time.monotonic() + (_GRACE_SECONDS if self.run.stop_requested else 2.0)
        while time.monotonic() < deadline and any(process.poll() is None for process in alive):
            time.sleep(0.05)
        for rank, process in enumerate(self.processes):
            if process.poll() is None:
                self._ended.add(rank)
                process.kill()
        for process in alive:
            process.wait()
        self._collect()

    def _raise_outcome(self) -> None:
        """Turn what the ranks wrote into one error. A rank that said why it failed comes before one that just died, and that
        before those who noticed."""
        outcomes = {rank: self._outcome(rank) for rank in range(len(self.processes))}
        said = {rank: outcome for rank, outcome in outcomes.items() if outcome is not None}
        failed = {rank: outcome for rank, outcome in said.items() if outcome["state"] == "failed"}
        noticed = [rank for rank, outcome in failed.items() if outcome["kind"] == _NOTICED]
        for rank in [rank for rank in failed if rank not in noticed]:
            raise self._failure(rank, failed[rank])
        silent = [rank for rank, outcome in outcomes.items() if outcome is None and rank not in self._ended]
        if silent:
            rank, code = silent[0], self._codes[silent[0]]
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            more = f"; rank {noticed[0]} says: {failed[noticed[0]]['message']}" if noticed else ""
            raise VideofmError(f"rank {rank} {how}; run the same command again to go on from the last checkpoint{more}")
        for rank in noticed:
            raise self._failure(rank, failed[rank])
        stopped = [outcome for outcome in said.values() if outcome["state"] == "interrupted"]
        if stopped:
            raise Interrupted(stopped[0]["message"])

    def _failure(self, rank: int, outcome: dict[str, str]) -> VideofmError:
        where = f" (rank {rank})" if len(self.processes) > 1 else ""
        traceback = self.attempt / f"rank_{rank}_traceback.txt"
        more = f"; traceback in {traceback}" if traceback.exists() else ""
        return _ERRORS.get(outcome["kind"], VideofmError)(f"{outcome['message']}{where}{more}")

    def _outcome(self, rank: int) -> dict[str, str] | None:
        path = self.attempt / f"rank_{rank}.json"
        return read_json(path) if path.exists() else None


def submit(run: RunDirectory, world_size: int) -> LocalHandle:
    """Start `world_size` ranks of the training run in `run`, for its newest attempt.

    Raises:
        ParallelError: CUDA is in use and the machine has fewer devices than ranks.
    """
    _check_devices(run, world_size)
    attempt = max((run.path / "attempts").iterdir())
    processes = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "VIDEOFM_RENDEZVOUS": str((attempt / "rendezvous").absolute()),
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        }
        command = [sys.executable, "-m", "videofm.train.worker", str(run.path), str(int(attempt.name))]
        processes.append(_start(command, environment, None if rank == 0 else attempt / f"rank_{rank}.out"))
    return LocalHandle(run, attempt, processes)


def _start(command: list[str], environment: dict[str, str], output: Path | None) -> subprocess.Popen[bytes]:
    if output is None:
        return subprocess.Popen(command, env=environment, start_new_session=True)
    with output.open("wb") as file:
        return subprocess.Popen(command, env=environment, start_new_session=True, stdout=file, stderr=file)


def _check_devices(run: RunDirectory, world_size: int) -> None:
    if run.config["trainer"]["device"] == "cpu" or not Path("/dev/nvidia0").exists():
        return
    devices = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if world_size > devices:
        raise ParallelError(
            f"{world_size} ranks need {world_size} GPUs and this machine has {devices}; "
            f"choose parallel.data_degree, context_degree and tensor_degree whose product is {devices}, or trainer.device=cpu"
        )
