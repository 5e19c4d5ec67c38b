"""What a verb does about signals while a stage runs; that it asks the stage to stop is in tests/unit/test_recipe.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from videofm.errors import DataError, Interrupted, VideofmError
from videofm.run_dir import RunDirectory
from videofm.stages import execute
from videofm.stages.execute import StopSignals
from videofm.train.signals import PATIENCE


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which the process would have ended."""
    found: list[int] = []
    monkeypatch.setattr(execute.os, "_exit", found.append)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_one_that_comes_again_within_a_moment_is_the_same(
    tmp_path: Path, codes: list[int], capfd: pytest.CaptureFixture[str], number: int
) -> None:
    """As from a scheduler that preempts; later it insists."""
    with StopSignals() as signals:
        signals.run = RunDirectory(tmp_path)
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert signals.requested and signals.run.stop_requested and codes == []
        signals._first -= PATIENCE
        os.kill(os.getpid(), number)
    assert codes == [75]
    told = capfd.readouterr().err.splitlines()
    assert told[0].endswith("saving, then stopping; once more after 5 s stops at once") and "stopped at once" in told[1]


def test_ctrl_c_insists_at_once(codes: list[int]) -> None:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert codes == [75]


def test_a_disk_that_is_full_is_no_obstacle(tmp_path: Path, codes: list[int]) -> None:
    """The file that tells other processes cannot be written; this one knows."""
    (tmp_path / "control").write_text("not a folder")
    with StopSignals() as signals:
        signals.run = RunDirectory(tmp_path)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.run.stop_requested
    assert codes == []


def test_an_outcome_that_cannot_be_written_does_not_hide_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stage that stopped for want of room is interrupted, and one that failed says its own error, not that of the disk."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def runner(error: Exception) -> object:
        def runs(config: object, run: RunDirectory) -> dict[str, object]:
            raise error

        return runs

    monkeypatch.setattr(RunDirectory, "set_outcome", full)
    (tmp_path / "traceback.txt").symlink_to("/dev/full")
    run, config = RunDirectory(tmp_path), SimpleNamespace()
    for error, kind, told in (
        (Interrupted("its state is in the spare folder"), Interrupted, "its state is in the spare folder. The same command"),
        (DataError("no clip"), DataError, "^no clip$"),
        (ValueError("a mistake"), VideofmError, "failed: ValueError: a mistake"),
    ):
        with pytest.raises(kind, match=told):
            execute._attempt(runner(error), config, run, tmp_path)  # type: ignore[arg-type]
    assert "cannot be written ([Errno 28] No space left on device); it is interrupted: its state is in" in caplog.text
