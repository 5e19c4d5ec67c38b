"""The index of a shard: one row a clip, so that a clip is found without opening the tar.

`num_frames` is counted by decoding; `offset` and `size` are those of the mp4 member's bytes, so that a clip is one read. A
score is a column `score_NAME`, null where it was not measured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from videofm.files import sha256_of

_SCORE = "score_"


@dataclass(frozen=True)
class ClipRecord:
    """A clip in a shard. `shard` is relative to the dataset's folder; sizes are in pixels and bytes."""

    key: str
    shard: str
    offset: int
    size: int
    sha256: str
    num_frames: int
    fps: float
    height: int
    width: int
    caption: str
    source_id: str
    split: str
    scores: dict[str, float]


_COLUMNS: dict[str, pyarrow.DataType] = {
    "key": pyarrow.string(),
    "shard": pyarrow.string(),
    "offset": pyarrow.int64(),
    "size": pyarrow.int64(),
    "sha256": pyarrow.string(),
    "num_frames": pyarrow.int32(),
    "fps": pyarrow.float64(),
    "height": pyarrow.int32(),
    "width": pyarrow.int32(),
    "caption": pyarrow.string(),
    "source_id": pyarrow.string(),
    "split": pyarrow.string(),
}


def write_index(path: Path, records: Sequence[ClipRecord]) -> str:
    """Write an index and flush it to disk.

    Returns:
        its SHA-256 (hex).
    """
    names = sorted({name for record in records for name in record.scores})
    columns = {name: pyarrow.array([getattr(r, name) for r in records], kind) for name, kind in _COLUMNS.items()}
    scores = {_SCORE + name: pyarrow.array([r.scores.get(name) for r in records], pyarrow.float64()) for name in names}
    pyarrow.parquet.write_table(pyarrow.table({**columns, **scores}), path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256_of(path)


def read_records(path: Path) -> list[ClipRecord]:
    """The clips of the index file `path`, in its order."""
    return [_record(row) for row in pyarrow.parquet.read_table(path).to_pylist()]


def _record(row: dict[str, Any]) -> ClipRecord:
    scores = {name.removeprefix(_SCORE): value for name, value in row.items() if name.startswith(_SCORE) and value is not None}
    return ClipRecord(**{name: row[name] for name in _COLUMNS}, scores=scores)
