"""`videofm data gc`: what writers that died left in a dataset. Readers never see it; it only takes space."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from videofm.data.manifest import Manifest, read_entries
from videofm.errors import ConfigError, DataError
from videofm.run_dir import read_json

_TEMPORARY = re.compile(r"\.(tmp|part)-[0-9]+-[0-9a-f]{8}$|^\..*\.tmp-[0-9]+")
_LOCK = re.compile(r"^\.shard-.*\.lock$")
_SIDECAR = re.compile(r"\.(latents|text)\.(tar|parquet|json)$")
"""Caches beside a shard have a manifest of their own; `videofm encode` looks after them."""


@dataclass(frozen=True)
class Garbage:
    """A file that nothing refers to: relative to the dataset, why, its bytes, and hours since it was written."""

    path: str
    reason: str
    num_bytes: int
    hours: float


def find_garbage(folder: Path, older_than: float = 24.0) -> list[Garbage]:
    """Files in `shards/`, `index/`, `manifest/` and `views/` that no entry needs and that are older than `older_than` hours.

    A writer puts its tar and index in place before the entry: what is young may be about to be committed. In a dataset of
    indexed shards of others (`videofm data index`) nothing in `shards/` is ours, so nothing in it is garbage.

    Raises:
        DataError: it is no dataset, or an entry cannot be read: then nobody knows what it refers to.
        ConfigError: a negative age.
    """
    if older_than < 0:
        raise ConfigError(f"an age of {older_than:g} hours; give 0 or more")
    folder = Path(folder)
    if not (folder / "manifest").is_dir():
        raise DataError(f"{folder} has no folder manifest; it is not a dataset, and nothing in it is looked at")
    # Listed before the entries are read: what is committed in between has its entry then.
    paths = [path for name in ("shards", "index", "manifest", "views") for path in sorted((folder / name).glob("*"))]
    entries = read_entries(folder)
    foreign = (folder / "indexing").is_dir() or any(entry.config_hash.startswith("foreign:") for entry in entries)
    needed = {name for entry in entries for name in (entry.tar, entry.index)}
    current = Manifest.load(folder).hash if entries else ""
    found, now = [], time.time()
    for path in paths:
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue  # its writer finished
        name = path.relative_to(folder).as_posix()
        skipped = path.is_dir() or name in needed or (foreign and name.startswith("shards/"))
        reason = None if skipped else _reason(path, current)
        hours = (now - status.st_mtime) / 3600
        if reason is not None and hours >= older_than:
            found.append(Garbage(name, reason, status.st_size, hours))
    return found


def delete(folder: Path, garbage: list[Garbage]) -> None:
    """Remove what `find_garbage` found."""
    for item in garbage:
        (Path(folder) / item.path).unlink(missing_ok=True)


def _reason(path: Path, manifest_hash: str) -> str | None:
    """Why a file that no entry names is garbage; None where it is not."""
    kind, name = path.parent.name, path.name
    if _TEMPORARY.search(name):
        return "left by a writer that died"
    if kind == "manifest" and _LOCK.match(name):
        return "a lock that nobody holds"
    if _SIDECAR.search(name):
        return None
    if kind == "shards" and name.startswith("shard-") and name.endswith(".tar"):
        return "a tar without an entry"
    if kind == "index" and name.startswith("shard-") and name.endswith(".parquet"):
        return "an index that no entry names"
    if kind == "views" and name.endswith(".json") and _manifest_of(path) not in (None, manifest_hash):
        return "thresholds of a view for an older manifest"
    return None


def _manifest_of(path: Path) -> str | None:
    try:
        value = read_json(path)
    except (DataError, ValueError, OSError):
        return None
    found = value.get("manifest") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None


def as_text(garbage: list[Garbage], deleted: bool) -> str:
    """The list for people."""
    lines = [f"  {item.path}  {item.num_bytes:,} bytes, {item.hours:.1f} h old: {item.reason}" for item in garbage]
    total = f"{len(garbage):,} files, {sum(item.num_bytes for item in garbage) / 2**30:.3f} GiB"
    if not garbage:
        return "nothing to collect"
    return "\n".join([*lines, f"{total} deleted" if deleted else f"{total}; nothing was deleted, `--delete` does it"])
