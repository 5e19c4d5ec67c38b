"""The log of attempts: what was begun and how it ended, on disk before the work starts.

A source whose process, worker or whole machine died as often as the config allows is not tried again, also not by the next run.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from videofm.run_dir import read_jsonl

SOUND = ("done", "stopped")


class AttemptsLog:
    """The attempts of a group, in `path`: lines `{"source", "event": "start"}` and `{"source", "event": "end", "outcome"}`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_cut_line(path)
        self._failures: Counter[str] = Counter()
        for line in read_jsonl(path):
            if line["event"] == "start":
                self._failures[line["source"]] += 1
            elif line["outcome"] in SOUND:
                self._failures[line["source"]] -= 1

    def failures(self, source: str) -> int:
        """How often work on `source` began and did not end well."""
        return self._failures[source]

    def start(self, source: str) -> None:
        """Work on `source` begins now; returns when that is on disk."""
        self._failures[source] += 1
        self._append({"source": source, "event": "start"}, sync=True)

    def end(self, source: str, outcome: str) -> None:
        """Work on `source` ended: `done`, `stopped`, `crash` or `timeout`."""
        self._failures[source] -= outcome in SOUND
        self._append({"source": source, "event": "end", "outcome": outcome}, sync=False)

    def _append(self, line: dict[str, str], sync: bool) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            if sync:
                os.fsync(file.fileno())


def _drop_cut_line(path: Path) -> None:
    """Take away a last line that a crash cut short; what it announced had not begun."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
