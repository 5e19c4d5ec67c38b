"""Training as a user runs it: processes, kills, stops and resumes, on one rank, on two and on four.

Runs that somebody disturbs have one rank each, and are made two at a time. Their ranks wait for it at a step (`tests/hold.py`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from launch import local
from tests import hold
from tests.demo_shards import write_demo_shards
from tests.helpers import ForkedPython
from videofm import cli, models, sampling
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


def train(
    folder: Path, name: str, config: dict, *overrides: str, max_steps: int, held: int | None = None
) -> subprocess.Popen[str]:
    """Start `videofm train` for a config, into the run directory `name`. Where `held` is given, its ranks make so many steps,
    and then wait until somebody kills them or asks them to stop."""
    environment = None
    if held is not None:
        file = folder / f"{name}.hold"
        file.write_text(str(held))
        environment = {**os.environ, **hold.environment(file)}
    command = [sys.executable, "-m", "videofm", *train_arguments(folder, name, config, *overrides, max_steps=max_steps)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root, env=environment)


def train_arguments(folder: Path, name: str, config: dict, *overrides: str, max_steps: int) -> list[str]:
    """Write the config, and say what comes behind `videofm`."""
    data = {"manifest": str(folder / "data"), "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 3}
    trainer = {"max_steps": max_steps, "precision": "fp32", "checkpoint_every": 3, "log_every": 1, "num_threads": 1}
    data |= {"num_micro_batches": 2, "cache_mib": 64}
    full = {**config, "data": data, "trainer": trainer, "wandb": {"mode": "disabled"}}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(full).replace('"VAE"', json.dumps(str(folder / "vae"))))
    return ["train", str(path), "--run-dir", str(folder / name), *overrides]


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    try:
        output, _ = process.communicate(timeout=1800)
    finally:
        process.kill()
    assert process.returncode == code, output
    assert "Traceback" not in output
    return output


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until `process` has done `step` steps in `run`; it dies where it does not come so far."""
    deadline = time.monotonic() + 600
    try:
        while not (run / "metrics.jsonl").exists() or not rows(run) or rows(run)[-1]["step"] < step:
            assert time.monotonic() < deadline and process.poll() is None, f"step {step} was not reached"
            time.sleep(0.02)
    except BaseException:
        process.kill()
        raise


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


def kill_and_resume(step: int, work: Path) -> Path:
    """SIGKILL the verb once it has done `step` steps; its rank dies with it. Then the same command again."""
    run = work / f"killed_{step}"
    process = train(work, run.name, DIT, max_steps=20, held=step)
    wait_for_step(process, run, step)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while workers_of(run):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.05)
    assert len(rows(run)) < 20, "the kill came too late"
    finished(train(work, run.name, DIT, max_steps=20))
    return run


def kill_the_rank(work: Path) -> Path:
    run = work / "killed_rank"
    process = train(work, run.name, DIT, "faults.max_restarts=0", max_steps=20, held=7)
    wait_for_step(process, run, 7)
    for worker in workers_of(run):
        os.kill(worker, signal.SIGKILL)
    assert "rank 0 was killed by SIGKILL; run the same command again" in finished(process, code=1)
    finished(train(work, run.name, DIT, max_steps=20))
    return run


def stop_and_go_on(work: Path) -> Path:
    run = work / "stopped"
    process = train(work, run.name, DIT, max_steps=20, held=4)
    wait_for_step(process, run, 4)
    process.send_signal(signal.SIGTERM)
    assert "stopped on request after step" in finished(process, code=75)
    stopped_at = rows(run)[-1]["step"]
    assert stopped_at < 20 and (run / f"checkpoints/step_{stopped_at:08d}").is_dir()
    finished(train(work, run.name, DIT, max_steps=20))
    return run


def damage_and_resume(work: Path) -> Path:
    """Damage the last checkpoint of a run that is asked to go on: it resumes from the one before."""
    run = work / "damaged"
    process = train(work, run.name, DIT, max_steps=20, held=10)
    wait_for_step(process, run, 10)
    process.kill()
    process.communicate()
    folders = sorted((run / "checkpoints").glob("step_*"))
    (folders[-1] / "state.json").write_text("{}")
    output = finished(train(work, run.name, DIT, max_steps=20))
    assert f"{folders[-1].name} is damaged: state.json" in output.replace("\n", " ")
    assert f"resuming from {folders[-2].name}" in output
    return run


KILLS = (2, 8, 15)
"""Before the first checkpoint, and between later ones."""
DISTURBED: dict[str, Callable[[Path], Path]] = {
    **{f"killed_{step}": partial(kill_and_resume, step) for step in KILLS},
    "killed_rank": kill_the_rank,
    "stopped": stop_and_go_on,
    "damaged": damage_and_resume,
}


@pytest.fixture(scope="module")
def disturbed(work: Path, straight: Path) -> Iterator[dict[str, Future[Path]]]:
    """Each of `DISTURBED` under way: its result is the run directory, or what went wrong."""
    pool = ThreadPoolExecutor(2)
    try:
        yield {name: pool.submit(disturb, work) for name, disturb in DISTURBED.items()}
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", DISTURBED)
def test_a_disturbed_run_ends_bitwise_as_the_undisturbed_one(disturbed, straight, name):
    """Killed, its rank killed, stopped by SIGTERM, its newest checkpoint damaged: the same command then ends the same."""
    assert_same_end(disturbed[name].result(), straight)


@pytest.mark.parametrize("step", KILLS)
def test_a_run_that_was_killed_resumes_where_there_is_a_checkpoint(disturbed, step):
    log = (disturbed[f"killed_{step}"].result() / "log.txt").read_text()
    assert (step == 2) != any("resuming from step_" in line for line in log.splitlines())


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


def sample(run: Path) -> torch.Tensor:
    return sampling.generate(run, ["a red circle", "a square"], seed=3, num_frames=9, height=32, width=32, num_steps=4)


@pytest.fixture(scope="module")
def video(straight: Path) -> torch.Tensor:
    """What the undisturbed run makes of some noise."""
    return sample(straight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_loss_curve_and_the_samples_of_one_rank(work, straight, video, layout):
    """The same clips on four processes: losses to 1e-4 over 20 steps, and then the same videos of the same noise.

    The verb runs here, and forks its ranks where it would start them; those of the test below are started.
    """
    run = work / layout
    degrees = (f"parallel.{degree}" for degree in LAYOUTS[layout])
    with mock.patch.object(local, "_start", ForkedPython.as_started):
        assert cli.main(train_arguments(work, layout, DIT, *degrees, max_steps=20)) == 0
    one, four = rows(straight), rows(run)
    assert [row["step"] for row in four] == list(range(1, 21))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, four, strict=True)) < 1e-4
    assert max(abs(a["grad_norm"] - b["grad_norm"]) for a, b in zip(one, four, strict=True)) < 1e-3
    assert video.std() > 0.01
    assert (video - sample(run)).abs().max() < 1e-3


def test_a_run_goes_on_with_another_number_of_ranks(work, straight):
    """Killed on one rank, resumed on two under another ZeRO stage, stopped, and resumed on four that split samples and weights:
    the same order of samples, and losses to 1e-4."""
    run = work / "more_ranks"
    process = train(work, run.name, DIT, max_steps=20, held=8)
    wait_for_step(process, run, 8)
    process.kill()
    process.communicate()
    # Ten steps, from step 6 or, where that was not saved any more, from step 3: past 13 and not to the end.
    process = train(work, run.name, DIT, "parallel.data_degree=2", "parallel.zero_stage=3", max_steps=20, held=10)
    wait_for_step(process, run, 13)
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


def test_statistics_of_a_sharded_vae_are_those_of_its_whole_weights(work: Path) -> None:
    """ZeRO 3 on two ranks: the file names the hash of the checkpoint's encoder, so it applies to what is loaded."""
    run = work / "sharded_vae"
    finished(train(work, run.name, VAE, "parallel.data_degree=2", "parallel.zero_stage=3", max_steps=4))
    vae = models.load(run)
    measured = vae.latent_statistics.hash
    vae.latents_mean.zero_()
    assert apply_statistics(vae, run).hash == vae.latent_statistics.hash == measured
    assert [json.loads(row)["step"] for row in (run / "diagnostics.jsonl").read_text().splitlines()] == [4]
