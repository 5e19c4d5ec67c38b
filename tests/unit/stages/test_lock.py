"""The lock of a run directory, on file systems that have none."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.foreground import working
from videofm.errors import ConfigError
from videofm.stages import execute
from videofm.stages.execute import locked


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the file system says to it."""
    said = os.strerror(request.param)

    def flock(*_: Any) -> None:
        raise OSError(request.param, said)

    monkeypatch.setattr(fcntl, "flock", flock)
    return said


def test_a_file_system_without_locks_is_told_at_once(
    tmp_path: Path, without_locks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody works there: to wait, or to say that another videofm does, would be for ever."""
    monkeypatch.setattr(execute.time, "sleep", lambda seconds: pytest.fail("it waits"))
    told = rf"\.lock cannot be locked \(.*{without_locks}\).* must support flock.*Lustre: mount -o flock"
    with pytest.raises(ConfigError, match=told), locked(tmp_path / "run"):
        pytest.fail("nobody may work there")


def test_looking_at_a_file_system_without_locks_says_that_nothing_works_there(
    tmp_path: Path, without_locks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.foreground.stage_folders", lambda run: [run])
    (tmp_path / ".lock").touch()
    launch: Any = SimpleNamespace(run=tmp_path)
    assert working(launch) == []
