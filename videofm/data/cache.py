"""Copies of remote shards on this node, shared by all processes on it: one download a shard, the least recently used make room.

```
HEX.tar, HEX.parquet       whole files, named by their SHA-256; a name is there only once the content was checked
HEX.tar.lock               held while a process downloads; its content is the size that will be needed
.HEX.tar.part-*            what was downloaded so far; left behind by a crash, and removed by the next who makes room
```

A copy is an aid, never a need: where the disk is full, the limit too small for what is in use, or another process is still
downloading, the answer is None and the caller reads its clip from the store. Files are held by a shared lock while they are
read.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from videofm.data import storage
from videofm.errors import ConfigError, DataError, MissingError, TransientError

KEEP_SECONDS = 600.0
"""A file used so recently stays. When what is in use is larger than the limit, the rest is read from the store: to throw out
shards that are about to be read again would fetch each of them for every clip."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ShardCache:
    """The copies in one folder.

    Attributes:
        counts: what happened in this process, by name: `hit`, `download`, and why a clip was read from the store: `busy`
            (another process downloads), `no_room` (the limit), `disk_full`, `damaged` (the shard has another SHA-256).
    """

    def __init__(self, folder: str | Path, max_bytes: int, timeout: float = storage.TIMEOUT) -> None:
        """
        Raises:
            ConfigError: the folder cannot be made.
        """
        self.folder, self.max_bytes, self.timeout = Path(folder), max_bytes, timeout
        self.counts: Counter[str] = Counter()
        self._damaged: set[str] = set()
        self._full_until = 0.0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the folder for copies of shards {folder} cannot be made ({error.strerror}); set cache_dir"
            ) from None

    def read(self, place: str, sha256: str, num_bytes: int, offset: int, size: int) -> bytes | None:
        """Bytes of a remote file, from its copy, which is made if need be; None where there is none.

        Args:
            place: the file.
            sha256: of the whole file (hex).
            num_bytes: its length.
            offset: first byte.
            size: how many.

        Raises:
            MissingError, TransientError: the store has no such file, or does not answer.
        """
        path = self._path(place, sha256)
        if (found := _read_locked(path, offset, size)) is not None:
            self.counts["hit"] += 1
            return found
        refused = self._refusal(sha256) or self._download(place, path, sha256, num_bytes)
        if refused is not None:
            self.counts[refused] += 1
            return None
        self.counts["download"] += 1
        return _read_locked(path, offset, size)

    def fetch(self, place: str, sha256: str) -> Path:
        """A small remote file (an index) as a local one, which stays for at least `KEEP_SECONDS`.

        Raises:
            DataError: it is missing or has another SHA-256, or this node's disk is full.
        """
        path = self._path(place, sha256)
        if not _touch(path):
            try:
                with self._alone(path.name, 0, wait=True):
                    if not path.exists():
                        storage.fetch(place, path, sha256, timeout=self.timeout)
            except OSError as error:
                if error.errno not in FULL:
                    raise
                raise DataError(
                    f"the disk of {self.folder} is full: {storage.redacted(place)} does not fit; free some space, or set "
                    "data.reading.cache_dir to another disk"
                ) from None
        return path

    def _path(self, place: str, sha256: str) -> Path:
        # Named by content: a dataset that is curated anew under the same address shares nothing with the old one.
        return self.folder / f"{sha256}{PurePosixPath(place.partition('?')[0]).suffix}"

    def _refusal(self, sha256: str) -> str | None:
        if sha256 in self._damaged:
            return "damaged"
        return "disk_full" if time.monotonic() < self._full_until else None

    def _download(self, place: str, path: Path, sha256: str, num_bytes: int) -> str | None:
        """Make a copy; None when it is there, else why it is not."""
        with self._alone(path.name, num_bytes, wait=False) as alone:
            if not alone:
                return "busy"
            if path.exists():  # another process was done between our look and our lock
                return None
            if num_bytes > self.max_bytes or not self._make_room():
                return "no_room"
            try:
                storage.fetch(place, path, sha256, timeout=self.timeout)
            except (MissingError, TransientError):
                raise
            except DataError:
                self._damaged.add(sha256)  # the clips in it have hashes of their own: most may be whole
                return "damaged"
            except OSError as error:
                if error.errno not in FULL:
                    raise
                self._full_until = time.monotonic() + 60
                return "disk_full"
        return None

    def _make_room(self) -> bool:
        """Remove what was not used for longest until files and downloads in progress fit; whether they do."""
        with _locked(self.folder / "evict.lock", wait=True):
            self._remove_leftovers()
            reserved = sum(map(_reserved, self.folder.glob("*.lock")))
            files = sorted((found.st_mtime, path, found.st_size) for path, found in _stats(self.folder))
            excess = reserved + sum(size for _, _, size in files) - self.max_bytes
            for used, path, size in files:
                if excess <= 0:
                    break
                if time.time() - used > KEEP_SECONDS and _remove_unless_read(path):
                    excess -= size
            return excess <= 0

    def _remove_leftovers(self) -> None:
        """Parts and locks of processes that died."""
        for lock in self.folder.glob("*.lock"):
            if lock.name == "evict.lock":
                continue
            with _locked(lock, wait=False, create=False) as free:
                if free:
                    lock.unlink(missing_ok=True)
        for part in self.folder.glob(".*.part-*"):
            owner = self.folder / (part.name[1:].partition(".part-")[0] + ".lock")
            if not owner.exists():
                part.unlink(missing_ok=True)

    @contextmanager
    def _alone(self, name: str, num_bytes: int, wait: bool) -> Iterator[bool]:
        """Hold the lock under which a file is downloaded; whether it was free."""
        path = self.folder / f"{name}.lock"
        with _locked(path, wait=wait) as held:
            if not held:
                yield False
                return
            try:
                path.write_text(str(num_bytes))
                yield True
            finally:
                path.unlink(missing_ok=True)


def _reserved(lock: Path) -> int:
    """Bytes that a download in progress will need."""
    try:
        return int(lock.read_text() or 0)
    except FileNotFoundError:
        return 0


def _stats(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for item in os.scandir(folder):
        if item.name.startswith(".") or item.name.endswith(".lock"):
            continue
        try:
            yield Path(item.path), item.stat()
        except FileNotFoundError:
            continue


@contextmanager
def _locked(path: Path, wait: bool, create: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a file, which others may remove; whether it was got. Freed also by a crash."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
        except FileNotFoundError:
            yield False
            return
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            try:
                current = os.stat(path).st_ino == os.fstat(descriptor).st_ino
            except FileNotFoundError:
                current = False
            if current:
                yield True
                return
        finally:
            os.close(descriptor)


def _read_locked(path: Path, offset: int, size: int) -> bytes | None:
    """Bytes of a copy; None where there is none."""
    try:
        with path.open("rb", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(file.fileno())
            return os.pread(file.fileno(), size, offset)
    except FileNotFoundError:
        return None


def _touch(path: Path) -> bool:
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _remove_unless_read(path: Path) -> bool:
    with _locked(path, wait=False, create=False) as free:
        if free:
            path.unlink(missing_ok=True)
        return free
