"""A file system that behaves as NFS does where tests must not take it for granted that a file is seen once it is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


def remember_absence(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """From here on, a name that was asked for in vain stays absent until its folder is opened; the names, as they change."""
    absent: set[str] = set()
    stat = os.stat

    def remembering(path: Any, *more: Any, **options: Any) -> os.stat_result:
        name = str(path)
        try:
            if name in absent:
                raise FileNotFoundError(2, "No such file or directory (so it was when last asked)", name)
            return stat(path, *more, **options)
        except FileNotFoundError:
            absent.add(name)
            raise

    def forgetting(opens: Any) -> Any:
        def opened(folder: Any = ".") -> Any:
            absent.difference_update([name for name in absent if Path(name).parent == Path(str(folder))])
            return opens(folder)

        return opened

    monkeypatch.setattr(os, "stat", remembering)
    monkeypatch.setattr(os, "scandir", forgetting(os.scandir))
    monkeypatch.setattr(os, "listdir", forgetting(os.listdir))
    return absent
