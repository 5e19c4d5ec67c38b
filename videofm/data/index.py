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

from videofm.errors import DataError
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
    pyarrow.parquet.write_table(table_of(records), path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256_of(path)


def table_of(records: Sequence[ClipRecord]) -> pyarrow.Table:
    """The rows of an index."""
    names = sorted({name for record in records for name in record.scores})
    columns = {name: pyarrow.array([getattr(r, name) for r in records], kind) for name, kind in _COLUMNS.items()}
    scores = {_SCORE + name: pyarrow.array([r.scores.get(name) for r in records], pyarrow.float64()) for name in names}
    return pyarrow.table({**columns, **scores})


def read_table(source: Path | pyarrow.NativeFile, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """The rows of an index file: of the named columns those that it has (a score may be absent), or all.

    Raises:
        DataError: it is not an index.
    """
    try:
        # One thread and no memory map: a shard's index is small, and pages of files that are replaced must not be seen.
        file = pyarrow.parquet.ParquetFile(source)
        names = None if columns is None else [name for name in file.schema_arrow.names if name in set(columns)]
        return file.read(columns=names, use_threads=False)
    except pyarrow.ArrowException as error:
        raise DataError(f"the index {source} cannot be read ({error}); restore it or curate again") from None


def read_records(path: Path) -> list[ClipRecord]:
    """The clips of the index file `path`, in its order."""
    return records_of(read_table(path))


def records_of(table: pyarrow.Table) -> list[ClipRecord]:
    """The clips of rows of an index with all columns."""
    return [_record(row) for row in table.to_pylist()]


def _record(row: dict[str, Any]) -> ClipRecord:
    scores = {name.removeprefix(_SCORE): value for name, value in row.items() if name.startswith(_SCORE) and value is not None}
    return ClipRecord(**{name: row[name] for name in _COLUMNS}, scores=scores)
