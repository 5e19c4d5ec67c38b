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
    """The attempts of one group, in `path`: lines `{"source", "event": "start"}` and `{"source", "event": "end", "outcome"}`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
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
        with self.path.open("a+b") as file:
            # A crash may have cut the last line short; a newline keeps what follows readable.
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            if sync:
                os.fsync(file.fileno())
