"""How ranks ended becomes one error of the right class, so that the verb has the right exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch.local import LocalHandle
from videofm.errors import CheckpointError, ConfigError, DataError, Interrupted, VideofmError
from videofm.run_dir import RunDirectory, write_json


def ended(folder: Path, *codes: int) -> LocalHandle:
    """A handle on processes that end with `codes`; what they said lies in `folder`."""
    processes = [subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"]) for code in codes]
    return LocalHandle(RunDirectory(folder), folder, processes)


def say(folder: Path, rank: int, state: str, message: str = "", kind: str = "") -> None:
    write_json(folder / f"rank_{rank}.json", {"state": state, "message": message, "kind": kind})


@pytest.mark.parametrize(
    ("kind", "error", "exit_code"),
    [("ConfigError", ConfigError, 2), ("CheckpointError", CheckpointError, 1), ("", VideofmError, 1)],
)
def test_the_class_of_a_failure_is_kept(tmp_path: Path, kind: str, error: type[VideofmError], exit_code: int) -> None:
    say(tmp_path, 0, "failed", "no size is called 'tyni'", kind)
    with pytest.raises(VideofmError, match="^no size is called 'tyni'$") as caught:
        ended(tmp_path, 1).wait()
    assert (type(caught.value), caught.value.exit_code) == (error, exit_code)


def test_who_said_why_comes_before_who_just_died(tmp_path: Path) -> None:
    say(tmp_path, 1, "failed", "the disk is full")
    with pytest.raises(VideofmError, match=r"^the disk is full \(rank 1\)$"):
        ended(tmp_path, 3, 1).wait()


def test_the_cause_comes_before_who_noticed(tmp_path: Path) -> None:
    """A rank that waited for another says so; what counts is why the other failed, or how it died."""
    say(tmp_path, 0, "failed", "all_reduce over the data group (ranks 0, 1) failed", "CollectiveError")
    with pytest.raises(VideofmError, match=r"^rank 1 ended with code 3; run the same .* rank 0 says: all_reduce over the data"):
        ended(tmp_path, 1, 3).wait()
    say(tmp_path, 1, "failed", "no clip", "DataError")
    with pytest.raises(DataError, match=r"^no clip \(rank 1\)$"):
        ended(tmp_path, 1, 1).wait()


def test_who_noticed_is_told_where_nobody_failed(tmp_path: Path) -> None:
    """As where a rank hangs: it is ended by us, which is no cause. The exit code is that of work that failed."""
    say(tmp_path, 0, "failed", "all_reduce over the data group (ranks 0, 1) failed", "CollectiveError")
    handle = ended(tmp_path, 1)
    handle.processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
    with pytest.raises(VideofmError, match=r"^all_reduce over the data group \(ranks 0, 1\) failed \(rank 0\)$") as caught:
        handle.wait()
    assert caught.value.exit_code == 1


def test_a_silent_rank_is_told_with_how_it_ended(tmp_path: Path) -> None:
    with pytest.raises(VideofmError, match="rank 0 ended with code 3; run the same command again"):
        ended(tmp_path, 3).wait()


def test_a_stop_is_no_failure(tmp_path: Path) -> None:
    say(tmp_path, 0, "interrupted", "stopped after step 3")
    with pytest.raises(Interrupted, match="stopped after step 3"):
        ended(tmp_path, 75).wait()
