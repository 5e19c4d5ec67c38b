"""`videofm data verify`: read everything a manifest promises and name all that is not so."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from videofm.data import storage
from videofm.data.index import ClipRecord, read_records
from videofm.data.manifest import Entry, count_splits, read_entry
from videofm.data.tar import TarDamage, scan_tar
from videofm.errors import DataError, MissingError, TransientError
from videofm.files import sha256_of


@dataclass(frozen=True)
class Damage:
    """Something that is not as promised: the file, relative to the dataset, the clip where it is about one, and what."""

    file: str
    clip: str | None
    detail: str


@dataclass
class Verification:
    """What was read, and what was wrong with it."""

    num_shards: int = 0
    num_clips: int = 0
    num_bytes: int = 0
    damage: list[Damage] = field(default_factory=list)


def verify(place: str | Path) -> Verification:
    """Check the dataset in a folder or under a URL: every entry, tar, index and clip. Reads all of it.

    Raises:
        DataError: there is no manifest.
        TransientError: a store did not answer.
    """
    names = _entry_names(place)
    if not names:
        raise DataError(f"{storage.redacted(place)} has no committed shard (no manifest/shard-*.json); is it a dataset?")
    found, hashes = Verification(), set[str]()
    for name in names:
        file = f"manifest/{name}"
        found.num_shards += 1
        try:
            # It reads URLs, too.
            entry = read_entry(cast(Path, place), name.removeprefix("shard-").removesuffix(".json"))
        except TransientError:
            raise
        except (DataError, ValueError) as error:
            found.damage.append(Damage(file, None, f"it cannot be read: {error}"))
            continue
        if name != f"shard-{entry.group}.json":
            found.damage.append(Damage(file, None, f"it is the entry of group {entry.group!r}"))
        if entry.config_hash not in hashes and hashes:
            found.damage.append(Damage(file, None, f"made with another config ({entry.config_hash[:20]}) than those before"))
        hashes.add(entry.config_hash)
        _check_shard(place, entry, found)
    return found


def _entry_names(place: str | Path) -> list[str]:
    try:
        names = [stored.name for stored in storage.list_files(storage.join(place, "manifest"))]
    except MissingError:
        return []
    return sorted(name for name in names if name.startswith("shard-") and name.endswith(".json"))


def _check_shard(place: str | Path, entry: Entry, found: Verification) -> None:
    records = None
    with _local_copy(place, entry.index, found) as index:
        if index is not None and _check_sha256(index, entry.index, entry.index_sha256, found):
            try:
                records = read_records(index)
            except (DataError, KeyError, TypeError) as error:
                found.damage.append(Damage(entry.index, None, f"it does not read as an index: {error}"))
    if records is not None and count_splits(records) != entry.num_clips:
        found.damage.append(
            Damage(entry.index, None, f"it has {count_splits(records)} clips, the entry says {entry.num_clips}")
        )
    with _local_copy(place, entry.tar, found) as tar:
        if tar is None:
            return
        found.num_bytes += tar.stat().st_size
        _check_sha256(tar, entry.tar, entry.sha256, found)
        _check_clips(tar, entry, records or [], found)


def _check_clips(tar: Path, entry: Entry, records: list[ClipRecord], found: Verification) -> None:
    """Each clip by itself, so that one damaged byte tells which clip it hit; the tar's own structure tells the rest."""
    members: set[tuple[int, int]] | None = None
    try:
        members = {(member.offset, member.size) for member in scan_tar(tar).members}
    except TarDamage as damage:
        found.damage.append(Damage(entry.tar, None, f"{damage.reason}: {damage.detail}"))
    seen: set[str] = set()
    with tar.open("rb") as file:
        for record in records:
            found.num_clips += 1
            content = os.pread(file.fileno(), record.size, record.offset)
            problem = None
            if record.key in seen:
                problem = "its key occurs twice"
            elif record.shard != entry.tar:
                problem = f"the index says that it lies in {record.shard}"
            elif len(content) != record.size:
                problem = f"{len(content)} of its {record.size} bytes are there"
            elif (sha256 := hashlib.sha256(content).hexdigest()) != record.sha256:
                problem = f"SHA-256 expected {record.sha256}, found {sha256}"
            elif members is not None and (record.offset, record.size) not in members:
                problem = f"bytes {record.offset} to {record.offset + record.size} are no member of the tar"
            seen.add(record.key)
            if problem is not None:
                found.damage.append(Damage(entry.tar, record.key, problem))


@contextmanager
def _local_copy(place: str | Path, name: str, found: Verification) -> Iterator[Path | None]:
    """A file of the dataset on this machine; None, and told, where it is missing."""
    path = storage.local_path(storage.join(place, name))
    if path is not None:
        if not path.is_file():
            found.damage.append(Damage(name, None, "it is in the manifest but missing"))
        yield path if path.is_file() else None
        return
    with tempfile.TemporaryDirectory(prefix="videofm-verify-") as folder:
        copy: Path | None = Path(folder) / "file"
        try:
            storage.fetch(storage.join(place, name), Path(folder) / "file")
        except MissingError:
            found.damage.append(Damage(name, None, "it is in the manifest but missing"))
            copy = None
        yield copy


def _check_sha256(path: Path, name: str, expected: str, found: Verification) -> bool:
    sha256 = sha256_of(path)
    if sha256 != expected:
        found.damage.append(Damage(name, None, f"SHA-256 expected {expected}, found {sha256}"))
    return sha256 == expected


def as_text(found: Verification, place: str | Path) -> str:
    """The result for people."""
    size = f"{found.num_shards:,} shards, {found.num_clips:,} clips, {found.num_bytes / 2**30:.3f} GiB"
    read = f"{size} of {storage.redacted(place)}"
    if not found.damage:
        return f"{read}: all as the manifest says"
    lines = [f"  {item.file}{': clip ' + item.clip if item.clip else ''}: {item.detail}" for item in found.damage]
    return "\n".join([f"{read}: {len(found.damage):,} problems", *lines])
