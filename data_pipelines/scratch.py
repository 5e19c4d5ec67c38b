"""Folders for what does not outlive a process, named `KIND-HERE-PID-RANDOM`, so that what a killed process left is found.

HERE stands for the machine and the container: a folder may be shared with others, whose process ids say nothing here.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RAY, CLIPS = "vfm-ray", "videofm-clips"


def here() -> str:
    """Four digits for this machine and its namespace of process ids; no more, since paths of Ray's sockets must be short."""
    return hashlib.sha256(f"{os.uname().nodename} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:4]


@contextmanager
def scratch_folder(kind: str, parent: Path) -> Iterator[Path]:
    """An empty folder in `parent` that is removed at the end; those that dead processes left there go first."""
    remove_stale(kind, parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-{here()}-{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale(kind: str, parent: Path) -> list[str]:
    """Remove the folders of `kind` in `parent` whose process ran here and is not alive; their names."""
    pattern = re.compile(rf"{re.escape(kind)}-{here()}-([0-9]+)-[A-Za-z0-9_]+")
    removed = []
    for folder in parent.glob(f"{kind}-{here()}-*"):
        named = pattern.fullmatch(folder.name)
        if named and folder.is_dir() and not folder.is_symlink() and not _is_alive(int(named[1])):
            shutil.rmtree(folder, ignore_errors=True)  # another process may be removing it, too
            removed.append(folder.name)
    return removed


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True  # somebody else's, or no process id at all: not ours to judge
    return True
