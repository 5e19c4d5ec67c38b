"""`videofm launch` on this machine, and what `status`, `logs` and `cancel` say of any launch."""

from __future__ import annotations

import fcntl
import json
import os
import re
from pathlib import Path

import pytest

from launch import jobs
from launch.config import ContainerConfig, CPUJobsConfig, LocalConfig, SlurmConfig
from launch.foreground import Local
from launch.submission import Job, JobState, Launch
from tests.unit.launch.slurm_programs import job_answer, on_path
from videofm.cli import main
from videofm.errors import ConfigError
from videofm.run_dir import RunDirectory, write_json
from videofm.stages.execute import locked


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def training(folder: Path, state: str | None = None) -> Launch:
    """A launch whose run has two attempts, two rows of metrics, and files of two ranks."""
    run = RunDirectory(folder / "run")
    run.start_attempt()
    attempt = run.start_attempt()
    write_json(run.path / "config.yaml", {"trainer": {"max_steps": 9}})
    run.metrics_path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}\n{"step": 3, "lo')
    (run.path / "log.txt").write_text("".join(f"line {number}\n" for number in range(100)))
    (attempt / "rank_1.out").write_text("printed by 1\n")
    (attempt / "rank_1.log").write_text("logged by 1\n")
    (attempt / "rank_10.out").write_text("printed by 10\n")
    if state is not None:
        run.set_outcome(state, "why")
    launch = Launch(run.path, "slurm", (Job("7", None, "launch/0001/job.sh", "launch/0001/job_7.log"),), (), str(folder))
    (run.path / "launch/0001").mkdir(parents=True)
    (run.path / "launch/0001/job_7.log").write_text("said by the job\n")
    return launch


def test_status_tells_jobs_and_steps(folder: Path) -> None:
    """A last row that is being written does not count."""
    launch = training(folder, "interrupted")
    states = [JobState(launch.jobs[0], "pending", "waits for Priority")]
    told = jobs.as_json(launch, states)
    assert told["jobs"][0] == {
        "id": "7", "stage": None, "script": "launch/0001/job.sh", "log": "launch/0001/job_7.log", "state": "pending",
        "detail": "waits for Priority",
    }  # fmt: skip
    stage = told["stages"][0]
    known = [stage[name] for name in ("attempt", "state", "step", "max_steps", "loss")]
    assert known == [2, "interrupted", 2, 9, 0.25]
    text = jobs.as_text(launch, states)
    assert "job 7: pending (waits for Priority)" in text
    assert "run: attempt 2 interrupted, step 2 of 9, loss 0.25: why" in text


def test_a_row_without_a_loss_is_not_the_last_one(folder: Path) -> None:
    """A step that was skipped has null."""
    launch = training(folder)
    RunDirectory(launch.run).metrics_path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n')
    assert "attempt 2 unfinished, step 1 of 9, loss 0.5" in jobs.as_text(launch, [])
    RunDirectory(launch.run).metrics_path.write_text('{"step": 2, "loss": null}\n')
    assert jobs.as_text(launch, []).endswith("attempt 2 unfinished")


@pytest.mark.parametrize("place", ["local", "slurm", "ray"])
def test_a_launch_whose_jobs_are_alive_keeps_its_run_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    """Wherever the next one is to go; the launcher of the first is asked, and nothing is written."""
    programs = on_path(folder, monkeypatch)
    (folder / "demo.yaml").write_text("stages:\n  demo: {kind: demo_data, num_videos: 1, num_frames: 4, size: 32}\n")
    run = Path("runs/demo")
    cluster = {"kind": "slurm", "gpus_per_node": 0}
    Launch(run, "slurm", (Job("7", None), Job("8", "demo")), ("run", "demo.yaml"), str(folder), cluster=cluster).write()
    kept = (run / "launch.json").read_text()
    more = ["cluster.gpus_per_node=0"] if place == "slurm" else []
    programs.answer("scontrol", job_answer("PENDING"))
    assert main(["launch", "--on", place, "demo.yaml", *more]) == 2
    assert "job 7 (pending), 8 (pending) works for runs/demo already" in capsys.readouterr().err
    programs.answer("scontrol", "Unable to contact slurm controller", 1)
    assert main(["launch", "--on", place, "demo.yaml", *more]) == 2
    told = capsys.readouterr().err
    assert "was launched on slurm (job 7, 8)" in told and "cannot be asked" in told and "remove runs/demo/launch.json" in told
    assert (run / "launch.json").read_text() == kept and [path.name for path in run.iterdir()] == ["launch.json"]
    assert {command[0] for command in programs.asked} == {"scontrol"}
    assert main(["launch", "--on", place, "demo.yaml", *more, "--dry-run"]) == 0  # asks nobody


def test_logs_are_those_of_the_job_the_stage_or_a_rank(folder: Path) -> None:
    launch = training(folder)
    told = jobs.logs(launch, None, None, 2)
    assert "said by the job" in told and told.endswith("line 98\nline 99")
    told = jobs.logs(launch, None, 1, 40)
    assert told.endswith("printed by 1") and "logged by 1" in told and "printed by 10" not in told
    with pytest.raises(ConfigError, match="rank 3 wrote nothing in .*; these did: 1, 10"):
        jobs.logs(launch, None, 3, 40)
    with pytest.raises(ConfigError, match="has no stage 'vae' that began. It has: none"):
        jobs.logs(launch, "vae", None, 40)
    empty = Launch(folder / "other", "slurm", (), (), str(folder))
    assert "nothing was written yet" in jobs.logs(empty, None, None, 40)
    with pytest.raises(ConfigError, match="has no attempt yet, so no rank wrote anything"):
        jobs.logs(empty, None, 0, 40)


def test_here_the_verb_itself_runs(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`--on local` does what `videofm run` does, with ranks as processes of this machine, whatever the shell says."""
    monkeypatch.setenv("VIDEOFM_RANKS", "slurm")
    (folder / "demo.yaml").write_text("stages:\n  demo: {kind: demo_data, num_videos: 1, num_frames: 4, size: 32}\n")
    assert main(["launch", "--on", "local", "demo.yaml", "--dry-run"]) == 0
    assert "nothing was run" in capsys.readouterr().out and not (folder / "runs").exists()
    assert main(["launch", "demo.yaml", "cluster.kind=local", "stages.demo.seed=3"]) == 0
    assert os.environ["VIDEOFM_RANKS"] == "slurm"
    launch = Launch.read(Path("runs/demo"))
    assert (launch.launcher, launch.verb) == ("local", ("run", "demo.yaml", "stages.demo.seed=3"))
    assert RunDirectory("runs/demo/stages/demo").config["seed"] == 3
    capsys.readouterr()
    assert main(["launch", "status", "runs/demo", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [job["state"] for job in told["jobs"]] == ["finished"] and told["stages"][0]["state"] == "finished"
    assert main(["launch", "logs", "runs/demo"]) == 0 and "demo_data finished" in capsys.readouterr().out
    assert main(["launch", "cancel", "runs/demo"]) == 0 and "nothing to cancel" in capsys.readouterr().out


def test_cancel_here_asks_who_holds_the_run_directory(folder: Path) -> None:
    launch, place = training(folder), Local(LocalConfig(kind="local"))
    assert place.states(launch)[0].state == "failed"
    with locked(launch.run):
        assert place.states(launch)[0].state == "running"
        assert place.cancel(launch, now=False).endswith("saves and stops")
    assert RunDirectory(launch.run).stop_requested and Launch.read(launch.run).cancelled is not None
    with pytest.raises(ConfigError, match="press Ctrl-C there twice"):
        place.cancel(launch, now=True)
    with (launch.run / ".lock").open() as file:  # looking does not hold it
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["launch", "c.yaml"], "say where to launch: --on slurm"),
        (["launch", "--on", "slurm", "c.yaml", "--cluster", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["launch", "--on", "local", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["launch", "--on", "local", "d.yaml"], "a stage of kind 'demo_data' has no verb of its own"),
        (["launch", "--on", "local", "c.yaml", "num_videos=x"], "is not a valid"),
        (["launch", "status", "runs/nothing"], "runs/nothing was not launched: it has no launch.json"),
    ],
)
def test_wrong_requests(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], match: str) -> None:
    (folder / "c.yaml").write_text("stages:\n  demo: {kind: demo_data}\n")
    (folder / "d.yaml").write_text("kind: demo_data\n")
    assert main(arguments) == 2
    assert match in capsys.readouterr().err


def test_every_field_of_a_slurm_cluster_is_read() -> None:
    """Outside of the file that declares it."""
    root = Path(__file__).parents[3] / "launch"
    text = "".join(path.read_text() for path in root.glob("*.py") if path.name not in ("config.py", "ray_config.py"))
    fields = {name for section in (SlurmConfig, CPUJobsConfig, ContainerConfig) for name in section.model_fields} - {"kind"}
    read = {name for name in fields if re.search(rf"(\.|\"){name}\b", text)}
    # Through the property num_ranks_per_node.
    assert fields - read == {"ranks_per_node"} or fields == read
