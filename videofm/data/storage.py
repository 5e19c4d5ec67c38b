"""Files in folders and object stores, by one set of functions. A place is a local path or a `file|http|https|s3|gs|memory` URL.

Each request has a time limit. Faults that pass (no answer, a broken connection, HTTP 429 or 5xx) are tried again with growing
pauses, then raised as `TransientError`: they say nothing about the data. Passwords and signatures in URLs reach no message.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit
from urllib.request import url2pathname

from videofm.data import hosts, remote
from videofm.errors import ConfigError, DataError, MissingError, TransientError
from videofm.files import sync

Place = str | os.PathLike[str]
Result = TypeVar("Result")

TIMEOUT = 30.0
"""Seconds that a request waits for the other side, to connect or for more bytes."""

NUM_RETRIES = 5
FIRST_PAUSE = 0.5
"""Seconds before the first retry; each later pause is twice as long, and all are drawn from its upper half."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}


@dataclass(frozen=True)
class StoredFile:
    """A file under a place: `name` relative to it, its own `place`, its bytes (None where the store does not say)."""

    name: str
    place: str
    num_bytes: int | None


def read_bytes(place: Place, offset: int | None = None, size: int | None = None, *, timeout: float = TIMEOUT) -> bytes:
    """The bytes of a file, or `size` of them from `offset` on; fewer where it ends before.

    Raises:
        MissingError: there is no such file.
        TransientError: the store did not answer, after retries.
        DataError: the store refused, or it cannot be read.
    """
    if (path := _local(place)) is not None:
        return _try(place, lambda: _read_local(path, offset, size))
    store = _store(place, timeout)
    return _try(place, lambda: store.read(str(place), offset, size))


def fetch(
    place: Place,
    path: str | Path,
    sha256: str | None = None,
    *,
    timeout: float = TIMEOUT,
    max_bytes: int | None = None,
    seconds: float | None = None,
    named_by: str | None = None,
) -> None:
    """Copy a file to the local `path`, which appears whole or not at all.

    Args:
        place: what to copy.
        path: where to; its folder exists.
        sha256: what the content must hash to (hex); None checks nothing.
        timeout: seconds that each wait for the store may take.
        max_bytes: the most bytes that the content may have; None: any number.
        seconds: the most seconds that all of it may take; None: any time, as long as bytes come.
        named_by: where a place comes from that the user did not write: only public hosts are asked for it, and those that this
            list or folder vouches for (see `hosts.py`). None asks any host.

    Raises:
        DataError: the content has another hash, or more than `max_bytes`; it took more than `seconds`; its host is not public.
            And as `read_bytes`.
        OSError: the local disk is full or cannot be written.
    """
    path = Path(path)
    deadline = None if seconds is None else time.monotonic() + seconds
    temporary = path.with_name(f".{path.name}.part-{os.getpid()}-{os.urandom(4).hex()}")
    if (source := _local(place)) is not None:
        content = partial(_chunks, source)
    else:
        content = partial(_store(place, timeout, named_by).chunks, str(place))
    try:
        found = _try(place, lambda: _copy(_bounded(place, content(), max_bytes, deadline), temporary))
        if sha256 is not None and found != sha256:
            raise DataError(
                f"{redacted(place)} is damaged: SHA-256 expected {sha256}, found {found}; restore it or make it again"
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def list_files(place: Place, *, timeout: float = TIMEOUT) -> Iterator[StoredFile]:
    """All files under a folder, however deep, one folder at a time and by name within each. Links to folders are not followed.

    Raises:
        MissingError: there is no such folder.
        TransientError, DataError: as `read_bytes`.
    """
    if (path := _local(place)) is not None:
        yield from _list_local(path, path)
        return
    store, base = _store(place, timeout), str(place).rstrip("/")
    waiting = [base]
    while waiting:
        folder = waiting.pop()
        folders = []
        for found, is_folder, num_bytes in sorted(_try(folder, partial(store.list, folder))):
            name = found.removeprefix(base + "/")
            if not found.startswith(folder + "/") or ".." in PurePosixPath(name).parts:
                continue  # a page of links may point anywhere
            if is_folder:
                folders.append(found)
            elif found != folder:
                yield StoredFile(name, found, num_bytes)
        waiting += reversed(folders)


def put_new(place: Place, content: bytes, *, timeout: float = TIMEOUT) -> bool:
    """Write a file if there is none, whole and in one step, so that of several writers one wins; whether this one did.

    Raises:
        TransientError, DataError: as `read_bytes`.
    """
    if (path := _local(place)) is not None:
        return _try(place, lambda: _create_local(path, content))
    store, tries = _store(place, timeout), 0

    def create() -> bool:
        nonlocal tries
        tries += 1
        # A try whose answer was lost may have written: what is there then is ours if it has our content.
        return store.create(str(place), content) or (tries > 1 and store.read(str(place), None, None) == content)

    return _try(place, create)


def put_file(path: str | Path, place: Place, *, timeout: float = TIMEOUT) -> None:
    """Copy a local file to a place, in whose stead it appears whole or not at all.

    Raises:
        TransientError, DataError: as `read_bytes`.
    """
    if (target := _local(place)) is not None:
        temporary = target.with_name(f".{target.name}.part-{os.getpid()}-{os.urandom(4).hex()}")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(path, temporary)
            sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
        return
    store = _store(place, timeout)
    _try(place, lambda: store.write(Path(path), str(place)))


def exists(place: Place, *, timeout: float = TIMEOUT, named_by: str | None = None) -> bool:
    """Whether there is a file. A store that does not answer is no "no". `named_by` is as in `fetch`.

    Raises:
        TransientError, DataError: as `read_bytes`.
    """
    if (path := _local(place)) is not None:
        return path.exists()
    store = _store(place, timeout, named_by)
    try:
        _try(place, lambda: store.size(str(place)))
    except MissingError:
        return False
    return True


def join(place: Place, name: str) -> str:
    """The place of the file `name` under a folder.

    Raises:
        DataError: the name leads out of the folder.
    """
    if name.startswith("/") or ".." in PurePosixPath(name).parts or _SCHEME.match(name):
        raise DataError(f"the file name {name!r} leads out of its folder {redacted(place)}; names are relative, without `..`")
    if (path := _local(place)) is not None:
        return str(path / name)
    parts = urlsplit(str(place))
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def is_local(place: Place) -> bool:
    """Whether a place is on a file system of this machine.

    Raises:
        ConfigError: it is no place that can be read.
    """
    return _local(place) is not None


def local_path(place: Place) -> Path | None:
    """The path of a local place; None for one that is elsewhere.

    Raises:
        ConfigError: it is no place that can be read.
    """
    return _local(place)


def redacted(place: Place) -> str:
    """A place as messages show it: without user, password and query, where keys and signatures are."""
    match = _SCHEME.match(str(place))
    if match is None:
        return str(place)
    if "://" not in str(place):
        return f"{match[1]}:..."  # what follows may be a command or the data itself
    parts = urlsplit(str(place))
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}{'?...' if parts.query else ''}"


def _local(place: Place) -> Path | None:
    if isinstance(place, os.PathLike):
        return Path(place)
    match = _SCHEME.match(place)
    if match is None:
        return Path(place)
    scheme = match[1].lower()
    if scheme == "file" and place[5:7] == "//":
        return Path(url2pathname(urlsplit(place).path))
    if scheme not in remote.SCHEMES or place[len(scheme) : len(scheme) + 3] != "://" or "::" in place:
        known = ", ".join(f"{name}://" for name in ("file", *remote.SCHEMES))
        raise ConfigError(
            f"{redacted(place)!r} is no place for data: only local paths and {known} are read (a local name with a colon is "
            "written ./NAME), no pipes and no chains"
        )
    return None


@cache
def _open_store(scheme: str, timeout: float, private: frozenset[str] | None) -> remote.Store:
    return remote.open_store(scheme, timeout, private)


def _store(place: Place, timeout: float, named_by: str | None = None) -> remote.Store:
    scheme, private = urlsplit(str(place)).scheme.lower(), None
    if named_by is not None and scheme in ("http", "https"):
        private = hosts.private_addresses(str(place), named_by)
    try:
        return _open_store("http" if scheme == "https" else scheme, timeout, private)
    except ImportError:
        package = _PACKAGES.get(scheme, scheme)
        raise ConfigError(f"{redacted(place)} needs the package {package}; install it with `pip install {package}`") from None


def _try(place: Place, action: Callable[[], Result]) -> Result:
    """The result of `action`, which is repeated while it fails for reasons that may pass."""
    for attempt in range(NUM_RETRIES + 1):
        try:
            return action()
        except (DataError, ConfigError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
                raise  # this machine's disk, not the store
            if remote.is_missing(error):
                raise MissingError(f"{redacted(place)} does not exist; restore it, or correct the name") from None
            if not remote.is_transient(error):
                raise DataError(f"{redacted(place)} cannot be used: {remote.reason(error)}") from None
            if attempt == NUM_RETRIES:
                raise TransientError(
                    f"{redacted(place)} could not be reached: {remote.reason(error)}, {NUM_RETRIES + 1} times in a row; see "
                    "that the store and the network to it work, then run again"
                ) from None
            time.sleep(FIRST_PAUSE * 2**attempt * random.uniform(0.5, 1.0))
    raise AssertionError("the loop returns or raises")


def _read_local(path: Path, offset: int | None, size: int | None) -> bytes:
    with path.open("rb", buffering=0) as file:
        if offset:
            file.seek(offset)
        if size is None:
            return file.readall() or b""
        parts, missing = [], size  # one read gives at most 2 GiB, and less on some file systems
        while missing and (part := file.read(missing)):
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _bounded(place: Place, chunks: Iterator[bytes], max_bytes: int | None, deadline: float | None) -> Iterator[bytes]:
    """The chunks, while they are within the limits.

    Raises:
        DataError: they are no longer.
    """
    num_bytes = 0
    for chunk in chunks:
        num_bytes += len(chunk)
        if max_bytes is not None and num_bytes > max_bytes:
            raise DataError(f"{redacted(place)} has more than {max_bytes} bytes, the most that are copied")
        if deadline is not None and time.monotonic() > deadline:
            raise DataError(f"{redacted(place)} comes too slowly: the time for its copy is over after {num_bytes} bytes")
        yield chunk


def _copy(chunks: Iterator[bytes], target: Path) -> str:
    """Write a file; the SHA-256 of its content."""
    sha256 = hashlib.sha256()
    with target.open("wb") as file:
        for chunk in chunks:
            sha256.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return sha256.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            yield chunk


def _list_local(base: Path, folder: Path) -> Iterator[StoredFile]:
    folders = []
    for item in sorted(_try(folder, lambda: list(os.scandir(folder))), key=lambda item: item.name):
        if item.is_dir(follow_symlinks=False):
            folders.append(Path(item.path))
        elif item.is_file():
            yield StoredFile(Path(item.path).relative_to(base).as_posix(), item.path, item.stat().st_size)
    for inner in folders:
        yield from _list_local(base, inner)


def _create_local(path: Path, content: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # fails where the name is taken
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)
    return True
