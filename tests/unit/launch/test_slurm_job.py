"""Turns of a job of Slurm: warned, requeued, given up, without a Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from launch import slurm_job
from launch.submission import Job, Launch, mark_cancelled, progress, spared
from tests.unit.launch.slurm_programs import Programs, job_answer, on_path
from videofm.checkpoint.listing import spare_of
from videofm.run_dir import RunDirectory, read_json, write_json


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def programs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    return on_path(folder, monkeypatch)


def attempt_with(run: Path, checkpoint: str | None) -> None:
    RunDirectory(run).start_attempt()
    if checkpoint is not None:
        (run / "checkpoints" / checkpoint).mkdir(parents=True)


def test_turns_are_counted_and_end_where_nothing_new_is_saved(folder: Path) -> None:
    """Two turns in a row without a new checkpoint are the last; one with a new one starts the count again."""
    run, record = folder / "run", folder / "job_7.json"
    run.mkdir()
    assert slurm_job.begin(record, run, "7", 0, 50) is None
    for turn, checkpoint, fruitless in [(1, "step_00000001", 0), (2, None, 1), (3, "step_00000002", 0), (4, None, 1)]:
        attempt_with(run, checkpoint)
        assert slurm_job.begin(record, run, "7", turn, 50) is None
        assert read_json(record)["turns"][-1]["fruitless"] == fruitless
    attempt_with(run, None)
    reason = slurm_job.begin(record, run, "7", 5, 50)
    assert reason is not None and reason.startswith("2 turns in a row saved nothing new")
    assert read_json(record)["stopped"] == reason
    assert "requeued 6 times and cluster.max_requeues is 5" in str(slurm_job.begin(record, run, "7", 6, 5))


def test_progress_is_what_was_saved_and_made(folder: Path) -> None:
    """Attempts, logs and requests are no progress; checkpoints, finished stages and files of a stage are."""
    run = folder / "run"
    stage = run / "stages" / "curate"
    RunDirectory(stage).start_attempt()
    seen = [progress(run)]
    RunDirectory(stage).start_attempt()
    (stage / "log.txt").write_text("more")
    RunDirectory(stage).request_stop()
    assert progress(run) == seen[-1]
    (stage / "shards").mkdir()
    (stage / "shards" / "0.tar").write_text("x")
    seen.append(progress(run))
    (stage / "shards" / "0.tar").write_text("xy")
    seen.append(progress(run))
    RunDirectory(stage).set_outcome("finished")
    seen.append(progress(run))
    assert all(before != after for before, after in pairwise(seen))


def test_what_killed_attempts_leave_is_no_progress(folder: Path) -> None:
    """Each attempt makes a folder for wandb, and one that is killed in mid-save leaves a part of a checkpoint, under a hidden
    name: a run that dies so before its first checkpoint gets no third turn."""
    run, record = folder / "run", folder / "job_7.json"
    run.mkdir()
    for turn in range(4):
        reason = slurm_job.begin(record, run, "7", turn, 50)
        RunDirectory(run).start_attempt()
        for name in (f"wandb/offline-run-{turn}/files/log.txt", f"checkpoints/.step_0000000{turn}.tmp/model/part"):
            (run / name).parent.mkdir(parents=True)
            (run / name).write_text("x" * turn)
    # The first turn finds no stage, the second one that has nothing yet.
    assert reason is not None and reason.startswith("2 turns in a row saved nothing new")


def spare_run(folder: Path) -> tuple[Path, Path]:
    """A run with a second place for its checkpoints, and that place."""
    run = folder / "run"
    RunDirectory(run).start_attempt()
    write_json(run / "config.yaml", {"trainer": {"spare_checkpoints": str(folder / "spare")}})
    write_json(run / "lineage.json", {"fingerprint": "f" * 64, "birth": "abc"})
    (run / "checkpoints/step_00000010").mkdir(parents=True)
    place = spare_of(run)
    assert place is not None
    return run, place


def test_what_is_saved_in_the_spare_folder_is_progress(folder: Path) -> None:
    run, spare = spare_run(folder)
    record = folder / "job_7.json"
    for turn in range(5):
        assert slurm_job.begin(record, run, "7", turn, 50) is None
        (spare / f"step_000000{turn + 2}0").mkdir(parents=True)
    assert read_json(record)["turns"][-1]["fruitless"] == 0


@pytest.mark.parametrize("asked", [False, True])
def test_a_full_disk_waits_for_a_person(folder: Path, asked: bool) -> None:
    """Another turn would get as far as its first checkpoint. Once there is room, what lies in the spare folder from an earlier
    turn is no reason."""
    run, spare = spare_run(folder)
    before = spared(run)
    (spare / "step_00000020").mkdir(parents=True)
    reason = slurm_job.why_not_again(run, "7", asked, 0, 5, before)
    assert reason == (
        f"{run / 'checkpoints'} could not take the state (its disk is full or fails), which went to {spare / 'step_00000020'}; "
        "make room, and launch again to go on from there"
    )
    before = spared(run)
    assert slurm_job.why_not_again(run, "7", asked, 0, 5, before) is None  # warned before it began
    (run / "checkpoints/step_00000030").mkdir()
    assert slurm_job.why_not_again(run, "7", asked, 0, 5, before) is None


def test_a_job_whose_disk_is_full_says_so_also_where_its_record_cannot(
    folder: Path, programs: Programs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record lies on the same disk."""
    _, spare = spare_run(folder)
    programs.answer("scontrol", job_answer("RUNNING"))
    saves = f"import os, sys; os.makedirs({str(spare / 'step_00000020')!r}); sys.exit(75)"
    process = start_job(folder, [sys.executable, "-c", saves])
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "does not go back into the queue" in said and "make room, and launch again" in said
    assert ["scontrol", "requeue", "7"] not in programs.asked
    assert read_json(folder / "job_7.json")["stopped"].endswith("launch again to go on from there")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slurm_job, "write_json", full)
    slurm_job._note(folder / "job_7.json", stopped="it was full")
    assert "job_7.json cannot be written: [Errno 28] No space left on device" in capsys.readouterr().err


def test_who_asked_decides_whether_a_job_goes_back(folder: Path) -> None:
    """Warned by Slurm, or its ranks were: again. Asked by `control/stop`, cancelled, or too often: not. A job that somebody
    handed over by hand is not that of a launch which was cancelled."""
    run = RunDirectory(folder / "run")
    run.start_attempt()

    def why(asked: bool, turn: int = 0, job: str = "7") -> str | None:
        return slurm_job.why_not_again(run.path, job, asked, turn, 5)

    assert why(True) is None and why(False) is None
    run.request_stop()
    assert why(False) == "somebody asked it to stop"
    assert why(True) is None  # the verb leaves the file behind when it is warned
    assert "max_requeues is 5" in str(why(True, 5))
    mark_cancelled(Launch(run.path, "slurm", (Job("7", None),), (), str(folder)))
    assert why(True) == "it was cancelled" and why(True, job="8") is None


def test_a_job_that_was_cancelled_on_its_way_to_the_queue_does_not_begin(folder: Path, programs: Programs) -> None:
    """It runs nothing, and ends as an interrupted one."""
    mark_cancelled(Launch(folder / "run", "slurm", (Job("7", None),), (), str(folder)))
    process = start_job(folder, [sys.executable, "-c", f"open({str(folder / 'ran')!r}, 'w')"])
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "job 7 ends here: it was cancelled" in said
    assert not (folder / "ran").exists() and read_json(folder / "job_7.json")["stopped"] == "it was cancelled"


class Unsignalled:
    """In place of the module `signal`: this process keeps its handlers."""

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: None) if name == "signal" else getattr(signal, name)


JOB = """
import sys
from launch import slurm_job
slurm_job._PATIENCE_SECONDS = 0.0
sys.exit(slurm_job.main())
"""
LATE = """
import signal, sys, time
from pathlib import Path
seen = []
time.sleep(0.5)  # a USR1 before the handler stands would end the process
signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
Path(sys.argv[1]).write_text("ready")
deadline = time.monotonic() + 30
while not seen and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(75 if len(seen) == 1 else 3)
"""


def start_job(folder: Path, command: list[str], **environment: str) -> subprocess.Popen[str]:
    """`launch.slurm_job` as the script of job 7."""
    options = ["--run", str(folder / "run"), "--folder", str(folder), "--max-requeues", "5", "--"]
    own = {"SLURM_JOB_ID": "7", "PYTHONPATH": str(Path(__file__).parents[3]), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", JOB, *options, *command], env={**os.environ, **own}, stderr=subprocess.PIPE, text=True
    )


def until(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@pytest.mark.parametrize("early", [True, False])
def test_a_warned_job_tells_its_command_once_and_goes_back(folder: Path, programs: Programs, early: bool) -> None:
    """Also when the warning comes before the command listens, and comes twice: it is told once, and not killed."""
    (folder / "run").mkdir()
    programs.answer("scontrol", job_answer("RUNNING"))
    process = start_job(folder, [sys.executable, "-c", LATE, str(folder / "ready")])
    until(folder / ("job_7.json" if early else "ready"))
    if early:
        until(Path(f"/proc/{process.pid}/task/{process.pid}/children"))
    deadline = time.monotonic() + 60
    while early and not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "back into the queue for turn 2" in said
    assert programs.asked[-1] == ["scontrol", "requeue", "7"]


@pytest.mark.parametrize(
    ("code", "state", "expected", "match"),
    [
        (0, "RUNNING", 0, ""),
        (1, "RUNNING", 1, ""),
        (75, "PREEMPTED", 75, "does not go back into the queue: for Slurm it is PREEMPTED"),
        (-9, "RUNNING", 137, ""),
    ],
)
def test_other_ends_are_left_to_slurm(
    folder: Path, programs: Programs, code: int, state: str, expected: int, match: str
) -> None:
    (folder / "run").mkdir()
    programs.answer("scontrol", job_answer(state))
    ends = f"import os; os.kill(os.getpid(), {-code})" if code < 0 else f"raise SystemExit({code})"
    process = start_job(folder, [sys.executable, "-c", ends])
    _, said = process.communicate(timeout=60)
    assert process.returncode == expected and match in said
    assert ["scontrol", "requeue", "7"] not in programs.asked


def test_a_command_in_a_container_is_stopped_by_a_file(folder: Path) -> None:
    run = RunDirectory(folder / "run/stages/curate")
    (folder / "run").mkdir()
    stop = slurm_job._touch(folder / "run")
    assert not stop(None)  # type: ignore[arg-type]
    run.start_attempt()
    assert stop(None) and run.stop_requested  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["show", "requeue"])
def test_a_controller_that_restarts_ends_no_run(
    folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    """It is asked again, what the job is and to take it back."""
    monkeypatch.setattr(slurm_job, "_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(slurm_job, "signal", Unsignalled())
    programs.answer("scontrol", job_answer("RUNNING"))
    programs.answer("scontrol", "Unable to contact slurm controller", 1, when=word, times=2)
    assert slurm_job._not_running("7") is None and not slurm_job._preempted("7")
    write_json(folder / "job_7.json", {"turns": [], "stopped": None})
    slurm_job._requeue("7", folder / "job_7.json")
    assert programs.asked[-1] == ["scontrol", "requeue", "7"] and read_json(folder / "job_7.json")["stopped"] is None
    assert programs.asked.count(["scontrol", "requeue", "7"]) == (3 if word == "requeue" else 1)


def test_a_controller_that_never_answers_is_told_of(
    folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Patience ends; `status` says why the job is not back in the queue."""
    monkeypatch.setattr(slurm_job, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(slurm_job, "signal", Unsignalled())
    programs.answer("scontrol", "Unable to contact slurm controller", 1)
    assert slurm_job._not_running("7") is None and not slurm_job._preempted("7") and not slurm_job.can_do_without("7", ["n2"])
    write_json(folder / "job_7.json", {"turns": [], "stopped": None})
    slurm_job._requeue("7", folder / "job_7.json", ["n2"])
    reason = read_json(folder / "job_7.json")["stopped"]
    assert reason.startswith("Slurm refused to requeue it: scontrol ended with code 1: Unable to contact slurm controller")
    assert f"does not go back into the queue: {reason}" in capsys.readouterr().err
    assert not [asked for asked in programs.asked if asked[1] == "update"]


def test_a_refused_requeue_leaves_the_exit_code(folder: Path, programs: Programs) -> None:
    (folder / "run").mkdir()
    programs.answer("scontrol", job_answer("RUNNING"))
    programs.answer("scontrol", "Requested operation is presently disabled", 1, when="requeue")
    process = start_job(folder, [sys.executable, "-c", "raise SystemExit(75)"])
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75 and "Slurm refused to requeue it" in said and "Traceback" not in said


SILENT = "h100|gpu:8"


@pytest.mark.parametrize(
    ("nodes", "how"),
    [
        (("n1", "n3", "n9"), "without it"),
        (("n1", "n9"), "with the same nodes"),
        (("n1", "n9", "n4|cpu|(null)", "n5|h100|gpu:4"), "with the same nodes"),  # others are no help
    ],
)
def test_a_node_that_runs_nothing_is_found_and_avoided(
    folder: Path, programs: Programs, nodes: tuple[str, ...], how: str
) -> None:
    """After a failure each other node is asked to run a step; srun is a stand-in that fails, or hangs, for some. Slurm holds
    a job for ever that its exclusions leave too few nodes: such a one is not told to keep off any."""
    program = programs.folder / "srun"
    program.write_text('#!/bin/sh\ncase "$*" in *nodelist=n2*) exit 1;; *nodelist=n3*) exec sleep 60;; esac\n')
    program.chmod(0o755)
    environment = {"SLURM_JOB_NODELIST": "n[1-4]"}
    assert slurm_job.silent_nodes(environment, patience=2.0) == ["n2", "n3"]
    assert slurm_job.silent_nodes({"SLURM_JOB_NODELIST": "n1"}) == []
    (folder / "run").mkdir()
    programs.answer("scontrol", job_answer("RUNNING", "Partition=low NumNodes=2-2 ExcNodeList=n9 "))
    programs.answer("sinfo", "\n".join(node if "|" in node else f"{node}|{SILENT}" for node in nodes))
    programs.answer("sinfo", f"{SILENT}\n{SILENT}", when="--nodes=n2")  # a row a partition
    process = start_job(folder, [sys.executable, "-c", "raise SystemExit(1)"], SLURM_JOB_NODELIST="n[1-2]")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and f"n2 runs nothing any more; back into the queue for turn 2, {how}" in said
    asked = [command[1:] for command in programs.asked if command[1] in ("update", "requeue")]
    assert asked == [["requeue", "7"], *([["update", "JobId=7", "ExcNodeList=n9,n2"]] if how == "without it" else [])]
    responding = ["--responding", "--states=idle,alloc,mix,comp", "--format=%N|%f|%G", "--partition=low"]
    assert ["sinfo", "--noheader", "--Node", *responding] in programs.asked
