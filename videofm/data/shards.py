"""Shards of clips: what curation writes and training reads.

```
shards/shard-00003.tar        webdataset: KEY.json, KEY.mp4, KEY.txt for each clip, sorted; KEY matches [A-Za-z0-9_-]+
index/shard-00003.parquet     one row a clip: where its mp4 lies in the tar, its SHA-256, size, frames, caption, split, scores
manifest/shard-00003.json     the commit point: names, sizes and SHA-256 of the two, counts, config hash, source ids
```

A shard exists when its manifest entry does; readers look nowhere else. The bytes of a tar depend on the clips alone (mtime 0,
uid and gid 0, mode 0644, ustar), so that a second run writes the same file. `num_frames` is counted by decoding; `offset` and
`size` are those of the mp4 member's bytes, so that a clip is one read. A score is a column `score_NAME`, null where it was not
measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

import pyarrow
import pyarrow.parquet

from videofm.data.files import HashingFile, lock
from videofm.errors import DataError
from videofm.files import sha256_of, sync
from videofm.run_dir import read_json

VERSION = 1
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")
SPLITS = ("train", "held_out")
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


class ShardWriter:
    """Writes one shard. Nothing is visible to readers before `commit`; leaving the context without it removes what was written.

    Args:
        folder: the dataset's folder.
        group: name of the group, part of the file names.
        config_hash: identifies the pipeline and its parameters; all shards of a dataset share one.
    """

    def __init__(self, folder: Path, group: str, config_hash: str) -> None:
        self.folder, self.group, self.config_hash = Path(folder), group, config_hash
        self.tar, self.index = f"shards/shard-{group}.tar", f"index/shard-{group}.parquet"
        for name in ("shards", "index", "manifest"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._records: list[ClipRecord] = []
        self._suffix = f".tmp-{os.getpid()}-{os.urandom(4).hex()}"
        self._file = HashingFile((self.folder / (self.tar + self._suffix)).open("wb"))
        self._archive = tarfile.TarFile(fileobj=cast(IO[bytes], self._file), mode="w", format=tarfile.USTAR_FORMAT)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._discard()

    def add(
        self,
        key: str,
        video: bytes,
        *,
        num_frames: int,
        fps: float,
        height: int,
        width: int,
        caption: str,
        source_id: str,
        split: str,
        scores: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Append a clip. Keys must come in ascending order; `video` is a whole MP4 file; `metadata` goes into KEY.json."""
        assert KEY_PATTERN.fullmatch(key), f"the key {key!r} does not match {KEY_PATTERN.pattern}"
        assert not self._records or key > self._records[-1].key, f"the key {key!r} does not follow {self._records[-1].key!r}"
        assert split in SPLITS, split
        facts = {"num_frames": num_frames, "fps": fps, "height": height, "width": width, "source_id": source_id}
        described = {**(metadata or {}), **facts, "caption": caption, "scores": dict(scores or {})}
        self._member(f"{key}.json", json.dumps(described, sort_keys=True, ensure_ascii=False).encode())
        offset = self._member(f"{key}.mp4", video)
        self._member(f"{key}.txt", caption.encode())
        self._records.append(
            ClipRecord(
                key, self.tar, offset, len(video), hashlib.sha256(video).hexdigest(), num_frames, fps, height, width,
                caption, source_id, split, dict(scores or {}),
            )
        )  # fmt: skip

    def commit(self, source_ids: Sequence[str] = ()) -> Entry:
        """Make the shard visible: flush, write the index, rename both, and create the manifest entry.

        Args:
            source_ids: all sources of the group, also those that gave no clip.

        Returns:
            the entry; where another writer committed the group first, that writer's.

        Raises:
            DataError: the other writer's entry was made with another config.
        """
        self._archive.close()
        self._file.sync()
        temporary_index = self.folder / (self.index + self._suffix)
        index_sha256 = _write_index(temporary_index, self._records)
        entry = Entry(
            VERSION, self.group, self.tar, self._file.count, self._file.hash.hexdigest(), self.index, index_sha256,
            _count_splits(self._records), self.config_hash, sorted(source_ids),
        )  # fmt: skip
        with lock(self.folder / "manifest" / f".shard-{self.group}.lock"):
            if not _manifest_path(self.folder, self.group).exists():
                os.replace(self.folder / (self.tar + self._suffix), self.folder / self.tar)
                os.replace(temporary_index, self.folder / self.index)
                sync(self.folder / "shards")
                sync(self.folder / "index")
                _publish(_manifest_path(self.folder, self.group), entry)
        self._discard()
        committed = read_entry(self.folder, self.group)
        if committed.config_hash != self.config_hash:
            raise DataError(
                f"group {self.group} of {self.folder} was committed by another config (hash {committed.config_hash[:12]}, "
                f"this one is {self.config_hash[:12]}); write to another folder"
            )
        return committed

    def _member(self, name: str, content: bytes) -> int:
        """Append a file to the tar; the position of its first byte."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o644
        self._archive.addfile(info, BytesIO(content))
        return self._file.count - _padded(len(content))

    def _discard(self) -> None:
        self._file.close()
        for name in (self.tar, self.index):
            (self.folder / (name + self._suffix)).unlink(missing_ok=True)


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
    path = _manifest_path(folder, group)
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
    return [_record(row) for row in pyarrow.parquet.read_table(path).to_pylist()]


def read_clip(folder: str | Path, record: ClipRecord) -> bytes:
    """The MP4 file of a clip: one read out of the tar.

    Raises:
        DataError: the shard is missing or shorter than its index says.
    """
    path = Path(folder) / record.shard
    try:
        with path.open("rb") as file:
            content = os.pread(file.fileno(), record.size, record.offset)
    except FileNotFoundError:
        raise DataError(f"clip {record.key}: its shard {path} is missing") from None
    if len(content) != record.size:
        raise DataError(
            f"clip {record.key}: {path} ended early ({len(content)} of {record.size} bytes at {record.offset}); curate again"
        )
    return content


def assign_split(folder: Path, entry: Entry, source_id: str, split: str) -> Entry:
    """Move the clips of a source to `split`; the entry that replaces `entry`.

    The index gets a new name, so that the old entry stays whole until the new one takes its place.
    """
    records = [replace(r, split=split) if r.source_id == source_id else r for r in read_index(folder, entry)]
    name = f"index/shard-{entry.group}-{source_id[:12]}-{split}.parquet"
    sha256 = _write_index(Path(folder) / name, records)
    updated = replace(entry, index=name, index_sha256=sha256, num_clips=_count_splits(records))
    _publish(_manifest_path(Path(folder), entry.group), updated, overwrite=True)
    (Path(folder) / entry.index).unlink(missing_ok=True)
    return updated


def _write_index(path: Path, records: Sequence[ClipRecord]) -> str:
    """Write an index and flush it to disk; its SHA-256."""
    names = sorted({name for record in records for name in record.scores})
    columns = {name: pyarrow.array([getattr(r, name) for r in records], kind) for name, kind in _COLUMNS.items()}
    scores = {_SCORE + name: pyarrow.array([r.scores.get(name) for r in records], pyarrow.float64()) for name in names}
    pyarrow.parquet.write_table(pyarrow.table({**columns, **scores}), path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256_of(path)


def _record(row: dict[str, Any]) -> ClipRecord:
    scores = {name.removeprefix(_SCORE): value for name, value in row.items() if name.startswith(_SCORE) and value is not None}
    return ClipRecord(**{name: row[name] for name in _COLUMNS}, scores=scores)


def _count_splits(records: Sequence[ClipRecord]) -> dict[str, int]:
    return {split: sum(record.split == split for record in records) for split in SPLITS}


def _manifest_path(folder: Path, group: str) -> Path:
    return Path(folder) / "manifest" / f"shard-{group}.json"


def _publish(path: Path, entry: Entry, overwrite: bool = False) -> None:
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


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
