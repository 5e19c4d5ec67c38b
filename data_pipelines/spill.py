"""Sorting more lines than memory holds: lines are spread over files by the first digits of their key, then sorted file by file.

A line is a key, a tab and one JSON value. Keys are hexadecimal and evenly spread (hashes), so that files are of like size; a
file that is still too large is spread again by its next digits.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MAX_BYTES = 32 << 20
"""A file up to this size is sorted in memory."""
_DIGITS = 2


class Spill:
    """Writes lines to files of `folder` by the first digits of their key; `depth` digits are known to be equal."""

    def __init__(self, folder: Path, depth: int = 0) -> None:
        self.folder, self.depth = folder, depth
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def add(self, key: str, value: Any) -> None:
        """Take a value under `key`."""
        self.add_line(f"{key}\t{json.dumps(value, sort_keys=True)}\n")

    def add_line(self, line: str) -> None:
        """Take a line that another spill wrote."""
        digits = line[self.depth : self.depth + _DIGITS]
        if digits not in self._files:
            descriptor = os.open(self.folder / digits, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            self._files[digits] = os.fdopen(descriptor, "w", encoding="utf-8")
        self._files[digits].write(line)


def sorted_values(folder: Path, depth: int = 0, max_bytes: int = MAX_BYTES) -> Iterator[tuple[str, Any]]:
    """Pairs of key and value, ascending; the files of `folder` are removed on the way."""
    for path in sorted(folder.iterdir()):
        lines = path.open(encoding="utf-8")
        with lines:
            if path.stat().st_size <= max_bytes or _all_equal(path):
                for line in sorted(lines):
                    key, _, text = line.partition("\t")
                    yield key, json.loads(text)
            else:
                below = folder / f"{path.name}-split"
                with Spill(below, depth + _DIGITS) as spill:
                    for line in lines:
                        spill.add_line(line)
                yield from sorted_values(below, depth + _DIGITS, max_bytes)
        path.unlink()
    folder.rmdir()


def grouped(pairs: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, list[Any]]]:
    """Values that share a key, from ascending pairs."""
    for key, members in itertools.groupby(pairs, key=lambda pair: pair[0]):
        yield key, [value for _, value in members]


def _all_equal(path: Path) -> bool:
    """Whether all lines have one key, so that spreading them would not end."""
    with path.open(encoding="utf-8") as lines:
        first = next(lines, "").partition("\t")[0]
        return all(line.partition("\t")[0] == first for line in lines)
