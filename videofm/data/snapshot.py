"""The manifest of a dataset in one file, so that 100,000 shards are known after one read instead of 100,000.

`manifest/snapshot.parquet` holds a row for each entry without its source ids. It speaks for the entries only while they are
those it was made of: the names of the entries, as listed, must be the ones that it names, and whoever replaces an entry removes
it. Then it is ignored, and the entries are read one by one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from videofm.errors import DataError
from videofm.files import sync

NAME = "snapshot.parquet"
COLUMNS: dict[str, pyarrow.DataType] = {
    "group": pyarrow.string(),
    "tar": pyarrow.string(),
    "bytes": pyarrow.int64(),
    "sha256": pyarrow.string(),
    "index": pyarrow.string(),
    "index_sha256": pyarrow.string(),
    "num_train": pyarrow.int64(),
    "num_held_out": pyarrow.int64(),
    "config_hash": pyarrow.string(),
}
_FORMAT, _NAMES, _HASH = b"videofm.snapshot", b"videofm.entries", b"videofm.manifest_hash"
_VERSION = b"1"
_ROWS = 4096
"""Rows that are read and hashed at a time."""


def manifest_hash(table: pyarrow.Table) -> str:
    """SHA-256 (hex) over group, tar hash and index hash of all shards, in the order of the table: a dataset's identity."""
    digest = hashlib.sha256()
    for batch in table.select(["group", "sha256", "index_sha256"]).to_batches(max_chunksize=_ROWS):
        rows = zip(*(column.to_pylist() for column in batch.columns), strict=True)
        digest.update("".join(f"{group} {tar} {index}\n" for group, tar, index in rows).encode())
    return digest.hexdigest()


def write(path: Path, table: pyarrow.Table, names: Sequence[str]) -> None:
    """Put a snapshot of the entries called `names` in place, whole."""
    metadata = {_FORMAT: _VERSION, _NAMES: _names_hash(names), _HASH: manifest_hash(table).encode()}
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        # Hashes do not repeat: a dictionary of them would only cost memory. Short groups of rows keep readers small.
        pyarrow.parquet.write_table(
            table.replace_schema_metadata(metadata), temporary, row_group_size=_ROWS, use_dictionary=["config_hash"]
        )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def read(source: Path | pyarrow.NativeFile, names: Iterable[str], place: str) -> pyarrow.Table | None:
    """The table of a snapshot, or None where the entries are not those called `names` any more.

    Raises:
        FileNotFoundError: there is none.
        DataError: it is damaged.
    """
    fix = "delete it: the entries beside it are what counts"
    try:
        file = pyarrow.parquet.ParquetFile(source, read_dictionary=["config_hash"], pre_buffer=False)
        # Group by group: read in one go, what is unpacked on the way takes three times the memory of the table.
        groups = [file.read_row_group(number, use_threads=False) for number in range(file.num_row_groups)]
        table = pyarrow.concat_tables(groups) if groups else file.schema_arrow.empty_table()
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"the snapshot of the manifest {place} cannot be read ({error}); {fix}") from None
    metadata = table.schema.metadata or {}
    if metadata.get(_FORMAT) != _VERSION or set(table.column_names) != set(COLUMNS):
        raise DataError(f"the snapshot of the manifest {place} is not of version {_VERSION.decode()}; {fix}")
    if metadata.get(_NAMES) != _names_hash(names):
        return None
    if metadata.get(_HASH) != manifest_hash(table).encode():
        raise DataError(f"the snapshot of the manifest {place} is damaged: its rows do not have the hash it states; {fix}")
    return table.replace_schema_metadata(None)


def _names_hash(names: Iterable[str]) -> bytes:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest().encode()
