"""What a process and all that it started use: CPU seconds and memory, from /proc."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
RAY_OWN = ("gcs_server", "raylet", "ray/dashboard", "log_monitor", "runtime_env")
"""Parts of the command lines of Ray's own processes."""


def tree(root: int) -> list[int]:
    """A process and its descendants that are alive."""
    children: dict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*"):
        facts = _stat(int(path.name))
        if facts is not None:
            children[int(facts[1])].append(int(path.name))
    found = [root]
    for pid in found:
        found += children[pid]
    return found


def cpu_seconds(root: int) -> float:
    """CPU time that a process and its descendants took until now, with that of those which ended and were waited for."""
    facts = [stat for pid in tree(root) if (stat := _stat(pid)) is not None]
    return sum(float(value) for stat in facts for value in stat[11:15]) / TICKS


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third (state) on; None where it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def kind_of(pid: int, root: int) -> str:
    """`driver`, `ray` (its own processes) or `work` (workers, and the processes that they start)."""
    if pid == root:
        return "driver"
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return "work"
    return "ray" if any(name in command for name in RAY_OWN) and not command.startswith("ray::") else "work"


def proportional_bytes(pid: int) -> int:
    """Memory of a process, where shared pages count in equal parts for all that share them; 0 where it ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


@dataclass
class MemoryWatch:
    """Samples the memory of a process tree in a thread: `with MemoryWatch(pid) as watch: ...`, then `watch.samples`.

    A sample is bytes by kind (see `kind_of`).
    """

    root: int
    every: float = 0.25
    samples: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self.every):
            sample = dict.fromkeys(("driver", "ray", "work"), 0)
            for pid in tree(self.root):
                sample[kind_of(pid, self.root)] += proportional_bytes(pid)
            self.samples.append(sample)
