"""`run_distributed` gives results by rank, and tells which rank raised, died or hung; ranks are as good as fresh processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests import helpers
from tests.helpers import ForkedPython, launch_ranks, run_distributed

SCRIPT = """
import os, signal, sys
open(sys.argv[1] + os.environ["RANK"], "w").write(" ".join([__name__, os.environ["WORLD_SIZE"], *sys.argv[2:]]))
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGTERM)
"""


def add_ranks(rank: int, world_size: int, start: float) -> torch.Tensor:
    value = torch.tensor([start + rank])
    dist.all_reduce(value)
    return value * (rank + 1)


def raise_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one is unwell")


def leave_on_one(rank: int, world_size: int, code: int) -> None:
    if rank == 1:
        os._exit(code)


def hang_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)


def test_results_come_by_rank() -> None:
    """Ranks bring 10 and 11, the sum is 21; rank 1 doubles it."""
    assert [value.item() for value in run_distributed(add_ranks, 2, 10.0)] == [21.0, 42.0]


def test_an_exception_is_reported() -> None:
    with pytest.raises(AssertionError, match="(?s)rank 1 of 2 raised:.*rank one is unwell"):
        run_distributed(raise_on_one, 2)


@pytest.mark.parametrize("code", [7, 0])
def test_a_rank_that_leaves_is_reported(code: int) -> None:
    with pytest.raises(AssertionError, match=rf"ranks \[1\] died with exit codes \[{code}\]"):
        run_distributed(leave_on_one, 2, code)


def test_a_hang_ends() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[1\] were not done after 8.0 s"):
        run_distributed(hang_on_one, 2, timeout=8.0)


def look(rank: int, world_size: int) -> dict[str, object]:
    """What a rank begins with; then it leaves marks that the next ones must not find."""
    found = {
        "imported": set(helpers.IMPORTED) <= set(sys.modules),
        "as new": not hasattr(torch, "mark") and torch.get_num_threads() == 1,
        "mark": os.environ.get("MARK"),
        "own": (os.getpid(), torch.rand(1).item(), np.random.rand(), random.random()),
        "hash": hash("a name"),
    }
    torch.mark = True
    os.environ["MARK"] = "of a rank"
    return found


def test_a_rank_begins_as_a_fresh_process_with_the_imports_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the ranks before it is there, but the environment of this process now; neighbours hash otherwise."""
    before = run_distributed(look, 2)
    monkeypatch.setenv("MARK", "of a test")
    ranks = run_distributed(look, 2)
    everyone = [*before, *ranks]
    assert all(rank["imported"] and rank["as new"] for rank in everyone)
    assert [rank["mark"] for rank in everyone] == [None, None, "of a test", "of a test"]
    assert all(len(set(kind)) == 4 for kind in zip(*(rank["own"] for rank in everyone), strict=True)), "seeds are their own"
    assert ranks[0]["hash"] != ranks[1]["hash"]


def test_a_script_runs_as_a_program_of_a_launcher(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    launch_ranks(tmp_path / "script.py", 2, tmp_path / "rank_", "a", "b", codes=[0, -signal.SIGTERM])
    assert [(tmp_path / f"rank_{rank}").read_text() for rank in range(2)] == ["__main__ 2 a b"] * 2
    with pytest.raises(AssertionError):
        launch_ranks(tmp_path / "script.py", 2, tmp_path / "rank_")


def test_a_module_runs_as_a_program_and_says_how_it_ends(tmp_path: Path) -> None:
    """As `python -m json.tool` of a file does: it prints, and ends with 1 where the file is none of JSON; kills are seen."""
    (tmp_path / "file").write_text("{}")
    output, environment = tmp_path / "output", {**os.environ, "RANK": "0"}
    command = [sys.executable, "-m", "json.tool", str(tmp_path / "file")]
    assert ForkedPython.as_started(command, environment, output).wait() == 0
    assert output.read_text() == "{}\n"
    (tmp_path / "file").write_text("{")
    assert ForkedPython.as_started(command, environment, output).wait() == 1
    assert "Expecting property name" in output.read_text()
    os.mkfifo(tmp_path / "pipe")
    waiting = ForkedPython(["-m", "json.tool", str(tmp_path / "pipe")], environment, output)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(timeout=0.1)
    assert waiting.poll() is None
    waiting.kill()
    assert waiting.wait() == -signal.SIGKILL
