"""The manifest of a dataset: one JSON file a shard, which is what makes the shard exist. Readers look nowhere else.

In memory it is a table with a row a shard, about 250 bytes each; for many shards it is read from a snapshot (`snapshot.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from videofm.data import snapshot, storage
from videofm.data.index import ClipRecord, read_records, read_table, records_of, write_index
from videofm.errors import DataError, MissingError
from videofm.files import sha256_of, sync
from videofm.run_dir import read_json

VERSION = 1
SPLITS = ("train", "held_out")

Fetch = Callable[[str, str], Path]
"""Gives a file of a dataset that lies elsewhere (its name, its SHA-256) as a checked local file."""


@dataclass(frozen=True)
class Entry:
    """A manifest entry. `tar` and `index` are relative to the dataset's folder; `num_clips` counts the clips of each split."""

    version: int
    group: str
    tar: str
    bytes: int
    sha256: str
    index: str
    index_sha256: str
    num_clips: dict[str, int]
    config_hash: str
    source_ids: list[str]


@dataclass(frozen=True)
class Manifest:
    """The committed shards of a dataset, by group.

    Attributes:
        place: the dataset's folder or URL.
        table: a row a shard, in the order of the groups; its columns are `snapshot.COLUMNS`.
        fetch: gives the index files of a dataset that is not on this machine.
    """

    place: str
    table: pyarrow.Table = field(compare=False)
    fetch: Fetch | None = field(default=None, compare=False)

    @classmethod
    def load(cls, place: str | Path, fetch: Fetch | None = None) -> Manifest:
        """The manifest of the dataset in a folder or under a URL: from its snapshot where that is current.

        Raises:
            DataError: there is no such folder or no committed shard in it, or its shards come from several configs.
        """
        names = _names(place)
        if not names:
            if storage.is_local(place) and not Path(place).is_dir():
                raise DataError(f"the folder of shards {place} does not exist; make it with `videofm curate`")
            at = storage.redacted(place)
            raise DataError(f"{at} has no committed shard (no manifest/shard-*.json); make some with `videofm curate`")
        table = _read_snapshot(place, names)
        if table is None:
            table = _table(_read_entry(place, name) for name in names)
        hashes = sorted({value for chunk in table["config_hash"].chunks for value in chunk.unique().to_pylist()})
        if len(hashes) > 1:
            short = ", ".join(value[:12] for value in hashes)
            raise DataError(
                f"the shards of {storage.redacted(place)} come from {len(hashes)} different curation configs ({short}); a "
                "dataset has one. Curate again into an empty folder"
            )
        return cls(str(place), table, fetch)

    @property
    def folder(self) -> Path:
        """The dataset's folder; for one on this machine."""
        path = storage.local_path(self.place)
        assert path is not None, f"{storage.redacted(self.place)} is not on this machine"
        return path

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) over the hashes of all tars and indexes: the identity of the dataset."""
        return snapshot.manifest_hash(self.table)

    @cached_property
    def entries(self) -> list[Entry]:
        """The entries with all that they say, read one by one: where there are many, use `table`."""
        return [_read_entry(self.place, f"shard-{group}.json") for group in self.table["group"].to_pylist()]

    @cached_property
    def tars(self) -> list[str]:
        """Names of the tars, relative to the dataset's folder, in the order of `table`."""
        names: list[str] = self.table["tar"].to_pylist()
        return names

    def num_clips(self, split: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """How many clips of a split each shard has, in the order of `table`."""
        return np.asarray(self.table[f"num_{split}"].to_numpy(), np.int64)

    def read_shard(self, shard: int, columns: Sequence[str] | None = None) -> pyarrow.Table:
        """The index of the shard in row `shard` of `table`: the named columns, of which scores may be absent; None: all.

        Raises:
            DataError: the index is missing or is not the one that was committed.
        """
        name, sha256 = (str(self.table[column][shard].as_py()) for column in ("index", "index_sha256"))
        if self.fetch is not None:
            return read_table(self.fetch(name, sha256), columns)
        if not storage.is_local(self.place):
            place = storage.join(self.place, name)
            content = storage.read_bytes(place)
            if (found := hashlib.sha256(content).hexdigest()) != sha256:
                raise _damaged(storage.redacted(place), sha256, found)
            return read_table(pyarrow.BufferReader(content), columns)
        path = self.folder / name
        _check_sha256(path, sha256)
        return read_table(path, columns)

    def records(self, split: str | None = None) -> list[ClipRecord]:
        """The clips of a split (None: of all), sorted by key: for datasets that fit into memory.

        Raises:
            DataError: an index is missing or is not the one that was committed.
        """
        found = [record for shard in range(len(self.table)) for record in records_of(self.read_shard(shard))]
        return sorted((r for r in found if split in (None, r.split)), key=lambda record: record.key)

    def verify(self) -> None:
        """Read every tar and index and compare SHA-256; for a dataset on this machine.

        Raises:
            DataError: a file is missing or differs; the message names it, with the expected hash and the one found.
        """
        for kind, sha256 in (("tar", "sha256"), ("index", "index_sha256")):
            for name, expected in zip(self.table[kind].to_pylist(), self.table[sha256].to_pylist(), strict=True):
                _check_sha256(self.folder / name, expected)

    def write_snapshot(self) -> Path:
        """Gather the entries as they are now in `manifest/snapshot.parquet`, so that later readers open one file.

        Raises:
            DataError: entries change while they are read.
        """
        path = self.folder / "manifest" / snapshot.NAME
        for _ in range(3):
            before = _stamps(self.folder)
            snapshot.write(path, _table(_read_entry(self.folder, name) for name in before), list(before))
            if _stamps(self.folder) == before:
                return path
            path.unlink(missing_ok=True)
        raise DataError(f"the entries in {path.parent} change while they are read; write the snapshot when curation has ended")


def read_entry(folder: Path, group: str) -> Entry:
    """The manifest entry of a group.

    Raises:
        DataError: it is missing, or not of the format that this version reads.
    """
    return _read_entry(folder, entry_path(folder, group).name)


def read_entries(folder: Path) -> list[Entry]:
    """The manifest entries of `folder`, sorted by group; empty where nothing is committed."""
    return [_read_entry(folder, name) for name in _names(folder)]


def read_index(folder: Path, entry: Entry) -> list[ClipRecord]:
    """The clips of a shard, as committed.

    Raises:
        DataError: the index is missing or is not the one that was committed.
    """
    path = Path(folder) / entry.index
    _check_sha256(path, entry.index_sha256)
    return read_records(path)


def assign_split(folder: Path, entry: Entry, source_id: str, split: str) -> Entry:
    """Move the clips of a source to `split`; the entry that replaces `entry`.

    The index gets a new name, so that the old entry stays whole until the new one takes its place.
    """
    records = [replace(r, split=split) if r.source_id == source_id else r for r in read_index(folder, entry)]
    name = f"index/shard-{entry.group}-{source_id[:12]}-{split}.parquet"
    sha256 = write_index(Path(folder) / name, records)
    updated = replace(entry, index=name, index_sha256=sha256, num_clips=count_splits(records))
    publish(entry_path(Path(folder), entry.group), updated, overwrite=True)
    (Path(folder) / entry.index).unlink(missing_ok=True)
    return updated


def count_splits(records: Sequence[ClipRecord]) -> dict[str, int]:
    """How many clips each split has."""
    return {split: sum(record.split == split for record in records) for split in SPLITS}


def entry_path(folder: Path, group: str) -> Path:
    """Where the entry of a group stands."""
    return Path(folder) / "manifest" / f"shard-{group}.json"


def publish(path: Path, entry: Entry, overwrite: bool = False) -> None:
    """Create a manifest entry whole; a link to an existing name fails, so that of two writers one wins."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}-{os.urandom(4).hex()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(entry), indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if overwrite:
        # A snapshot cannot see that an entry of the same name is another one: whoever replaces it removes the snapshot, before
        # for readers and after for one that was being written meanwhile.
        (path.parent / snapshot.NAME).unlink(missing_ok=True)
        os.replace(temporary, path)
        (path.parent / snapshot.NAME).unlink(missing_ok=True)
    else:
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass  # the other writer's entry stands; `commit` reads it
        finally:
            temporary.unlink()
    sync(path.parent)


def _read_entry(place: str | Path, name: str) -> Entry:
    """The entry in the file `name` of a manifest."""
    if storage.is_local(place):
        path: str | Path = Path(place) / "manifest" / name
        value = read_json(Path(path))
    else:
        path = storage.redacted(storage.join(place, f"manifest/{name}"))
        try:
            value = json.loads(storage.read_bytes(storage.join(place, f"manifest/{name}")))
        except ValueError:
            value = None
    names = {field.name for field in fields(Entry)}
    if not isinstance(value, dict) or value.get("version") != VERSION or set(value) != names:
        found = value.get("version") if isinstance(value, dict) else None
        raise DataError(f"{path} is not a manifest entry of version {VERSION} (found version {found!r}); curate again")
    return Entry(**value)


def _names(place: str | Path) -> list[str]:
    """Names of the files of a manifest that are entries, sorted; none where there is no such folder."""
    try:
        if (path := storage.local_path(place)) is not None:
            found = os.listdir(path / "manifest")
        else:
            found = [stored.name for stored in storage.list_files(storage.join(place, "manifest"))]
    except (MissingError, FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in found if name.startswith("shard-") and name.endswith(".json"))


def _read_snapshot(place: str | Path, names: Sequence[str]) -> pyarrow.Table | None:
    """The table of the entries called `names` from the snapshot; None where there is none, or it is of other entries."""
    path = storage.join(place, f"manifest/{snapshot.NAME}")
    try:
        local = storage.local_path(path)
        source = local if local is not None else pyarrow.BufferReader(storage.read_bytes(path))
        return snapshot.read(source, names, storage.redacted(path))
    except (MissingError, FileNotFoundError):
        return None


def _stamps(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What tells each entry of a folder from one that took its place."""
    paths = [Path(folder) / "manifest" / name for name in _names(folder)]
    return {path.name: (found.st_ino, found.st_mtime_ns, found.st_size) for path in paths for found in [path.stat()]}


def _table(entries: Iterable[Entry]) -> pyarrow.Table:
    """What readers need of entries, in columns."""
    columns: dict[str, list[Any]] = {name: [] for name in snapshot.COLUMNS}
    for entry in entries:
        counts = {f"num_{split}": entry.num_clips.get(split, 0) for split in SPLITS}
        for name, values in columns.items():
            values.append(counts[name] if name in counts else getattr(entry, name))
    return pyarrow.table({name: pyarrow.array(columns[name], kind) for name, kind in snapshot.COLUMNS.items()})


def _check_sha256(path: Path, expected: str) -> None:
    if not path.is_file():
        raise DataError(f"{path} is in the manifest but missing; restore it or curate again")
    if (found := sha256_of(path)) != expected:
        raise _damaged(str(path), expected, found)


def _damaged(place: str, expected: str, found: str) -> DataError:
    return DataError(f"{place} is damaged: SHA-256 expected {expected}, found {found}; restore it or curate again")
