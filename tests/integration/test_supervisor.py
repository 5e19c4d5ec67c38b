"""The supervisor on real trainings of two ranks: a rank dies, hangs, or is gone for good, and one command ends all the same.

Faults happen inside of the ranks (`tests.faults`), at the same point of the training each time. Ranks are forked from processes
that made their imports (`tests.helpers`), but for those of `videofm train` as a user starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file

from launch import local
from launch import supervise as supervisor
from launch.local import LocalRanks
from launch.ranks import Outcome
from tests.demo_shards import write_demo_shards
from tests.faults import Fault, environment, fired
from tests.kill_matrix import forked
from videofm import cli
from videofm.report.page import build
from videofm.run_dir import RunDirectory, read_json, read_jsonl

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 8
LAST = f"checkpoints/step_{NUM_STEPS:08d}"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, and a config that trains a small VAE on them: two ranks, a checkpoint every third step."""
    folder = tmp_path_factory.mktemp("supervisor")
    write_demo_shards(folder / "data", num_clips=24)
    data = {"manifest": str(folder / "data"), "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 2}
    trainer = {"precision": "fp32", "max_steps": NUM_STEPS, "checkpoint_every": 3, "log_every": 1, "num_threads": 1}
    config = {
        "kind": "train",
        "models": {"vae": {"name": "vae/ltx", "size": "tiny"}},
        "objective": {"kind": "autoencoder", "num_statistics_clips": 4},
        "data": data | {"num_micro_batches": 2, "cache_mib": 64},
        "optimizer": {"lr": 1e-3, "ema_decay": 0.9},
        # Saved at once: a fault after a step finds the checkpoint of that step, not one that is on its way.
        "trainer": trainer | {"device": "cpu", "asynchronous_checkpoints": False},
        "parallel": {"data_degree": 2},
        "wandb": {"mode": "disabled"},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def command(work: Path, run: str, *overrides: str) -> list[str]:
    return ["train", str(work / "config.yaml"), "--run-dir", str(work / run), *overrides]


def train(
    work: Path, run: str, *overrides: str, faults: Sequence[Fault] = (), census: Path | None = None
) -> tuple[int, list[dict]]:
    """`videofm train` in this process, with forked ranks: its exit code, and the faults that happened."""
    marks = work / f"{run}_marks"
    marks.mkdir(exist_ok=True)
    with (
        mock.patch.dict(os.environ, environment(faults, marks, census)),
        mock.patch.object(local, "_start", forked),
        mock.patch.object(supervisor, "FIRST_PAUSE", 0.1),
    ):
        return cli.main(command(work, run, *overrides)), fired(marks)


def start(work: Path, run: str, *overrides: str, faults: Sequence[Fault] = ()) -> subprocess.Popen[str]:
    """`videofm train` as a user starts it."""
    (work / f"{run}_marks").mkdir(exist_ok=True)
    environ = {**os.environ, **environment(faults, work / f"{run}_marks")}
    arguments = [sys.executable, "-m", "videofm", *command(work, run, *overrides)]
    return subprocess.Popen(arguments, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def straight(work: Path) -> Path:
    """The undisturbed run."""
    assert train(work, "straight", census=work / "census") == (0, [])
    return work / "straight"


@pytest.fixture(scope="module")
def in_step(work: Path, straight: Path) -> Callable[..., Fault]:
    """Makes a fault of a rank in the backward pass of the n-th step of an attempt. Engines make some passes before the first
    step; then a rank has one micro-batch a step."""
    before = read_json(work / "census" / "rank_1.json")["backward"] - NUM_STEPS
    assert 0 <= before < NUM_STEPS

    def fault(number: int, rank: int = 1, signal: str = "SIGKILL") -> Fault:
        return Fault(rank, "backward", before + number, signal)

    return fault


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in RunDirectory(run).metrics()]


def assert_same_end(run: Path, straight: Path) -> None:
    """Every loss and the last weights, averages and optimizer state, equal to the last bit."""
    assert losses(run) == losses(straight) and len(losses(run)) == NUM_STEPS
    names = sorted(path.relative_to(straight / LAST) for path in (straight / LAST).rglob("*.safetensors"))
    assert len(names) >= 3 and names == sorted(path.relative_to(run / LAST) for path in (run / LAST).rglob("*.safetensors"))
    for name in names:
        ours, theirs = load_file(run / LAST / name), load_file(straight / LAST / name)
        assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in theirs), name


def ends(run: Path) -> list[str]:
    """How the attempts of a run ended."""
    return [event["state"] for event in read_jsonl(run / "events.jsonl") if event["event"] == "ended"]


def test_a_killed_rank_costs_nothing_but_time(work: Path, straight: Path, in_step: Callable[..., Fault]) -> None:
    """SIGKILL in the backward pass of step 5: the same `videofm train` goes on from step 3, and ends as if nothing had been.

    Of the time, step 4 was done twice, and what was useful is a share of the whole; the report page tells it.
    """
    process = start(work, "killed", "faults.max_restarts=1", faults=[in_step(5)])
    try:
        output, _ = process.communicate(timeout=1800)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in output, output
    (mark,) = fired(work / "killed_marks")
    assert (mark["rank"], mark["moment"]) == (1, "backward")
    run = work / "killed"
    assert_same_end(run, straight)
    assert ends(run) == ["died", "finished"]
    assert "attempt 1 ended (died): rank 1 was killed by SIGKILL; rank 0 says:" in output.replace("\n", " ")
    assert [read_json(path)["state"] for path in sorted(run.glob("attempts/*/outcome.json"))] == ["failed", "finished"]
    results = read_json(run / "attempts/0002/outcome.json")["results"]
    goodput = results["goodput"]
    assert {**goodput, "about": mock.ANY} == read_json(run / "goodput.json")
    assert 0 < goodput["effective_training_time"] < 1
    assert (goodput["num_attempts"], goodput["num_redone_steps"]) == (2, 1)
    assert min(goodput["seconds"][name] for name in ("useful", "startup", "redone", "down", "checkpoint_stall")) > 0
    moments = [event["time"] for event in read_jsonl(run / "events.jsonl")]
    assert goodput["wall_seconds"] == pytest.approx(max(moments) - min(moments), abs=1e-3)
    assert "effective training time" in output and "steps that were done again" in build(run)


class OneRankGone(LocalRanks):
    """Ranks of this machine, of which a launcher says that one that was killed cannot come back."""

    def wait(self) -> Outcome:
        outcome = super().wait()
        return replace(outcome, gone={1: "the second node"}) if outcome.state == "died" else outcome


def test_the_ranks_that_are_left_go_on(
    work: Path, straight: Path, in_step: Callable[..., Fault], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank is stopped in step 2, which is a hang; in the next attempt it is killed, and its place is gone: one rank goes on
    with the batches of both, and has their losses."""
    monkeypatch.setattr(local, "LocalRanks", OneRankGone)
    faults = [in_step(2, signal="SIGSTOP"), in_step(5)]
    options = ("faults.fewer_ranks=true", "faults.max_restarts=2", "faults.hang_timeout=10", "parallel.zero_stage=2")
    code, marks = train(work, "fewer", *options, faults=faults)
    run = work / "fewer"
    assert (code, [mark["signal"] for mark in marks]) == (0, ["SIGSTOP", "SIGKILL"])
    assert ends(run) == ["hung", "died", "finished"]
    assert [event["world_size"] for event in read_jsonl(run / "events.jsonl") if event["event"] == "started"] == [2, 2, 1]
    assert "rank 1 did not answer" in read_json(run / "attempts/0001/outcome.json")["message"]
    ours, theirs = losses(run), losses(straight)
    assert [step for step, _ in ours] == list(range(1, NUM_STEPS + 1))
    assert max(abs(a - b) for (_, a), (_, b) in zip(ours, theirs, strict=True)) < 1e-6


def test_a_crash_that_comes_again_stops_the_run(
    work: Path, straight: Path, in_step: Callable[..., Fault], capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in step 5, and each time that it gets there again: two fruitless attempts are enough. The same command, once the
    cause is gone, ends as if nothing had been."""
    again = in_step(2)  # from the checkpoint of step 3 on
    code, marks = train(work, "again", "faults.max_restarts=9", faults=[in_step(5), again, again, again])
    assert (code, len(marks), ends(work / "again")) == (1, 3, ["died"] * 3)
    said = capsys.readouterr().err
    assert (
        "2 attempts in a row ended without a step beyond 4, so another one would not help: rank 1 was killed by SIGKILL" in said
    )
    code, _ = train(work, "again", "faults.max_restarts=0")
    assert code == 0
    assert_same_end(work / "again", straight)


def test_the_limit_of_restarts(work: Path, in_step: Callable[..., Fault], capsys: pytest.CaptureFixture[str]) -> None:
    """The second attempt comes further than the first, and is the last one allowed."""
    faults = [in_step(2, rank=0), in_step(4), in_step(4)]
    code, marks = train(work, "limit", "faults.max_restarts=1", faults=faults)
    assert (code, len(marks)) == (1, 2)
    assert (
        "2 attempts failed, and faults.max_restarts 1 allows no more; the last: rank 1 was killed by SIGKILL"
        in capsys.readouterr().err
    )


def test_a_wrong_request_is_made_once(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data that are not there will not be there in the next attempt."""
    code, _ = train(work, "wrong", "data.manifest=nowhere")
    assert code != 0 and len(list((work / "wrong" / "attempts").iterdir())) == 1
    assert "nowhere" in capsys.readouterr().err


def processes_of(run: Path, sessions: set[int]) -> Iterator[int]:
    """Processes that train in `run`, and all that they started: ranks lead sessions of their own."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line, state = (folder / "cmdline").read_bytes(), (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if b"videofm.train.worker" in line and str(run).encode() in line:
            sessions.add(int(folder.name))
        if int(state[3]) in sessions and state[0] not in "ZX":
            yield int(folder.name)


@pytest.mark.parametrize("moment", ["start", "training"])
def test_no_rank_outlives_who_launched_it(work: Path, moment: str) -> None:
    """SIGKILL of the verb, while its ranks import what they need (which may last) and in mid-training: nothing is left of them,
    nor of the processes that they started."""
    run = work / f"orphans_{moment}"
    process = start(work, run.name, "trainer.max_steps=100000")
    sessions: set[int] = set()
    deadline = time.monotonic() + 600
    try:
        while len(list(processes_of(run, sessions))) < 2 or (moment == "training" and len(RunDirectory(run).metrics()) < 2):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
    process.communicate()
    deadline = time.monotonic() + (60 if moment == "training" else 120)
    while left := list(processes_of(run, sessions)):
        assert time.monotonic() < deadline, f"processes {left} outlived their launcher"
        time.sleep(0.05)


def test_who_starts_the_ranks_is_known(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("VIDEOFM_RANKS", "slrum")
    assert cli.main(command(work, "unknown")) == 2
    assert "no launcher (VIDEOFM_RANKS) is called 'slrum', did you mean 'slurm'?" in capsys.readouterr().err
