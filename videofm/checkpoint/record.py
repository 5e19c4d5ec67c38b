"""What `COMMITTED.json` says, the marker that makes a folder a checkpoint; and how to tell a whole one from a damaged one.

    {"format": 2, "step": 200, "time": "...", "healthy": true, "code": "0.9.0+abc", "fingerprint": "...",
     "layout": {"data": 2, "context": 1, "tensor": 1, "zero_stage": 1}, "num_samples": 12800, "metrics": {"loss": 0.1},
     "files": {"models/dit/model.safetensors": {"bytes": 123, "sha256": "..."}}, "sha256": "..."}

The last field is of the rest, so that damage to the marker itself is found too. Format 1 had `step`, `time` and `files` only,
and is still read. This file imports no torch: it is for looking at runs, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from videofm.errors import CheckpointError
from videofm.files import sha256_of

COMMITTED = "COMMITTED.json"
FORMAT = 2


@dataclass(frozen=True)
class FileEntry:
    """A file of a checkpoint as it was when it was written: its size in bytes, and its SHA-256 (hex)."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Facts:
    """What the one who saves knows of a state.

    Attributes:
        step: optimizer steps done.
        healthy: whether training went well up to here; a rollback goes to a checkpoint that says so.
        code: version of videofm, as `run_dir.code_version` tells it.
        fingerprint: of the run.
        layout: degrees and ZeRO stage that wrote it; any other layout reads it.
        num_samples: samples that training has seen.
        metrics: those of the step; a number that is not finite is None.
    """

    step: int
    healthy: bool = True
    code: str | None = None
    fingerprint: str | None = None
    layout: Mapping[str, int] = field(default_factory=dict)
    num_samples: int | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """The content of a marker: facts, the time of the commit (UTC, ISO 8601), and every file by relative path."""

    facts: Facts
    time: str
    files: Mapping[str, FileEntry]
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """The marker, with the hash of itself."""
        files = {name: asdict(entry) for name, entry in self.files.items()}
        value = {"format": self.format, **asdict(self.facts), "time": self.time, "files": files}
        return {**value, "sha256": _own_hash(value)}


def step_folder(checkpoints: Path, step: int) -> Path:
    """`checkpoints/step_00000200`."""
    return checkpoints / f"step_{step:08d}"


def committed(checkpoints: Path) -> list[Path]:
    """The folders of complete checkpoints, oldest first."""
    return sorted(path.parent for path in checkpoints.glob(f"step_*/{COMMITTED}"))


def read_record(folder: Path) -> Record:
    """The marker of a checkpoint.

    Raises:
        CheckpointError: there is none, or it is damaged, or of a format that this version does not know.
    """
    path = folder / COMMITTED
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {COMMITTED}: it was never completed, or is no checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{folder} is damaged: {COMMITTED} is not valid JSON ({error})") from None
    number = value.get("format") if isinstance(value, dict) else None
    if isinstance(number, int) and number > FORMAT:
        raise CheckpointError(
            f"{folder} has the format {number}, which a newer videofm wrote; this one reads up to {FORMAT}: update it"
        )
    if number == FORMAT and value.pop("sha256", None) != _own_hash(value):
        raise CheckpointError(f"{folder} is damaged: {COMMITTED} differs from the SHA-256 that it has of itself")
    try:
        files = {name: FileEntry(**entry) for name, entry in value.pop("files").items()}
        return Record(time=value.pop("time"), files=files, format=value.pop("format"), facts=Facts(**value))
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged: {COMMITTED} has not the fields of a marker ({error})") from None


def file_problem(folder: Path, name: str, expected: FileEntry, hashed: bool = True) -> str | None:
    """What is wrong with a file of a checkpoint, or None; without `hashed` only its presence and size are looked at."""
    path = folder / name
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            return f"{folder} is damaged: {name} has {size} bytes, not {expected.bytes}"
        if hashed and sha256_of(path) != expected.sha256:
            return f"{folder} is damaged: the SHA-256 of {name} is not the one recorded when it was written"
    except FileNotFoundError:
        return f"{folder} is damaged: {name} is missing"
    except OSError as error:
        return f"{folder} is damaged: {name} cannot be read ({error})"
    return None


def verify(folder: Path, hashed: bool = True) -> Record:
    """Check that every file of a checkpoint is there with its size and hash; returns the marker.

    Raises:
        CheckpointError: a file is missing or differs; the message names it.
    """
    record = read_record(folder)
    for name, expected in record.files.items():
        if problem := file_problem(folder, name, expected, hashed):
            raise CheckpointError(problem)
    return record


def is_whole(folder: Path) -> bool:
    """Whether the marker can be read and every file is there with its size; hashes are not looked at."""
    try:
        verify(folder, hashed=False)
    except CheckpointError:
        return False
    return True


def _own_hash(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
