"""Training as a user runs it: processes, kills, stops and resumes, on one rank and on two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.demo_shards import write_demo_shards
from videofm import models, sampling
from videofm.models.vae.statistics import apply_statistics

VAE = {
    "kind": "train",
    "models": {"vae": {"name": "vae/ltx", "size": "tiny"}},
    "objective": {"kind": "autoencoder", "num_statistics_clips": 16},
    "optimizer": {"lr": 1e-3, "ema_decay": 0.9},
}
DIT = {
    "kind": "train",
    "models": {
        "vae": {"path": "VAE"},
        "dit": {"name": "dit/ltx", "size": "tiny"},
        "text_encoder": {"name": "text/t5", "size": "tiny"},
    },
    "objective": {"kind": "flow_matching", "noise_levels": {"kind": "shifted_logit_normal"}, "train_text_encoder": True},
    "optimizer": {"lr": 1e-3, "ema_decay": 0.9, "warmup_steps": 3},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A folder with shards and a VAE that was trained for four steps."""
    folder = tmp_path_factory.mktemp("train")
    write_demo_shards(folder / "data", num_clips=24)
    finished(train(folder, "vae", VAE, max_steps=4))
    return folder


def train(folder: Path, name: str, config: dict, *overrides: str, max_steps: int) -> subprocess.Popen:
    """Start `videofm train` for a config, into the run directory `name`."""
    data = {"manifest": str(folder / "data"), "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 3}
    trainer = {"max_steps": max_steps, "precision": "fp32", "checkpoint_every": 3, "log_every": 1, "num_threads": 1}
    data |= {"num_micro_batches": 2, "cache_mib": 64}
    full = {**config, "data": data, "trainer": trainer, "wandb": {"mode": "disabled"}}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(full).replace('"VAE"', json.dumps(str(folder / "vae"))))
    command = [sys.executable, "-m", "videofm", "train", str(path), "--run-dir", str(folder / name), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[2])


def finished(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == code, output
    assert "Traceback" not in output
    return output


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not rows(run) or rows(run)[-1]["step"] < step:
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def workers_of(run: Path) -> list[int]:
    """Processes that train in `run`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"videofm.train.worker" in command and str(run).encode() in command:
            found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def straight(work) -> Path:
    """The undisturbed run: 20 steps of the DiT in fp32 on one rank."""
    finished(train(work, "straight", DIT, max_steps=20))
    return work / "straight"


def assert_same_end(run: Path, straight: Path) -> None:
    """Every loss, and the last weights, moving averages and optimizer state, equal to the last bit."""
    assert [(row["step"], row["loss"]) for row in rows(run)] == [(row["step"], row["loss"]) for row in rows(straight)]
    last = "checkpoints/step_00000020"
    for path in sorted((straight / last).rglob("*.safetensors")):
        ours, theirs = load_file(run / last / path.relative_to(straight / last)), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in theirs), path


@pytest.mark.parametrize("step", [2, 8, 15])
def test_sigkill_and_resume_is_bitwise(work, straight, step):
    """SIGKILL the verb (its rank dies with it) before the first checkpoint and between later ones; the same command then ends
    as the undisturbed run did."""
    run = work / f"killed_{step}"
    process = train(work, run.name, DIT, max_steps=20)
    wait_for_step(run, step)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while workers_of(run):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.05)
    assert len(rows(run)) < 20, "the kill came too late"
    finished(train(work, run.name, DIT, max_steps=20))
    assert_same_end(run, straight)
    assert (step == 2) != any("resuming from step_" in line for line in (run / "log.txt").read_text().splitlines())


def test_a_killed_rank_fails_the_verb_and_says_how_to_go_on(work, straight):
    run = work / "killed_rank"
    process = train(work, run.name, DIT, max_steps=20)
    wait_for_step(run, 7)
    for worker in workers_of(run):
        os.kill(worker, signal.SIGKILL)
    assert "rank 0 was killed by SIGKILL; run the same command again" in finished(process, code=1)
    finished(train(work, run.name, DIT, max_steps=20))
    assert_same_end(run, straight)


def test_sigterm_saves_and_stops_and_the_run_goes_on(work, straight):
    run = work / "stopped"
    process = train(work, run.name, DIT, max_steps=20)
    wait_for_step(run, 4)
    process.send_signal(signal.SIGTERM)
    assert "stopped on request after step" in finished(process, code=75)
    stopped_at = rows(run)[-1]["step"]
    assert stopped_at < 20 and (run / f"checkpoints/step_{stopped_at:08d}").is_dir()
    finished(train(work, run.name, DIT, max_steps=20))
    assert_same_end(run, straight)


def test_two_ranks_give_the_loss_curve_of_one(work, straight):
    """The same global batch on two processes: losses to 1e-4 over 20 steps."""
    finished(train(work, "two_ranks", DIT, "parallel.data_degree=2", max_steps=20))
    one, two = rows(straight), rows(work / "two_ranks")
    assert [row["step"] for row in two] == list(range(1, 21))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)) < 1e-4
    assert max(abs(a["grad_norm"] - b["grad_norm"]) for a, b in zip(one, two, strict=True)) < 1e-3


LAYOUTS = {
    "ulysses": ("context_degree=4", "zero_stage=2"),
    "unified": ("context_degree=4", "context_strategy=unified", "ulysses_degree=2", "activation_checkpointing=selective"),
    "ring": ("data_degree=2", "context_degree=2", "context_strategy=ring", "zero_stage=3"),
    "tensor": ("data_degree=2", "tensor_degree=2"),
    "all_ways": ("context_degree=2", "tensor_degree=2", "zero_stage=0"),
}
"""Five ways to train on four processes."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_loss_curve_and_the_samples_of_one_rank(work, straight, layout):
    """The same clips on four processes: losses to 1e-4 over 20 steps, and then the same videos of the same noise."""
    run = work / layout
    finished(train(work, layout, DIT, *(f"parallel.{degree}" for degree in LAYOUTS[layout]), max_steps=20))
    one, four = rows(straight), rows(run)
    assert [row["step"] for row in four] == list(range(1, 21))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, four, strict=True)) < 1e-4
    assert max(abs(a["grad_norm"] - b["grad_norm"]) for a, b in zip(one, four, strict=True)) < 1e-3
    videos = [
        sampling.generate(folder, ["a red circle", "a square"], seed=3, num_frames=9, height=32, width=32, num_steps=4)
        for folder in (straight, run)
    ]
    assert videos[0].std() > 0.01
    assert (videos[0] - videos[1]).abs().max() < 1e-3


def test_a_run_goes_on_with_another_number_of_ranks(work, straight):
    """Killed on one rank, resumed on two under another ZeRO stage, stopped, and resumed on four that split samples and weights:
    the same order of samples, and losses to 1e-4."""
    run = work / "more_ranks"
    process = train(work, run.name, DIT, max_steps=20)
    wait_for_step(run, 8)
    process.kill()
    process.communicate()
    process = train(work, run.name, DIT, "parallel.data_degree=2", "parallel.zero_stage=3", max_steps=20)
    wait_for_step(run, 13)
    process.kill()
    process.communicate()
    finished(train(work, run.name, DIT, "parallel.context_degree=2", "parallel.tensor_degree=2", max_steps=20))
    one, two = rows(straight), rows(run)
    assert [row["step"] for row in two] == list(range(1, 21))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)) < 1e-4
    assert "resuming from step_" in (run / "log.txt").read_text()


def test_a_run_directory_of_another_config_is_refused(work, straight):
    output = finished(train(work, "straight", DIT, "optimizer.lr=0.5", max_steps=20), code=2)
    assert "was made by another config" in output and "optimizer.lr" in output


def test_a_damaged_newest_checkpoint_falls_back(work, straight):
    """Damage the last checkpoint of a run that is asked to go on: it resumes from the one before and ends the same."""
    run = work / "damaged"
    process = train(work, run.name, DIT, max_steps=20)
    wait_for_step(run, 10)
    process.kill()
    process.communicate()
    folders = sorted((run / "checkpoints").glob("step_*"))
    (folders[-1] / "state.json").write_text("{}")
    output = finished(train(work, run.name, DIT, max_steps=20))
    assert f"{folders[-1].name} is damaged: state.json" in output.replace("\n", " ")
    assert f"resuming from {folders[-2].name}" in output
    assert_same_end(run, straight)


def test_statistics_of_a_sharded_vae_are_those_of_its_whole_weights(work: Path) -> None:
    """ZeRO 3 on two ranks: the file names the hash of the checkpoint's encoder, so it applies to what is loaded."""
    run = work / "sharded_vae"
    finished(train(work, run.name, VAE, "parallel.data_degree=2", "parallel.zero_stage=3", max_steps=4))
    vae = models.load(run)
    measured = vae.latent_statistics.hash
    vae.latents_mean.zero_()
    assert apply_statistics(vae, run).hash == vae.latent_statistics.hash == measured
    assert [json.loads(row)["step"] for row in (run / "diagnostics.jsonl").read_text().splitlines()] == [4]
