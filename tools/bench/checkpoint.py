"""What checkpoints cost: the wait for an asynchronous save against a synchronous one's, their size, and a resumed start.

One process and a stack of matrices under the real engine; weights, their moving average and Adam's moments make up the state.
Ratios are of one run on one machine; seconds depend on its disk.

    python -m tools.bench.checkpoint                        # a state of 1 GB
    python -m tools.bench.checkpoint --gigabytes 0.2 --folder /mnt/disk
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from videofm.checkpoint.keep import KeepRules
from videofm.checkpoint.resume import newest_whole
from videofm.checkpoint.saver import Saver
from videofm.config.train import TrainConfig
from videofm.data.draws import PlanState
from videofm.errors import CheckpointError
from videofm.parallel.mesh import create_mesh
from videofm.train.engine import PhaseEngine
from videofm.train.optim import MovingAverage
from videofm.train.state import content, facts, load_state, load_weights
from videofm.types import Batch, Loss

WIDTH, REPEATS = 1024, 5
MOST_STALL, MOST_SIZE, MOST_RESUME = 0.10, 1.02, 1.5
"""Aims: wait over a synchronous save's; bytes over those of the tensors; first step after a resume over that of a new run."""


class Objective:
    """The square of what a stack of matrices makes of noise."""

    roles = ("model",)
    phases = {"train": ("model",)}

    def loss(self, models: Any, batch: Batch, rng: Any, phase: str) -> Loss:
        """The sum over the clips."""
        return Loss(models["model"](batch.video.flatten(1)).square().mean(1).sum(), {})


def build(gigabytes: float) -> nn.Module:
    """Matrices of WIDTH x WIDTH whose weights, average and two moments take `gigabytes` in fp32."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(round(gigabytes * 1e9 / 16 / WIDTH**2))))
    model.spec_name, model.config = "bench", _Config()  # type: ignore[assignment]
    return model


@dataclass(frozen=True)
class _Config:
    """Of a model that is in no registry."""

    width: int = WIDTH


def a_job(model: nn.Module, folder: Path) -> Any:
    """The model behind the engine, after no step."""
    config = TrainConfig.model_validate(
        {
            "kind": "train",
            "models": {"model": {"name": "vae/ltx"}},
            "objective": {"kind": "autoencoder"},
            "data": {"manifest": "none", "num_frames": 1, "height": 8, "width": 8, "micro_batch_size": 1},
            "optimizer": {"lr": 1e-4},
            "trainer": {"max_steps": 9, "precision": "fp32", "device": "cpu"},
        }
    )
    mesh = create_mesh(config.parallel, torch.device("cpu"))
    engine = PhaseEngine({"model": model}, Objective(), "train", config, mesh)
    return SimpleNamespace(
        config=config,
        mesh=mesh,
        models={"model": model},
        engines={"train": engine},
        averages={"model": MovingAverage(model.named_parameters(), 0.9)},
        trained_roles=("model",),
        num_samples=0,
        divergence=SimpleNamespace(skipped=[]),
        run=SimpleNamespace(path=folder, fingerprint=None),
        loader=SimpleNamespace(plan=SimpleNamespace(identity={}, check=lambda identity: None)),
    )


def step(job: Any, number: int) -> None:
    """One optimizer step."""
    video: Tensor = torch.randn(1, 1, 1, 1, WIDTH)
    job.engines["train"].step([Batch(video, [""], torch.ones(1), ["0"], number, 1)], lr=1e-4)
    job.averages["model"].update(number)


def waits(job: Any, folder: Path, asynchronous: bool) -> list[float]:
    """Seconds that training waits for each of `REPEATS` saves; the first, which makes the buffers, is left out."""
    saver, found = Saver(folder, KeepRules(1), asynchronous=asynchronous), []
    for number in range(1, REPEATS + 2):
        state, told = content(job, PlanState(step=number)), facts(job, PlanState(step=number), code="bench")
        started = time.perf_counter()
        saver.copy(told, state)
        saver.write()
        found.append(time.perf_counter() - started)
        saver.wait()
    return found[1:]


def first_step(gigabytes: float, folder: Path, resume: bool) -> None:
    """In a process of its own: a start, new or resumed, up to the end of the first step."""
    model, checkpoint = build(gigabytes), newest_whole([folder]) if resume else None
    if resume and checkpoint is None:
        raise CheckpointError(f"{folder} has no checkpoint to resume from")
    if checkpoint is not None:
        load_weights(checkpoint, {"model": model}, ("model",))
    job = a_job(model, folder)
    if checkpoint is not None:
        load_state(job, checkpoint)
    step(job, 1)


def seconds_of_start(gigabytes: float, folder: Path, how: str) -> float:
    """Seconds of a fresh process, imports and all."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "tools.bench.checkpoint", "--start", how, "--gigabytes", str(gigabytes)]
    subprocess.run([*command, "--folder", str(folder)], check=True, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def verdict(stall: float, whole: float, size: float, resume: float) -> tuple[str, bool]:
    """What is told of the three ratios, and whether all aims are met.

    Args:
        stall: seconds of wait for an asynchronous save.
        whole: of a synchronous one.
        size: bytes on disk over bytes of the tensors.
        resume: seconds of a resumed start over those of a new one.
    """
    aims = {"stall": stall / whole <= MOST_STALL, "size": size <= MOST_SIZE, "resume": resume <= MOST_RESUME}
    missed = [name for name, met in aims.items() if not met]
    told = f"stall {stall:.3f} s / {whole:.3f} s = {stall / whole:.3f}; size {size:.4f}; resumed / new start {resume:.2f}"
    return f"{told}; {'missed: ' + ', '.join(missed) if missed else 'aims met'}", not missed


def main(arguments: list[str]) -> int:
    """Measure, tell, and return 0 where the aims are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the state")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder unless given")
    parser.add_argument("--start", choices=("new", "resume"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.start:
        first_step(given.gigabytes, given.folder, given.start == "resume")
        return 0
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        job = a_job(build(given.gigabytes), folder)
        step(job, 0)
        stalls, wholes = waits(job, folder / "thread", True), waits(job, folder / "waits", False)
        written = newest_whole([folder / "thread"])
        assert written is not None
        bytes_on_disk = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
        size = bytes_on_disk / sum(tensor.num_bytes for tensor in content(job, PlanState(step=1)).tensors)
        starts = [[seconds_of_start(given.gigabytes, folder / "thread", how) for _ in range(3)] for how in ("resume", "new")]
        told, met = verdict(median(stalls), median(wholes), size, median(starts[0]) / median(starts[1]))
    print(f"{bytes_on_disk / 1e9:.2f} GB: {told}")
    print(f"waits: asynchronous {[f'{s:.3f}' for s in stalls]}, synchronous {[f'{s:.3f}' for s in wholes]}; starts: {starts}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
