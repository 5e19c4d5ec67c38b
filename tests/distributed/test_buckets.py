"""Mixed sizes in one run through the whole trainer, on one and two ranks: videos of two sizes, steps padded with images."""

import json
import os
import sys
import time
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.demo_shards import write_mixed_shards
from tests.helpers import launch_ranks
from videofm.checkpoint.save import read_tensors
from videofm.config.train import TrainConfig

STEPS, HALF = 6, 3
SMALL_VAE = {"encoder_widths": [8, 8, 16], "decoder_widths": [16, 8], "latent_channels": 4}
SMALL_DIT = {"num_layers": 1, "num_heads": 2, "head_width": 8, "in_channels": 4}


def config(folder: Path, degree: int, max_steps: int = STEPS) -> TrainConfig:
    """Costs of 71.04, 29.76 and 4.16 under a budget of 71.04: 1 and 2 videos or 17 images a micro-batch; beside 2 videos of the
    second size there is room for 2 images."""
    sizes = [(9, 32, 32), (9, 16, 32), (1, 16, 16)]
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "seed": 3,
            "models": {
                "vae": {"name": "vae/ltx", "overrides": SMALL_VAE},
                "dit": {"name": "dit/ltx", "overrides": SMALL_DIT, "attention": "math", "cross_attention": "math"},
                "text_encoder": {"name": "text/t5"},
            },
            "objective": {"kind": "flow_matching"},
            "data": {
                "manifest": str(folder / "shards"), "num_frames": 9, "height": 32, "width": 32, "crop": "random",
                "micro_batch_size": 1, "num_micro_batches": 2,
                "buckets": {
                    "sizes": [{"num_frames": f, "height": h, "width": w} for f, h, w in sizes],
                    "token": {"num_frames": 4, "height": 8, "width": 8},
                    "quadratic": 0.01, "image_share": 0.4, "image_padding": True,
                },
            },
            "optimizer": {"lr": 1e-3, "schedule": "constant"},
            "trainer": {"max_steps": max_steps, "precision": "fp32", "device": "cpu", "num_threads": 1},
            "parallel": {"data_degree": degree},
            "wandb": {"mode": "disabled"},
        }
    )  # fmt: skip


def run_rank(folder: Path) -> None:
    """Six steps; three and, from their checkpoint, three more; on two ranks also three with a slow second rank."""
    from videofm.run_dir import RunDirectory
    from videofm.train.worker import train

    degree, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])

    def go(name: str, max_steps: int) -> None:
        os.environ["VIDEOFM_RENDEZVOUS"] = str(folder / f"rendezvous-{degree}-{name}-{max_steps}")
        run = RunDirectory(folder / f"{name}-{degree}")
        run.path.mkdir(exist_ok=True)
        train(config(folder, degree, max_steps), run, 1)

    go("straight", STEPS)
    go("halves", HALF)
    go("halves", STEPS)
    if degree == 2:
        slow_down(folder, rank)
        go("slow", HALF)


def slow_down(folder: Path, rank: int) -> None:
    """Each forward pass of rank 1 takes 0.5 s more, and at least three times as long as rank 0 took for the same one and all
    that it did since the end of the last step: rank 1 is the slowest also where the machine is slow while rank 0 works."""
    from videofm.objectives.flow_matching import FlowMatchingObjective
    from videofm.train.busy import BusyTime

    loss, take, started, calls = FlowMatchingObjective.loss, BusyTime.take, list[float](), count()

    def told(number: int) -> Path:
        return folder / f"forward-{number}"

    def take_and_start(busy: BusyTime) -> float:
        seconds = take(busy)
        started.append(time.perf_counter())
        return seconds

    def tells(*arguments: Any) -> Any:
        found, path = loss(*arguments), told(next(calls))
        path.with_suffix(".new").write_text(str(time.perf_counter() - started[-1] if started else 0.0))
        path.with_suffix(".new").rename(path)
        return found

    def waits(*arguments: Any) -> Any:
        path = told(next(calls))
        while not path.exists():
            time.sleep(0.01)
        time.sleep(max(0.5, 3 * float(path.read_text())))
        return loss(*arguments)

    BusyTime.take = take_and_start  # type: ignore[method-assign]
    FlowMatchingObjective.loss = waits if rank else tells  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("buckets")
    write_mixed_shards(folder / "shards", [(12, 32, 32), (12, 32, 32), (12, 20, 40)] * 10)
    for degree in (1, 2):
        launch_ranks(__file__, degree, folder)
    return folder


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(found: list[dict]) -> list[dict]:
    """What does not depend on the clock."""
    return [{name: row[name] for name in ("step", "loss", "sigma", "grad_norm", "lr")} for row in found]


def test_the_run_mixes_sizes(runs):
    """The steps of the plan: both sizes of videos occur, one with and one without images."""
    from videofm.data.loader import StepLoader

    steps = StepLoader(config(runs, 1).data, 3).plan.steps()
    kinds = {
        tuple((len(batch), batch[0].num_frames, batch[0].height) for batch in step.micro_batches)
        for step in islice(steps, STEPS)
    }
    assert {kind[0][1:] for kind in kinds} >= {(9, 32), (9, 16)} and {len(kind) for kind in kinds} == {2, 4}, kinds


def test_two_ranks_take_the_steps_of_one(runs):
    one, two = numbers(rows(runs / "straight-1")), numbers(rows(runs / "straight-2"))
    assert [row["step"] for row in one] == list(range(1, STEPS + 1))
    for ours, theirs in zip(one, two, strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-6)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("degree", [1, 2])
def test_resuming_is_exact(runs, degree):
    """Three steps, a checkpoint, three more in new engines: metrics and weights of six, to the last bit."""
    assert numbers(rows(runs / f"halves-{degree}")) == numbers(rows(runs / f"straight-{degree}"))
    folders = [runs / f"{name}-{degree}" / f"checkpoints/step_{STEPS:08d}" for name in ("halves", "straight")]
    halves, straight = (read_tensors(folder, "models/dit/model") for folder in folders)
    assert halves.keys() == straight.keys() and all(torch.equal(halves[name], value) for name, value in straight.items())


def test_the_slowest_rank_is_told(runs):
    """1 on a rank alone; with half a second more, or more, in each forward pass of one rank of two near 2, the limit where the
    other has nothing to do."""
    assert {row["slowest_rank"] for row in rows(runs / "straight-1")} == {1.0}
    assert all(1 <= row["slowest_rank"] < 2 for row in rows(runs / "straight-2"))
    slow = [row["slowest_rank"] for row in rows(runs / "slow-2")]
    assert all(1.3 < value < 2 for value in slow[1:]), slow


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
