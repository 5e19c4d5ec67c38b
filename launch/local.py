"""Ranks on this machine: one process each, joined through a file, watched until they end.

Ranks run in a session of their own, so that Ctrl-C at a terminal reaches only the verb, which asks them to save and stop. They
die with the process that launched them.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from launch.ranks import Attempt, Outcome, grace, outcome_of, said
from videofm.errors import ParallelError

_POLL_SECONDS = 0.05


class LocalRanks:
    """The ranks of one attempt; see `launch.ranks.Ranks`."""

    def __init__(self, attempt: Attempt, processes: list[subprocess.Popen[bytes]]) -> None:
        self._attempt, self._processes = attempt, processes
        self._codes: dict[int, int] = {}
        self._states: dict[int, str] = {}
        self._ended: set[int] = set()

    def wait(self) -> Outcome:
        """Wait for all of them; once one ended that was not done, the others have a moment left."""
        try:
            while len(self._codes) < len(self._processes) and self._all_well():
                time.sleep(_POLL_SECONDS)
                self._collect()
            self._wait_for_rest()
        finally:
            self.end()
        return outcome_of(self._attempt.folder, self._codes, self._ended)

    def end(self) -> None:
        """Kill those that still run."""
        self._collect()
        for rank, process in enumerate(self._processes):
            if rank not in self._codes:
                self._ended.add(rank)
                process.kill()
        for process in self._processes:
            process.wait()
        self._collect()

    def _collect(self) -> None:
        for rank, process in enumerate(self._processes):
            code = process.poll()
            if code is not None and rank not in self._codes:
                self._codes[rank] = code
                word = said(self._attempt.folder, rank)
                self._states[rank] = "silent" if word is None else word["state"]

    def _all_well(self) -> bool:
        return all(state in ("finished", "interrupted") for state in self._states.values())

    def _wait_for_rest(self) -> None:
        started = time.monotonic()
        while len(self._codes) < len(self._processes) and time.monotonic() < started + grace(
            self._attempt, self._states.values()
        ):
            time.sleep(_POLL_SECONDS)
            self._collect()


def start(attempt: Attempt) -> LocalRanks:
    """Start the ranks of `attempt` as processes of this machine. What rank 0 prints is seen here.

    Raises:
        ParallelError: CUDA is in use and the machine has fewer devices than ranks.
    """
    _check_devices(attempt)
    shared = {
        "VIDEOFM_RENDEZVOUS": str((attempt.folder / "rendezvous").absolute()),
        "VIDEOFM_LAUNCHER": str(os.getpid()),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    ranks = LocalRanks(attempt, processes := [])
    try:
        for rank in range(attempt.world_size):
            environment = {**os.environ, **attempt.environment(rank, rank, attempt.world_size), **shared}
            processes.append(_start(attempt.command, environment, None if rank == 0 else attempt.output(rank)))
    except BaseException:
        ranks.end()
        raise
    return ranks


def _start(command: list[str], environment: Mapping[str, str], output: Path | None) -> subprocess.Popen[bytes]:
    if output is None:
        return subprocess.Popen(command, env=environment, start_new_session=True)
    with output.open("wb") as file:
        return subprocess.Popen(command, env=environment, start_new_session=True, stdout=file, stderr=file)


def _check_devices(attempt: Attempt) -> None:
    if attempt.run.config["trainer"]["device"] == "cpu" or not Path("/dev/nvidia0").exists():
        return
    devices, ranks = len(list(Path("/dev").glob("nvidia[0-9]*"))), attempt.world_size
    if ranks > devices:
        raise ParallelError(
            f"{ranks} ranks need {ranks} GPUs and this machine has {devices}; choose parallel.data_degree, context_degree and "
            f"tensor_degree whose product is {devices}, or trainer.device=cpu"
        )
