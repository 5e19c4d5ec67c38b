"""What durable files need: a hash of the content, a flush that outlives a crash, and a look at what another machine wrote."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path


def sha256_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file's content, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def look_into(folder: Path) -> None:
    """Have a network file system ask its server what is in a folder, before names in it are asked for.

    NFS remembers for up to a minute that a name was absent, unless the folder is opened meanwhile. One entry is read, so that a
    folder of thousands costs no more than an empty one. One that is absent, or does not answer, is told by whoever reads it.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        next(entries, None)
