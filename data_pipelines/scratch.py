"""Folders for what does not outlive a process, named `KIND-PID-RANDOM`, so that what a killed process left is found."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RAY, CLIPS = "vfm-ray", "videofm-clips"


@contextmanager
def scratch_folder(kind: str, parent: Path) -> Iterator[Path]:
    """An empty folder in `parent` that is removed at the end; those that dead processes left there go first."""
    remove_stale(kind, parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale(kind: str, parent: Path) -> list[str]:
    """Remove the folders of `kind` in `parent` whose process is not alive; their names."""
    pattern = re.compile(rf"{re.escape(kind)}-([0-9]+)-[A-Za-z0-9_]+")
    removed = []
    for folder in parent.glob(f"{kind}-*"):
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
