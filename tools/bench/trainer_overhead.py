"""Trainer overhead: a step of `fit` over the bare loop engine(batch), engine.backward, engine.step; median ratio, aim <= 1.05.

python tools/bench/trainer_overhead.py [--steps 150]

Both run the DiT of configs/quickstart.yaml (a new VAE in the place of the trained one) on the same DeepSpeed engine, in turns:
a step of ours, then one of the bare loop on batches of the same step that are in memory already. A step of ours is all that
`fit` does: batches from the loader (clips decoded once and kept, as in the quick start), learning rate, non-finite check,
moving average, the row of metrics.jsonl, the look for a stop. Checkpoints are left out. Exit code 1 above the aim.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for the renderer of the tests

from tests.demo_shards import write_demo_shards  # noqa: E402
from videofm.config.load import load  # noqa: E402
from videofm.config.recipe import RecipeConfig  # noqa: E402
from videofm.config.train import TrainConfig  # noqa: E402
from videofm.data.loader import StepLoader  # noqa: E402
from videofm.data.plan import PlanState  # noqa: E402
from videofm.parallel.mesh import create_mesh, destroy_mesh  # noqa: E402
from videofm.run_dir import RunDirectory  # noqa: E402
from videofm.train.build import Job, build_job, build_models, pick_device  # noqa: E402
from videofm.train.callbacks import Metrics  # noqa: E402
from videofm.train.trainer import fit  # noqa: E402
from videofm.train.worker import share_cores  # noqa: E402
from videofm.types import Batch  # noqa: E402

AIM, WARMUP = 1.05, 10


class BareLoop:
    """After each step of ours, one of the bare loop; `ours` and `bare` hold the seconds of each, `waits` those for data."""

    def __init__(self, loader: StepLoader) -> None:
        self.steps = loader.steps()
        self.ours: list[float] = []
        self.bare: list[float] = []
        self.waits: list[float] = []
        self.left_at = time.perf_counter()

    def after_step(self, job: Job, position: PlanState, metrics: dict[str, float]) -> None:
        """Take our time since the last call, then run and time the bare loop."""
        self.ours.append(time.perf_counter() - self.left_at)
        self.waits.append(metrics["data_wait"])
        batches = [batch.to(job.mesh.device) for batch in next(self.steps).batches]
        started = time.perf_counter()
        bare_step(job, batches)
        self.left_at = time.perf_counter()
        self.bare.append(self.left_at - started)

    def after_training(self, job: Job, position: PlanState) -> None:
        """Nothing is left to do."""


def bare_step(job: Job, batches: Sequence[Batch]) -> None:
    """What any user of DeepSpeed writes, with the loss as a mean; the value of the loss is read, as any log does."""
    for phase in job.engines.values():
        engine = phase.engine
        for batch in batches:
            total, _ = engine(batch)
            loss = total / batch.num_step_samples
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()
        loss.item()


def quickstart_dit(manifest: Path, num_steps: int) -> TrainConfig:
    """The stage `dit` of the quick start, on other shards and with a VAE of the same kind that is not trained."""
    stages = load(ROOT / "configs/quickstart.yaml", [], RecipeConfig).model_dump(mode="json")["stages"]
    config = stages["dit"]
    config["models"]["vae"] = stages["vae"]["models"]["vae"]
    config["data"]["manifest"] = str(manifest)
    config["trainer"]["max_steps"] = num_steps
    config["wandb"]["mode"] = "disabled"
    return TrainConfig.model_validate(config)


def measure(folder: Path, num_steps: int) -> BareLoop:
    """Run both loops for `num_steps` steps after a warm-up that also decodes every clip."""
    size = quickstart_dit(folder, 1).data
    write_demo_shards(folder / "data", num_clips=260, num_frames=20, size=size.height)
    config = quickstart_dit(folder / "data", WARMUP + num_steps)
    run = RunDirectory.create(folder / "run", config)
    run.start_attempt()
    device = pick_device(config.trainer.device)
    share_cores(config.trainer.num_threads, device)
    mesh = create_mesh(config.parallel, device)
    try:
        loader = StepLoader(config.data, config.seed)
        job = build_job(config, run, mesh, loader, build_models(config))
        bare = BareLoop(loader)
        fit(job, PlanState(), [Metrics(run, 0, config.trainer.max_steps, config.trainer.log_every, 1), bare])
        return bare
    finally:
        destroy_mesh()


def main() -> int:
    """Print one table; 1 when the median ratio is above the aim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="steps of each loop that count (default 150)")
    num_steps: int = parser.parse_args().steps
    with tempfile.TemporaryDirectory(prefix="videofm-bench-") as folder:
        found = measure(Path(folder), num_steps)
    print(f"\n{num_steps} steps of each, in turns        lower quartile   median   upper quartile")
    rows = {"bare loop, ms": found.bare, "our step, ms": found.ours, "  of it, waiting for data, ms": found.waits}
    for name, seconds in rows.items():
        low, middle, high = statistics.quantiles(seconds[WARMUP:], n=4)
        print(f"{name:34} {low * 1000:15.1f} {middle * 1000:8.1f} {high * 1000:16.1f}")
    ratios = [ours / bare for ours, bare in zip(found.ours[WARMUP:], found.bare[WARMUP:], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{'our step / bare loop':34} {low:15.3f} {middle:8.3f} {high:16.3f}   aim <= {AIM}")
    return 0 if middle <= AIM else 1


if __name__ == "__main__":
    raise SystemExit(main())
