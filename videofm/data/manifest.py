"""The manifest of a dataset: one JSON file a shard, which is what makes the shard exist. Readers look nowhere else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from videofm.data.index import ClipRecord, read_records, write_index
from videofm.errors import DataError
from videofm.files import sha256_of, sync
from videofm.run_dir import read_json

VERSION = 1
SPLITS = ("train", "held_out")


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
    """The committed shards of a dataset, by group."""

    folder: Path
    entries: list[Entry]

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """The manifest of the dataset in `folder`.

        Raises:
            DataError: there is no such folder or no committed shard in it, or its shards come from several configs.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"the folder of shards {folder} does not exist; make it with `videofm curate`")
        entries = read_entries(folder)
        if not entries:
            raise DataError(f"{folder} has no committed shard (no manifest/shard-*.json); make some with `videofm curate`")
        hashes = sorted({entry.config_hash for entry in entries})
        if len(hashes) > 1:
            names = ", ".join(value[:12] for value in hashes)
            raise DataError(
                f"the shards of {folder} come from {len(hashes)} different curation configs ({names}); a dataset has one. "
                "Curate again into an empty folder"
            )
        return cls(folder, entries)

    @property
    def hash(self) -> str:
        """SHA-256 (hex) over the hashes of all tars and indexes: the identity of the dataset."""
        lines = [f"{entry.group} {entry.sha256} {entry.index_sha256}\n" for entry in self.entries]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def records(self, split: str | None = None) -> list[ClipRecord]:
        """The clips of a split (None: of all), sorted by key.

        Raises:
            DataError: an index is missing or is not the one that was committed.
        """
        found = [record for entry in self.entries for record in read_index(self.folder, entry)]
        return sorted((r for r in found if split in (None, r.split)), key=lambda record: record.key)

    def verify(self) -> None:
        """Read every tar and index and compare SHA-256.

        Raises:
            DataError: a file is missing or differs; the message names it, with the expected hash and the one found.
        """
        for entry in self.entries:
            _check_sha256(self.folder / entry.tar, entry.sha256)
            _check_sha256(self.folder / entry.index, entry.index_sha256)


def read_entry(folder: Path, group: str) -> Entry:
    """The manifest entry of a group.

    Raises:
        DataError: it is missing, or not of the format that this version reads.
    """
    path = entry_path(folder, group)
    value = read_json(path)
    names = {field.name for field in fields(Entry)}
    if not isinstance(value, dict) or value.get("version") != VERSION or set(value) != names:
        found = value.get("version") if isinstance(value, dict) else None
        raise DataError(f"{path} is not a manifest entry of version {VERSION} (found version {found!r}); curate again")
    return Entry(**value)


def read_entries(folder: Path) -> list[Entry]:
    """The manifest entries of `folder`, sorted by group; empty where nothing is committed."""
    paths = sorted((Path(folder) / "manifest").glob("shard-*.json"))
    return [read_entry(Path(folder), path.stem.removeprefix("shard-")) for path in paths]


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
        os.replace(temporary, path)
    else:
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass  # the other writer's entry stands; `commit` reads it
        finally:
            temporary.unlink()
    sync(path.parent)


def _check_sha256(path: Path, expected: str) -> None:
    if not path.is_file():
        raise DataError(f"{path} is in the manifest but missing; restore it or curate again")
    found = sha256_of(path)
    if found != expected:
        raise DataError(f"{path} is damaged: SHA-256 expected {expected}, found {found}; restore it or curate again")
