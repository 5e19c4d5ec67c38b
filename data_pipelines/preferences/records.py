"""What every reader of foreign preferences gives: pairs of files, and records that are none with the reason."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videofm.data.preferences import PreferencePair
from videofm.errors import DataError


@dataclass(frozen=True)
class ForeignPair:
    """A pair as a list of others has it.

    Attributes:
        where: its place in the list, `pair.json: record 3`.
        pair: what it says. Its sides have the path as the list writes it in place of a key, the SHA-256 that the list
            promises or an empty text; `pair_id` is empty where the list has none.
        winner: the file of the better one; in a tie of the first.
        loser: the file of the other.
    """

    where: str
    pair: PreferencePair
    winner: Path
    loser: Path


@dataclass(frozen=True)
class BadRecord:
    """A record that makes no pair: its place, a reason of few words for counts, and a detail for people."""

    where: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}: {self.detail}"


class Bad(Exception):
    """Raised by what reads one record: reason and detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


Found = Iterator[ForeignPair | BadRecord]


def read_records(items: Iterable[tuple[str, Any]], read: Callable[[str, Any], ForeignPair]) -> Found:
    """`read(where, item)` of each item; where it raises `Bad`, or `DataError` for what is no pair, a bad record."""
    for where, item in items:
        try:
            yield read(where, item)
        except Bad as error:
            yield BadRecord(where, error.reason, error.detail)
        except DataError as error:
            yield BadRecord(where, "not a pair", str(error))


def located(root: Path, name: Any) -> Path:
    """The file that a record calls `name`, from `root` on.

    Raises:
        Bad: it is no path, there is no such file, or it lies outside of `root`.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise Bad("no path", f"{name!r} names no video")
    path = Path(os.path.normpath(root / name))
    inside = root.resolve()
    if not path.resolve().is_relative_to(inside):
        raise Bad("outside", f"{name!r} leaves {root}; set `videos` to a folder that holds all videos")
    if not path.is_file():
        raise Bad("missing file", f"there is no {path}")
    return path


def prompt_of(value: Any) -> str:
    """The text of a prompt, on one line; a list stands for its first text.

    Raises:
        Bad: there is none.
    """
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value.strip():
        raise Bad("no prompt", f"its prompt is {value!r}")
    return " ".join(value.split())


def number_of(value: Any) -> float | None:
    """A finite number, also one in a text (CSV); None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def read_json_list(path: Path) -> list[Any]:
    """The list in a JSON file.

    Raises:
        DataError: it is missing, no JSON, or holds something else.
    """
    value = json_of(read_text(path), str(path))
    if not isinstance(value, list):
        raise DataError(f"{path} holds {type(value).__name__}, and a list of records is wanted; is it of another format?")
    return value


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and value of each line that is not empty; a line that is no JSON comes as the text that it is."""
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not `splitlines`: captions may hold U+2028
        if line.strip():
            try:
                yield f"{path.name}:{number}", json.loads(line)
            except (ValueError, RecursionError):
                yield f"{path.name}:{number}", line


def json_of(text: str, name: str) -> Any:
    """The value of a JSON text.

    Raises:
        DataError: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not valid JSON: {error}") from None


def read_text(path: Path) -> str:
    """A text file, UTF-8 with or without its mark.

    Raises:
        DataError: it is missing or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DataError(f"{path} is missing: give the folder that holds it as `source`, or its name in `format`") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
