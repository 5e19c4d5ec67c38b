"""Metrics while curation runs: a line in metrics.jsonl every ten seconds, and one at the end of each step."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.metrics import Funnel
from videofm.run_dir import now

EVERY_SECONDS = 10.0


class LiveMetrics:
    """Adds up what groups report in this run; groups that earlier runs did are counted as done, not measured again.

    A line is `{"time", "work", "groups_done", "groups_total", "groups_running", "groups_waiting", "stages": [metrics of each
    stage]}`; what waits is the depth of the queue before the step.
    """

    def __init__(self, path: Path, stages: Sequence[str], every: float = EVERY_SECONDS) -> None:
        self.path, self.every = path, every
        self.funnel = Funnel(stages)
        self._work, self._done, self._total = "", 0, 0
        self._told = time.monotonic()

    def begin(self, work: str, done: int, total: int) -> None:
        """A step begins, of whose `total` groups earlier runs did `done`."""
        self._work, self._done, self._total = work, done, total

    def group_done(self, metrics: Sequence[dict[str, Any]]) -> None:
        """A group ended."""
        self.funnel.add_group(metrics)
        self._done += 1

    def tell(self, running: int, force: bool = False) -> None:
        """Write a line, where the last one is long enough ago, with the number of tasks that run."""
        if not force and time.monotonic() - self._told < self.every:
            return
        self._told = time.monotonic()
        line = {
            "time": now(), "work": self._work, "groups_done": self._done, "groups_total": self._total,
            "groups_running": running, "groups_waiting": max(0, self._total - self._done - running),
            "stages": self.funnel.to_json(),
        }  # fmt: skip
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
