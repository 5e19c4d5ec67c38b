"""Processes of this machine as ranks: one that ends early ends the attempt, and none is ever left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch import local
from launch import ranks as ranks_of
from launch.local import LocalRanks
from launch.ranks import Attempt
from videofm.errors import ParallelError
from videofm.run_dir import RunDirectory

SLEEP = "import time; time.sleep(600)"


def said(rank: int, state: str) -> str:
    """Code of a rank that writes how it ended."""
    text = json.dumps({"state": state, "message": f"{state} here", "kind": ""})
    return f"open('rank_{rank}.json', 'w').write({text!r})"


def ranks(folder: Path, *codes: str) -> LocalRanks:
    """Processes that run `codes`, as the ranks of an attempt in `folder`."""
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=folder) for code in codes]
    return LocalRanks(Attempt(RunDirectory(folder), folder, len(codes)), processes)


def alive(started: LocalRanks) -> int:
    return sum(process.poll() is None for process in started._processes)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_of, "_GRACE", {"stop": 20.0, "hung": 20.0, "other": 0.1})


def test_all_finished(tmp_path: Path) -> None:
    assert ranks(tmp_path, said(0, "finished"), said(1, "finished")).wait().state == "finished"


@pytest.mark.parametrize(
    "code", ["raise SystemExit(3)", "raise SystemExit(0)", "import os; os.kill(os.getpid(), 9)"], ids=["code", "zero", "killed"]
)
def test_a_rank_that_ends_early_ends_the_attempt(tmp_path: Path, code: str) -> None:
    """It is the cause; the one that waited for it is killed, which is none."""
    started = ranks(tmp_path, SLEEP, code)
    outcome = started.wait()
    assert (outcome.state, outcome.rank, alive(started)) == ("died", 1, 0)


def test_a_rank_that_says_why_is_heard_before_the_others_are_killed(tmp_path: Path) -> None:
    started = ranks(tmp_path, SLEEP, said(1, "failed"))
    assert started.wait().message == "failed here (rank 1)"
    assert alive(started) == 0


def test_watchdogs_may_write_their_stacks(tmp_path: Path) -> None:
    """Once one rank says that the attempt hung, the others have time to say so too."""
    started = ranks(tmp_path, said(0, "hung"), f"import time; time.sleep(0.5); {said(1, 'hung')}")
    assert started.wait().state == "hung"
    assert (tmp_path / "rank_1.json").exists()


def test_a_rank_that_saves_for_a_stop_has_time(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.request_stop()
    started = ranks(tmp_path, "raise SystemExit(1)", f"import time; time.sleep(0.5); {said(1, 'interrupted')}")
    assert started.wait().state == "died"
    assert (tmp_path / "rank_1.json").exists()


def test_none_is_left_when_waiting_is_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a process that is stopped, which hears no other signal."""

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    started = ranks(tmp_path, SLEEP, SLEEP)
    os.kill(started._processes[1].pid, signal.SIGSTOP)
    monkeypatch.setattr(local.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        started.wait()
    assert alive(started) == 0
    started.end()


def test_ranks_that_were_started_are_ended_where_the_next_one_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes: list[subprocess.Popen[bytes]] = []

    def one_only(command: list[str], environment: Mapping[str, str], output: Path | None) -> subprocess.Popen[bytes]:
        if processes:
            raise OSError("no more processes")
        assert environment["VIDEOFM_LAUNCHER"] == str(os.getpid())
        processes.append(subprocess.Popen([sys.executable, "-c", SLEEP]))
        return processes[0]

    monkeypatch.setattr(local, "_start", one_only)
    monkeypatch.setattr(local, "_check_devices", lambda attempt: None)
    with pytest.raises(OSError, match="no more processes"):
        local.start(Attempt(RunDirectory(tmp_path), tmp_path / "0001", 2))
    assert processes[0].poll() is not None


def test_more_ranks_than_devices_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(json.dumps({"trainer": {"device": "auto"}}))
    devices = [Path("/dev/nvidia0"), Path("/dev/nvidia1")]
    monkeypatch.setattr(Path, "exists", lambda path: path in devices or os.path.exists(path))
    monkeypatch.setattr(Path, "glob", lambda path, pattern: iter(devices))
    with pytest.raises(ParallelError, match="4 ranks need 4 GPUs and this machine has 2; choose .* whose product is 2, or"):
        local.start(Attempt(RunDirectory(tmp_path), tmp_path / "0001", 4))
