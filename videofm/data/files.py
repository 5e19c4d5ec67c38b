"""Writing shards so that they survive a crash: hashed while written, locked while they are put in place."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class HashingFile:
    """A file to write that counts and hashes what passes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.count, self.hash = file, 0, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.hash.update(content)
        self.count += len(content)
        return self.file.write(content)

    def tell(self) -> int:
        return self.count

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold an advisory lock on `path`, so that a late writer does not replace a committed tar. Freed also by a crash."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    path.unlink(missing_ok=True)
