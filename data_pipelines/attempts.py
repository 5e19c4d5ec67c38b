"""The log of attempts: what was begun and how it ended, on disk before the work starts.

A source whose process, worker or whole machine died as often as the config allows is not tried again, also not by the next run.
The same holds for a clip that kills the actor of a model.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from videofm.run_dir import read_jsonl

SOUND = ("done", "stopped")


class AttemptsLog:
    """The attempts of a group, in `path`: lines `{"source", "event": "start"}` and `{"source", "event": "end", "outcome"}`.

    `source` is what is tried: the name of a source, of a span of it, or of a clip.
    """

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
        log_start(self.path, [source])

    def end(self, source: str, outcome: str) -> None:
        """Work on `source` ended: `done`, `stopped`, `crash` or `timeout`."""
        self._failures[source] -= outcome in SOUND
        log_end(self.path, [source], outcome)


def log_start(path: Path, sources: Sequence[str]) -> None:
    """Work on all of `sources` begins now; returns when that is on disk."""
    _append(path, [{"source": source, "event": "start"} for source in sources], sync=True)


def log_end(path: Path, sources: Sequence[str], outcome: str) -> None:
    """Work on all of `sources` ended in the same way."""
    _append(path, [{"source": source, "event": "end", "outcome": outcome} for source in sources], sync=False)


def _append(path: Path, lines: list[dict[str, str]], sync: bool) -> None:
    with path.open("ab") as file:
        file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
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
