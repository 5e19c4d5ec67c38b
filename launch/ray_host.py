"""What is on a Ray node for a rank: an actor that looks around, and runs the rank as a process of its own.

The process is what `python -m videofm.train.worker` is anywhere else: its signals, crash and memory are not those of the
actor. It ends with the actor.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

KEPT = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR", "RAY_USAGE_STATS_ENABLED")
"""Ray's own variables that a rank keeps; the others describe the actor."""
SEE_SECONDS = 20.0
"""For a file of one node to be seen on another one."""


@dataclass(frozen=True)
class Spot:
    """Where a rank can run."""

    actor: Any
    node: str
    """Ray's name of the node."""
    address: str
    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them: numbers, or the names of GPUs and of parts of them (`GPU-...`, `MIG-...`)."""

    @property
    def place(self) -> str:
        """The node, for people: nodes of one machine share an address."""
        return f"node {self.address} ({self.node[:8]})"


class RankHost:
    """What runs in the actor of a rank. `run` and `kill` are called from different threads."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def describe(self) -> tuple[str, str, tuple[str, ...]]:
        """Ray's name of this node, its address, and the GPUs that this actor may use."""
        context = ray.get_runtime_context()
        gpus = tuple(sorted(map(str, context.get_accelerator_ids().get("GPU", [])), key=gpu_order))
        return context.get_node_id(), ray.util.get_node_ip_address(), gpus

    def sees(self, folders: Sequence[str], file: str, text: str) -> str:
        """The first of `folders` that is not there, or `file` if it does not hold `text`; nothing where all is there."""
        deadline = time.monotonic() + SEE_SECONDS
        while True:
            missing = next((folder for folder in folders if not Path(folder).is_dir()), "")
            with suppress(OSError):
                if not missing and Path(file).read_text(encoding="utf-8") == text:
                    return ""
            if time.monotonic() > deadline:
                return missing or file
            time.sleep(0.2)

    def free_port(self, first: int, num_ports: int) -> int:
        """A port of this node that nobody has at the moment, drawn from `num_ports` from `first` on.

        Raises:
            OSError: all are taken.
        """
        numbers = random.sample(range(first, first + num_ports), num_ports)
        for number in numbers:
            with socket.socket() as held, suppress(OSError):
                held.bind(("", number))
                return number
        raise OSError(f"all of the ports from {first} to {first + num_ports - 1} are taken")

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], folder: str, output: str, word: str
    ) -> tuple[int, bool]:
        """Run a rank with this node's Python until it ends: its exit code, and whether it left the file `word`."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name in KEPT}
        # Encoders that feed this rank work on the same cluster.
        own["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        own |= {**environment, "VIDEOFM_LAUNCHER": str(os.getpid())}
        with open(output, "wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, *command[1:]], env=own, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        code = self._process.wait()
        return code, Path(word).exists()

    def kill(self) -> None:
        """SIGKILL for the rank, if it runs."""
        if self._process is not None:
            self._process.kill()


def gpu_order(name: str) -> tuple[int, str]:
    """By number where a GPU has one: 10 comes after 9."""
    return (int(name), "") if name.isdecimal() else (-1, name)
