"""Launches on a real Slurm: two nodes on this machine. Where they cannot be started these tests fail, and say why.

A training on two nodes, a rank on each, is disturbed in every way that a cluster has, and must end as one on this machine that
nobody disturbed: each loss and the last weights, to the last bit.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import hold
from tests.demo_shards import write_demo_shards
from tests.integration.test_train import workers_of
from tests.slurm_cluster import SlurmCluster, slurm_cluster

ROOT = Path(__file__).parents[2]
MAX_STEPS, HELD = 60, 12
VAE = {
    "kind": "train",
    "models": {"vae": {"name": "vae/ltx", "size": "tiny"}},
    "objective": {"kind": "autoencoder", "num_statistics_clips": 8},
    "optimizer": {"lr": 1e-3, "ema_decay": 0.9},
    "data": {"num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 2, "num_micro_batches": 2, "cache_mib": 64},
    "trainer": {
        "max_steps": MAX_STEPS, "precision": "fp32", "checkpoint_every": 10, "log_every": 1, "num_threads": 1, "device": "cpu"
    },
    "parallel": {"data_degree": 2},
    "faults": {"max_restarts": 0},
    "wandb": {"mode": "disabled"},
}  # fmt: skip
CLUSTER = {
    "kind": "slurm",
    "nodes": 2,
    "gpus_per_node": 0,
    "time": "30:00",
    "environment": {"OMP_NUM_THREADS": "1"},
    "pass_environment": ["A_TOKEN"],
}
TOKEN = "the-value-of-a-secret"
ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
"""States of a job that has not ended."""


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    """The cluster."""
    with slurm_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards and configs."""
    folder = tmp_path_factory.mktemp("slurm")
    write_demo_shards(folder / "data", num_clips=12)
    (folder / "vae.yaml").write_text(json.dumps({**VAE, "data": {**VAE["data"], "manifest": str(folder / "data")}}))
    environment = {**CLUSTER["environment"], **hold.environment(folder / "hold")}
    (folder / "cluster.yaml").write_text(json.dumps({**CLUSTER, "environment": environment}))
    return folder


@pytest.fixture
def held(work: Path) -> Iterator[Path]:
    """While this file is there, ranks make `HELD` steps and no more in a turn."""
    (work / "hold").write_text(str(HELD))
    yield work / "hold"
    (work / "hold").unlink(missing_ok=True)


LISTENS = """
import os, signal, sys
def stop(*_): sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
signal.pause()
"""


@pytest.fixture(scope="module", autouse=True)
def out_of_time(slurm: SlurmCluster, work: Path) -> str:
    """A job that has two minutes, and does nothing but wait for Slurm to say that one is left; it waits while others work.

    Its script is one of ours that somebody edited: the command is another one.
    """
    options = ("--cluster", str(work / "cluster.yaml"), "--run-dir", str(work / "t"), "--dry-run")
    changes = ("parallel.data_degree=1", "cluster.time='2'", "cluster.stop_before=59")
    shown = videofm("launch", *options, str(work / "vae.yaml"), *changes, slurm=slurm)
    script = shown[shown.index("#!") :]
    (work / "edited.sh").write_text(script.rpartition(" -- ")[0] + f" -- {shlex.join([sys.executable, '-c', LISTENS])}\n")
    (work / "t/launch/0001").mkdir(parents=True)
    return slurm.ask("sbatch", "--parsable", str(work / "edited.sh")).strip()


@pytest.fixture(scope="module")
def straight(work: Path) -> Path:
    """The undisturbed run: two processes of this machine."""
    videofm("train", str(work / "vae.yaml"), "--run-dir", str(work / "straight"))
    return work / "straight"


def videofm(*arguments: str, slurm: SlurmCluster | None = None, code: int = 0) -> str:
    """`videofm ARGUMENTS` as from a login node; what it says on both streams."""
    environment = {**(slurm.environment if slurm is not None else os.environ), "A_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-m", "videofm", *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def launch(slurm: SlurmCluster, work: Path, run: Path, *overrides: str) -> str:
    """Launch the training into `run`; the number of its job."""
    arguments = ("--cluster", str(work / "cluster.yaml"), str(work / "vae.yaml"), "--run-dir", str(run), *overrides)
    videofm("launch", *arguments, slurm=slurm)
    jobs = json.loads((run / "launch.json").read_text())["jobs"]
    assert len(jobs) == 1
    return str(jobs[0]["id"])


def status(slurm: SlurmCluster, run: Path) -> dict:
    return json.loads(videofm("launch", "status", str(run), "--json", slurm=slurm))


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def last_step(run: Path) -> int:
    return max((row["step"] for row in rows(run)), default=0)


def wait_for_step(slurm: SlurmCluster, run: Path, job: str, step: int) -> None:
    def reached() -> bool:
        assert slurm.fact(job, "JobState") in ALIVE, f"{slurm.story(job)}\n{said(run)}"
        return last_step(run) >= step

    slurm.wait_until(reached, f"step {step}")


def wait_for_end(slurm: SlurmCluster, run: Path, job: str) -> str:
    """The state in which a job ends."""
    slurm.wait_until(lambda: slurm.fact(job, "JobState") not in ALIVE, f"job {job} ends\n{said(run)}")
    return slurm.fact(job, "JobState")


def said(run: Path) -> str:
    return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in (run / "launch").rglob("*.log"))


def assert_same_end(run: Path, straight: Path) -> None:
    """Every loss, and the last weights, moving averages and optimizer state, equal to the last bit."""
    assert [(row["step"], row["loss"]) for row in rows(run)] == [(row["step"], row["loss"]) for row in rows(straight)]
    last = f"checkpoints/step_{MAX_STEPS:08d}"
    files = sorted((straight / last).rglob("*.safetensors"))
    assert files
    for path in files:
        ours, theirs = load_file(run / last / path.relative_to(straight / last)), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in theirs), path


def test_a_cancelled_launch_saves_and_another_one_ends_as_a_local_run(
    slurm: SlurmCluster, work: Path, straight: Path, held: Path
) -> None:
    """Two nodes, a task each; `cancel` has them save, and does not requeue; `status` and `logs` tell about real jobs."""
    run = work / "cancelled"
    first = launch(slurm, work, run)
    wait_for_step(slurm, run, first, 4)
    told = status(slurm, run)
    assert [job["state"] for job in told["jobs"]] == ["running"] and "n[1-2]" in told["jobs"][0]["detail"]
    assert told["stages"][0]["step"] >= 4 and told["stages"][0]["max_steps"] == MAX_STEPS
    assert "works for" in videofm(
        "launch", "--cluster", str(work / "cluster.yaml"), str(work / "vae.yaml"), "--run-dir", str(run), slurm=slurm, code=2
    )
    assert f"job {first} saves and stops" in videofm("launch", "cancel", str(run), slurm=slurm)
    assert wait_for_end(slurm, run, first) == "FAILED" and slurm.fact(first, "Restarts") == "0"
    told = status(slurm, run)
    assert (told["jobs"][0]["state"], told["stages"][0]["state"]) == ("interrupted", "interrupted")
    stopped = last_step(run)
    assert 4 <= stopped < MAX_STEPS and (run / f"checkpoints/step_{stopped:08d}/COMMITTED.json").exists()
    held.unlink()
    second = launch(slurm, work, run)
    assert wait_for_end(slurm, run, second) == "COMPLETED", said(run)
    assert status(slurm, run)["jobs"][0]["state"] == "finished"
    assert f"step {MAX_STEPS}/{MAX_STEPS}" in videofm("launch", "logs", str(run), slurm=slurm)
    assert "preflight: 2 ranks" in videofm("launch", "logs", str(run), "--rank", "0", "--lines", "500", slurm=slurm)
    assert "rank 2 wrote nothing" in videofm("launch", "logs", str(run), "--rank", "2", slurm=slurm, code=2)
    assert_same_end(run, straight)
    assert not [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_stages_are_jobs_that_wait_for_each_other_in_a_folder_of_any_name(slurm: SlurmCluster, work: Path) -> None:
    """Two stages on CPUs, one after the other, from a folder whose name no shell and no pattern of Slurm may read."""
    run = work / """it's a "run" $(touch pwned) `x` ünï 100% %j #1;"""
    (work / "recipe.yaml").write_text(
        json.dumps(
            {
                "name": "two",
                "stages": {
                    "demo": {"kind": "demo_data", "num_videos": 2, "num_frames": 4, "size": 32},
                    "report": {"kind": "report", "run": "${run}"},
                },
            }
        )
    )
    arguments = ("--cluster", str(work / "cluster.yaml"), str(work / "recipe.yaml"), "cluster.stages=separate")
    videofm("launch", *arguments, "--run-dir", str(run), slurm=slurm)
    demo, report = json.loads((run / "launch.json").read_text())["jobs"]
    assert (demo["stage"], report["stage"]) == ("demo", "report")
    assert slurm.fact(report["id"], "Dependency").startswith(f"afterok:{demo['id']}") or not slurm_waits(slurm, demo["id"])
    assert wait_for_end(slurm, run, report["id"]) == "COMPLETED", said(run)
    assert slurm.fact(demo["id"], "JobState") == "COMPLETED"
    assert (run / "report.html").is_file() and (run / demo["log"]).is_file()
    assert not list(ROOT.glob("pwned")) and not list(work.glob("pwned"))
    assert [job["state"] for job in status(slurm, run)["jobs"]] == ["finished", "finished"]
    assert "nothing to launch" in videofm("launch", *arguments, "--run-dir", str(run), slurm=slurm, code=2)


def test_slurm_warns_a_job_whose_time_is_almost_up(slurm: SlurmCluster, work: Path, out_of_time: str) -> None:
    """`#SBATCH --signal` of the template, by Slurm's own clock; the command ends with 75 and the job is back in the queue."""
    slurm.wait_until(lambda: slurm.fact(out_of_time, "Restarts") != "0", f"a warning\n{said(work / 't')}")
    assert "saved and stopped in time; back into the queue for turn 2" in said(work / "t")
    slurm.ask("scancel", out_of_time)


def _waits_for_its_time(told: dict[str, str]) -> bool:
    """What `status` says of a requeued job; for a moment before, that Slurm is still clearing the last turn away."""
    return told["state"] == "pending" and "BeginTime" in told["detail"]


def test_warned_preempted_and_a_node_lost(slurm: SlurmCluster, work: Path, straight: Path, held: Path) -> None:
    """One job in five turns. It is warned as before its time is up, and before the verb listens; a job of a higher partition
    takes its nodes; a node is lost with all that runs there, which Slurm knows at once, and another time does not. Each time it
    goes back into the queue, and on from what was saved."""
    run = work / "disturbed"
    job = launch(slurm, work, run)
    slurm.wait_until(lambda: (run / f"launch/0001/job_{job}.json").exists(), "the job begins")
    slurm.ask("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_until(lambda: slurm.fact(job, "Restarts") == "1", f"the job was warned and requeued\n{said(run)}")
    assert "back into the queue for turn 2" in said(run)
    warned = last_step(run)
    assert warned < MAX_STEPS
    if warned == 0:
        assert "stopped on request before a rank began" in said(run)
    else:
        assert (run / f"checkpoints/step_{warned:08d}/COMMITTED.json").exists()
    slurm.wait_until(lambda: _waits_for_its_time(status(slurm, run)["jobs"][0]), "status says that the job waits")

    slurm.release(job)
    wait_for_step(slurm, run, job, warned + 4)
    other = slurm.ask(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    ).strip()
    slurm.wait_until(lambda: slurm.fact(job, "Restarts") == "2", f"the job was preempted and requeued\n{said(run)}")
    slurm.wait_until(lambda: slurm.fact(other, "JobState") == "COMPLETED", "the job that took the nodes is done")
    preempted = last_step(run)
    assert warned + 4 <= preempted < MAX_STEPS and (run / f"checkpoints/step_{preempted:08d}/COMMITTED.json").exists()

    slurm.release(job)
    wait_for_step(slurm, run, job, preempted + HELD)
    newest = run / f"checkpoints/step_{(preempted + HELD) // 10 * 10:08d}/COMMITTED.json"
    slurm.wait_until(newest.exists, f"{newest.parent.name} is committed")
    killed = slurm.lose_node("n2")
    assert [command for command in killed if "videofm.train.worker" in command], killed
    slurm.wait_until(lambda: slurm.fact(job, "Restarts") == "3", f"Slurm requeued the job\n{said(run)}")
    assert last_step(run) < MAX_STEPS
    slurm.bring_back("n2", job)
    slurm.release(job)
    wait_for_step(slurm, run, job, last_step(run) + 2)
    slurm.lose_node("n2", tell=False)
    held.unlink()
    slurm.wait_until(lambda: slurm.fact(job, "Restarts") == "4", f"the job saw that a node is lost\n{said(run)}")
    assert "n2 runs nothing any more; back into the queue for turn 5, with the same nodes" in said(run)
    assert slurm.fact(job, "ExcNodeList") == "(null)" and last_step(run) < MAX_STEPS  # there is no third node
    slurm.bring_back("n2", job)
    slurm.release(job)
    assert wait_for_end(slurm, run, job) == "COMPLETED", f"{slurm.story(job)}\n{said(run)}"
    record = json.loads((run / f"launch/0001/job_{job}.json").read_text())
    assert [turn["turn"] for turn in record["turns"]] == [0, 1, 2, 3, 4] and record["stopped"] is None
    assert_same_end(run, straight)


ALLOCATED = """\
import subprocess, sys
for turn in ("first", "second"):
    print(turn, subprocess.call([sys.executable, "-m", "videofm", *sys.argv[1:]]), flush=True)
"""


def test_ranks_in_a_shell_of_salloc_end_with_the_verb(slurm: SlurmCluster, work: Path, straight: Path, held: Path) -> None:
    """The verb is killed and the allocation stays: its ranks end, and the same command goes on in the same shell, alone."""
    run = work / "allocated"
    environment = {**slurm.environment, "OMP_NUM_THREADS": "1", **hold.environment(held), "VIDEOFM_RANKS": "slurm"}
    shell = subprocess.Popen(
        ["salloc", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-c", ALLOCATED,
         "train", str(work / "vae.yaml"), "--run-dir", str(run)],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    slurm.wait_until(lambda: last_step(run) >= HELD, "the ranks are in mid-training")
    slurm.wait_until((run / "checkpoints/step_00000010/COMMITTED.json").exists, "step 10 is committed")
    first = workers_of(run)
    slurm.wait_until(lambda: bool(verbs := _verbs(run)) and not os.kill(verbs[0], signal.SIGKILL), "the verb is killed")
    slurm.wait_until(lambda: not set(first) & set(workers_of(run)), "its ranks have ended", 60.0)
    held.unlink()
    told, _ = shell.communicate(timeout=600)
    assert "first -9" in told and "second 0" in told, told
    assert len(list((run / "attempts").iterdir())) == 2 and "resuming from step_00000010" in (run / "log.txt").read_text()
    assert_same_end(run, straight)


def _verbs(run: Path) -> list[int]:
    """Processes of `videofm train` in `run`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if words[1:4] == [b"-m", b"videofm", b"train"] and str(run).encode() in words:
                found.append(int(folder.name))
    return found


def slurm_waits(slurm: SlurmCluster, job: str) -> bool:
    """Whether a job has not ended."""
    return slurm.fact(job, "JobState") in ("PENDING", "CONFIGURING", "RUNNING")
