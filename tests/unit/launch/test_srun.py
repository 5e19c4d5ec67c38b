"""Ranks of a step of Slurm, with a stand-in for srun: how they are started, watched and ended."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch import ranks, srun
from launch.ranks import Attempt
from tests.unit.launch.slurm_programs import Programs, on_path
from videofm.errors import ConfigError, ParallelError
from videofm.run_dir import RunDirectory


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    return on_path(folder, monkeypatch)


INSIDE = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_NTASKS_PER_NODE": "2"}


def test_an_allocation_is_read_from_the_environment() -> None:
    found = srun.Allocation.of(INSIDE, avoid={"n2"})
    assert (found.hosts, found.ranks_per_node) == (("n1", "n3"), 2)
    assert found.nodes_for(1) == ("n1",) and found.nodes_for(4) == ("n1", "n3")
    assert srun.Allocation.of({**INSIDE, "SLURM_NTASKS_PER_NODE": "", "SLURM_TASKS_PER_NODE": "4(x3)"}).ranks_per_node == 4
    with pytest.raises(ConfigError, match="not in an allocation.*videofm launch --on slurm"):
        srun.Allocation.of({})
    with pytest.raises(ParallelError, match=r"6 ranks need 3 nodes of 2 tasks, and job 7 has 2 left \(n1, n3\)"):
        found.nodes_for(6)
    with pytest.raises(ParallelError, match="3 ranks do not fill nodes of 2 tasks evenly"):
        found.nodes_for(3)


def an_attempt(folder: Path, world_size: int = 4) -> Attempt:
    run = RunDirectory(folder / "run 100%")
    return Attempt(run, run.start_attempt(), world_size)


def test_the_step_of_an_attempt(folder: Path) -> None:
    attempt = an_attempt(folder)
    extra = {srun.OPTIONS: "--cpus-per-task=3 '--network=a b'", srun.CONTAINER: "apptainer exec 'a b.sif' python3"}
    command = srun.srun_command(attempt, ("n1", "n2"), 2, extra)
    assert command[:7] == ["srun", "--job-name=attempt-1", "--nodes=2", "--nodelist=n1,n2", "--ntasks=4", "--ntasks-per-node=2",
                           "--distribution=block"]  # fmt: skip
    assert f"--output={folder}/run 100%%/attempts/0001/rank_%t.out" in command and "--network=a b" in command
    assert "--immediate=600" in command, "a step that finds no room ends"
    assert command[-8:] == ["apptainer", "exec", "a b.sif", "python3", *attempt.command[1:]]
    assert srun.srun_command(attempt, ("n1",), 8, {})[-5:] == attempt.command


STEP = """\
import json, os, signal, sys, time
from pathlib import Path
folder, lines, words, stay, code = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
def end(*_):
    print("srun: forcing job termination", file=sys.stderr)
    print("srun: error: n1: tasks 0-3: Killed", file=sys.stderr)
    (folder / "terminated").touch()
    sys.exit(137)
signal.signal(signal.SIGTERM, end)
for rank, word in words.items():
    aside = folder / f"rank_{rank}.json.new"
    aside.write_text(json.dumps(word))
    aside.rename(folder / f"rank_{rank}.json")
os.write(2, "".join(f"{line}\\n" for line in lines).encode())
if stay:
    time.sleep(60)
sys.exit(code)
"""


def step(
    attempt: Attempt, lines: list[str], words: Mapping[int, dict[str, str]], stay: bool = False, code: int = 0
) -> srun.SrunRanks:
    """Ranks of a stand-in for srun, which says `lines` and then stays until it is told to end its step. Who looks meanwhile
    sees whole words, and all lines or none."""
    arguments = [json.dumps(value) for value in (lines, words, stay, code)]
    with srun.log_path(attempt).open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", STEP, str(attempt.folder), *arguments], stderr=log)
    return srun.SrunRanks(attempt, ("n1", "n2"), process)


def until(attempt: Attempt, line: str) -> None:
    """Until the stand-in has said `line`; it then listens to SIGTERM."""
    deadline = time.monotonic() + 60
    while line not in srun.log_path(attempt).read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def word(state: str, message: str = "", kind: str = "") -> dict[str, str]:
    return {"state": state, "message": message, "kind": kind}


def test_ranks_that_finish(folder: Path) -> None:
    assert step(an_attempt(folder), [], dict.fromkeys(range(4), word("finished"))).wait().state == "finished"


def test_words_that_nfs_still_hides_are_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that finished is not called died because this node does not see all files yet."""
    attempt = an_attempt(folder)
    looked: list[str] = []

    def listdir(path: Path) -> list[str]:
        looked.append(str(path))
        for rank in range(4) if len(looked) == 2 else ():
            (attempt.folder / f"rank_{rank}.json").write_text(json.dumps(word("finished")))
        return []

    monkeypatch.setattr(srun.os, "listdir", listdir)
    assert step(attempt, [], {}).wait().state == "finished"
    assert looked == [str(attempt.folder)] * 2


@pytest.mark.parametrize(
    ("lines", "words", "code", "expected"),
    [
        (["srun: error: n1: tasks 0-3: Killed"], {1: "interrupted"}, 137, "died"),
        (["srun: error: Unable to create step for job 7: no"], {}, 1, "died"),
        (["srun: error: n1: task 0: Exited with exit code 3", "srun: error: Node failure on n2"], {1: "failed"}, 1, "died"),
    ],
)
def test_words_that_nobody_wrote_are_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], words: dict[int, str], code: int, expected: str
) -> None:
    """Ranks that were killed, that never began, or whose node is lost."""

    def listdir(path: Path) -> list[str]:
        raise AssertionError("waits")

    monkeypatch.setattr(srun.os, "listdir", listdir)
    found = step(an_attempt(folder), lines, {rank: word(state) for rank, state in words.items()}, code=code).wait()
    assert found.state == expected


@pytest.mark.parametrize(
    "lines", [["ready"], ["srun: Job 7 step creation temporarily disabled, retrying (Requested nodes are busy)"]]
)
def test_a_step_that_waits_for_its_nodes_hears_a_stop(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> None:
    """Ranks that run are left to save; where none began, there is nothing to wait for."""
    monkeypatch.setitem(ranks._GRACE, "stop", 60.0)
    attempt = an_attempt(folder)
    waiting = step(attempt, lines, {}, stay=True)

    def ask() -> None:
        until(attempt, lines[0])
        attempt.run.request_stop()

    stop = threading.Thread(target=ask)
    stop.start()
    found = waiting.wait()
    stop.join()
    assert found.state == "interrupted" and "before a rank began" in found.message and (attempt.folder / "terminated").exists()
    lines = ["srun: Job 7 step creation temporarily disabled, retrying", "srun: Step created for job 7"]
    words = dict.fromkeys(range(4), word("interrupted", "saved"))
    (attempt.folder / "rank_0.out").touch()  # as slurmstepd does before a rank runs
    begun = step(attempt, lines, words)
    assert begun.wait().message == "saved"


def test_ranks_that_saved_are_not_ended_when_the_first_leaves(folder: Path) -> None:
    """srun calls 75 an error; the rest goes on to its own end."""
    attempt = an_attempt(folder)
    words = dict.fromkeys(range(4), word("interrupted", "stopped after step 3"))
    found = step(attempt, ["srun: error: n1: task 0: Exited with exit code 75"], words, code=75).wait()
    assert (found.state, found.message) == ("interrupted", "stopped after step 3")
    assert not (attempt.folder / "terminated").exists()


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("srun: error: n2: tasks 2-3: Killed", "rank 2 was killed by SIGKILL"),
        ("srun: error: n2: task 3: Segmentation fault (core dumped)", "rank 3 was killed by SIGSEGV"),
        ("srun: error: n1: task 1: Exited with exit code 3", "rank 1 ended with code 3"),
    ],
)
def test_a_rank_that_dies_ends_the_step_and_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, line: str, match: str
) -> None:
    """What srun says of those that it is told to end is no cause."""
    monkeypatch.setitem(ranks._GRACE, "other", 0.2)
    attempt = an_attempt(folder)
    found = step(attempt, [line], {}, stay=True).wait()
    assert found.state == "died" and match in found.message and found.may_restart
    assert (attempt.folder / "terminated").exists()


def test_a_rank_that_said_why_comes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ranks._GRACE, "other", 0.2)
    lines = ["srun: error: n1: task 0: Exited with exit code 1", "srun: error: n2: task 3: Exited with exit code 3"]
    found = step(an_attempt(folder), lines, {0: word("failed", "the disk is full", "CheckpointError")}, stay=True).wait()
    assert (found.state, found.kind, found.rank) == ("failed", "CheckpointError", 0)


def test_ranks_of_a_lost_node_are_gone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the job outlives it (sbatch --no-kill), the supervisor may go on without them."""
    monkeypatch.setitem(ranks._GRACE, "other", 0.2)
    found = step(an_attempt(folder), ["srun: error: Node failure on n2"], {}, stay=True).wait()
    assert (found.state, found.rank, found.gone) == ("died", 2, {2: "n2", 3: "n2"}) and "on n2, which is gone" in found.message


def test_a_step_that_does_not_begin_says_why(folder: Path) -> None:
    lines = ["srun: error: Unable to create step for job 7: Requested node configuration is not available"]
    found = step(an_attempt(folder), lines, {}, code=1).wait()
    assert found.state == "died" and "started no rank: srun: error: Unable to create step for job 7" in found.message


def test_ranks_get_the_address_of_the_first_node_and_no_place_of_another(
    folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun itself is a stand-in that tells its environment."""
    program = programs.folder / "srun"
    program.write_text('#!/bin/sh\nenv > "$SEEN"\n')
    program.chmod(0o755)
    programs.answer("scontrol", "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=n1 OS=Linux")
    for name, value in {**INSIDE, "RANK": "5", "WORLD_SIZE": "9", "SEEN": str(folder / "seen")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(srun, "_SEE_SECONDS", 0.0)  # no rank writes a word
    srun.start(an_attempt(folder)).wait()
    seen = dict(line.split("=", 1) for line in (folder / "seen").read_text().splitlines() if "=" in line)
    assert seen["MASTER_ADDR"] == "10.0.0.7" and seen["SLURM_JOB_ID"] == "7"
    assert not {"RANK", "WORLD_SIZE", "VIDEOFM_RENDEZVOUS"} & set(seen)


VERB = """\
import sys, time
from pathlib import Path
from launch import srun
from launch.ranks import Attempt
from videofm.run_dir import RunDirectory
run = RunDirectory(sys.argv[1])
srun.start(Attempt(run, run.start_attempt(), 4))
time.sleep(60)
"""


def seen(path: Path) -> bool:
    """Whether a file is there soon."""
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return path.exists()


def test_a_verb_that_is_killed_takes_its_step_with_it(
    folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM has srun end the step; it is a stand-in that says so. Other ranks would train on, beside those of the next
    attempt."""
    program = programs.folder / "srun"
    program.write_text('#!/bin/sh\ntrap \'touch "$SEEN.ended"; exit 0\' TERM\ntouch "$SEEN"\n' + "sleep 0.1\n" * 600)
    program.chmod(0o755)
    for name, value in {**INSIDE, "SEEN": str(folder / "seen"), "PYTHONPATH": str(Path(__file__).parents[3])}.items():
        monkeypatch.setenv(name, value)
    verb = subprocess.Popen([sys.executable, "-c", VERB, str(folder / "run")])
    assert seen(folder / "seen") and not (folder / "seen.ended").exists()
    verb.kill()
    verb.wait()
    assert seen(folder / "seen.ended")


def test_no_step_begins_for_a_verb_that_is_dead(folder: Path) -> None:
    """It died before Linux could be asked: the parent is another process by then."""
    command = [sys.executable, "-c", srun._GUARD, "1", "touch", "begun"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "has died" in done.stderr and not (folder / "begun").exists()
