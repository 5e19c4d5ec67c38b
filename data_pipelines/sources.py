"""Finding sources: a folder (local or URL) or a list of them -> `sources/GROUP.jsonl`, in constant memory.

A source belongs to the group that the first digits of its id name; the number of groups follows from the number of sources and
is fixed by the first run (`sources/groups.json`). Listing is a pure function of what lies at the source, so every run lists
again: a group whose sources changed since it was committed is found by its hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.parquet

from data_pipelines.rows import Row
from data_pipelines.spill import Spill, sorted_values
from videofm.data import storage
from videofm.errors import ConfigError, DataError
from videofm.run_dir import read_json, write_json

VIDEO_SUFFIXES = frozenset(
    f".{ending}"
    for ending in (
        "mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "m2ts", "mts", "flv", "wmv", "asf", "ogv", "3gp", "ivf",
        "h264", "hevc", "m4a",
    )
)  # fmt: skip
SIDECAR_SUFFIXES = frozenset([".txt", ".json", ".jsonl", ".srt", ".vtt"])
LIST_SUFFIXES = frozenset([".jsonl", ".parquet"])
LIST_FIELDS = {"uri": str, "source_id": str, "bytes": int, "sha256": str, "caption": str}
_ROWS_AT_ONCE = 1024
_HEX = 2**32


@dataclass(frozen=True)
class Group:
    """A group of sources: its name, how many it has, and SHA-256 of their facts, without the place where they lie."""

    name: str
    num_sources: int
    hash: str


@dataclass(frozen=True)
class Found:
    """What listing found; `num_ignored` files of a folder were neither video nor sidecar."""

    groups: list[Group]
    num_sources: int
    num_ignored: int


def find_sources(source: str, run_folder: Path, group_size: int) -> Found:
    """List the sources of `source` and write `sources/GROUP.jsonl`, each sorted by source id.

    Raises:
        DataError: there is no such folder or list, it holds no video, or a line of the list is wrong or names a source twice.
        ConfigError: the run directory lies in the source folder, so that a second run would read what the first one wrote.
    """
    folder = storage.local_path(source)
    if folder is not None and run_folder.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"the run directory {run_folder} lies in the source folder {source}; choose another run directory")
    spilled = run_folder / "sources" / f".spill-{os.getpid()}"
    num_sources, num_ignored = 0, 0
    with Spill(spilled) as spill:
        for row in _rows(source, run_folder):
            if row is None:
                num_ignored += 1
                continue
            spill.add(row.source_id, row.to_json())
            num_sources += 1
    if not num_sources:
        endings = " ".join(sorted(VIDEO_SUFFIXES))
        shown = storage.redacted(source)
        raise DataError(f"{shown} holds no video file (looked for {endings}); {num_ignored} other files lie there")
    groups = _write_groups(run_folder, spilled, _num_groups(run_folder, num_sources, group_size))
    return Found(groups, num_sources, num_ignored)


def check_source(source: str) -> None:
    """See that a local folder or list is there; of one elsewhere, that its address is of a form that is read.

    Raises:
        DataError: it is missing.
        ConfigError: it is of no such form.
    """
    path = storage.local_path(source)
    if path is None or (path.is_file() if is_list(source) else path.is_dir()):
        return
    kind, wanted = ("list of sources", "file") if is_list(source) else ("source folder", "folder")
    what = f"is no {wanted}" if path.exists() else "does not exist"
    raise DataError(
        f"the {kind} {source} {what}; set `source` to a folder of videos, or to a list of them (the current directory is "
        f"{Path.cwd()})"
    )


def is_list(source: str) -> bool:
    """Whether `source` is a list of sources by its form."""
    return _suffix(source) in LIST_SUFFIXES


def _suffix(place: str) -> str:
    return PurePosixPath(place.partition("?")[0]).suffix.lower()


def source_rows(run_folder: Path, group: str) -> list[Row]:
    """The sources of a group, sorted by id."""
    with (run_folder / "sources" / f"{group}.jsonl").open(encoding="utf-8") as lines:
        return [Row.from_json(json.loads(line)) for line in lines]


def source_id_of(name: str) -> str:
    """The id of the source of that name. Bytes of a file name that are no UTF-8 count as they are."""
    return hashlib.sha256(unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _num_groups(run_folder: Path, num_sources: int, group_size: int) -> int:
    """The number of groups: what the first run fixed, else as many as give groups of `group_size` on average."""
    path = run_folder / "sources" / "groups.json"
    if path.exists() and (fixed := read_json(path))["group_size"] == group_size:
        return int(fixed["num_groups"])
    count = -(-num_sources // group_size)
    write_json(path, {"num_groups": count, "num_sources": num_sources, "group_size": group_size})
    return count


def _write_groups(run_folder: Path, spilled: Path, num_groups: int) -> list[Group]:
    """Write the files of groups, one after the other: ids ascend, so groups do."""
    groups: list[Group] = []
    width = max(5, len(str(num_groups - 1)))
    writer: _GroupWriter | None = None
    last = ""
    for source_id, value in sorted_values(spilled):
        if source_id == last:
            raise DataError(f"the source {value['name']!r} is listed twice; each needs a source_id (or uri) of its own")
        last = source_id
        name = f"{int(source_id[:8], 16) * num_groups // _HEX:0{width}d}"
        if writer is None or writer.name != name:
            groups += [writer.close()] if writer else []
            writer = _GroupWriter(run_folder, name)
        writer.add(value)
    assert writer is not None
    return [*groups, writer.close()]


class _GroupWriter:
    """Writes the sources of a group. Only the owner may read the file: an address in it may be signed."""

    def __init__(self, run_folder: Path, name: str) -> None:
        self.name, self.path = name, run_folder / "sources" / f"{name}.jsonl"
        self.temporary = self.path.with_suffix(f".tmp-{os.getpid()}")
        descriptor = os.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self.file, self.hash, self.count = os.fdopen(descriptor, "w", encoding="utf-8"), hashlib.sha256(), 0

    def add(self, value: dict[str, Any]) -> None:
        self.file.write(json.dumps(value, sort_keys=True) + "\n")
        self.hash.update(json.dumps({**value, "path": ""}, sort_keys=True).encode() + b"\n")
        self.count += 1

    def close(self) -> Group:
        self.file.close()
        os.replace(self.temporary, self.path)
        return Group(self.name, self.count, self.hash.hexdigest())


def _rows(source: str, run_folder: Path) -> Iterator[Row | None]:
    """The sources of a folder or list, as they come; None for a file that is neither video nor sidecar."""
    check_source(source)
    if is_list(source):
        path = storage.local_path(source)
        if path is None:
            path = run_folder / "sources" / f"list{_suffix(source)}"
            _fetch_list(source, path)
        for number, entry in enumerate(_entries(path), start=1):
            yield _listed(source, number, entry)
        return
    for file in storage.list_files(source):
        suffix = PurePosixPath(file.name).suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            path = storage.local_path(file.place)
            # Links stay: the sidecars lie beside the link, not beside the blob that it names.
            place = file.place if path is None else str(path.absolute())
            name = file.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            yield Row(source_id_of(file.name), name, place, file.num_bytes or 0)
        elif suffix not in SIDECAR_SUFFIXES:
            yield None


def _fetch_list(source: str, path: Path) -> None:
    """Copy a list to `path`. Only the owner may read it, nor what is there of it before: an address in it may be signed."""
    with tempfile.TemporaryDirectory(dir=path.parent) as private:
        copied = Path(private) / path.name
        storage.fetch(source, copied)
        copied.chmod(0o600)
        os.replace(copied, path)


def _entries(path: Path) -> Iterator[Any]:
    """The entries of a list, a bounded number at once."""
    if path.suffix.lower() == ".jsonl":
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _parsed(path, number, line)
        return
    try:
        table = pyarrow.parquet.ParquetFile(path)
        for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE):
            yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"the list {path} has a text that is not UTF-8: {error.reason}") from None
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"the list {path} is no Parquet file: {error}") from None


def _parsed(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DataError(f"line {number} of the list {path} is not JSON: {error}") from None


def _listed(source: str, number: int, entry: Any) -> Row:
    """The source that an entry of a list names."""
    where = f"entry {number} of the list {storage.redacted(source)}"
    if not isinstance(entry, dict) or not isinstance(entry.get("uri"), str):
        raise DataError(f"{where} has no `uri`; an entry is an object with uri, and where known {', '.join(LIST_FIELDS)}")
    known = {name: value for name, value in entry.items() if value is not None}
    for name, value in known.items():
        if name not in LIST_FIELDS:
            raise DataError(f"{where} has the unknown field {name!r}; fields are {', '.join(LIST_FIELDS)}")
        if not isinstance(value, LIST_FIELDS[name]) or isinstance(value, bool):
            raise DataError(f"{where}: {name} is {value!r}, it must be of type {LIST_FIELDS[name].__name__}")
        if isinstance(value, str) and ("\0" in value or any("\ud800" <= character <= "\udfff" for character in value)):
            raise DataError(f"{where}: {name} is {value!r}, which is no plain text; take out NUL and lone surrogates")
    uri = str(known["uri"])
    # The query of an address may be a signature, which changes while the file stays; it is no part of the name.
    try:
        path, name = storage.local_path(uri), storage.redacted(uri).partition("?")[0]
    except ValueError as error:
        raise DataError(f"{where}: uri is no address: {error}") from None
    listed_in = storage.local_path(source)
    if path is None:
        place = uri
    elif listed_in is not None:
        place = str((listed_in.parent / path).absolute())
    else:  # a list from elsewhere names no files of this machine
        place = storage.join(source.partition("?")[0].rpartition("/")[0], uri)
    identity = str(known.get("source_id", name))
    caption, sha256 = str(known.get("caption", "")), str(known.get("sha256", "")).lower()
    num_bytes = int(known.get("bytes", 0))
    return Row(source_id_of(identity), name, place, num_bytes, caption=caption, promised_sha256=sha256)
