"""A training on packs through the whole trainer: what it logs, that it resumes exactly, and that its first loss is the mean
over the clips of the step, each read and run by itself in batches of one size."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from tests.demo_shards import write_mixed_shards
from tests.helpers import launch_ranks
from videofm.config.train import TrainConfig
from videofm.data.loader import StepLoader
from videofm.objectives.flow_matching import FlowMatchingObjective
from videofm.parallel.rng import KeyedRng
from videofm.train.build import build_models

STEPS, HALF = 4, 2
SMALL_VAE = {"encoder_widths": [8, 8, 16], "decoder_widths": [16, 8], "latent_channels": 4}
SMALL_DIT = {"num_layers": 1, "num_heads": 2, "head_width": 8, "in_channels": 4}
SIZES = [(9, 32, 32), (9, 16, 32), (1, 32, 32)]


def config(folder: Path, max_steps: int = STEPS) -> TrainConfig:
    """Clips of 48, 24 and 16 tokens in packs of 112."""
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "seed": 3,
            "models": {
                "vae": {"name": "vae/ltx", "overrides": SMALL_VAE},
                "dit": {"name": "dit/ltx", "overrides": SMALL_DIT},
                "text_encoder": {"name": "text/t5"},
            },
            "objective": {"kind": "flow_matching", "conditioning": {"first_frame": 0.5}},
            "data": {
                "manifest": str(folder / "shards"), "num_frames": 9, "height": 32, "width": 32, "crop": "random",
                "micro_batch_size": 2, "num_micro_batches": 2, "packing": {"num_tokens": 112},
                "buckets": {
                    "sizes": [{"num_frames": f, "height": h, "width": w} for f, h, w in SIZES],
                    "token": {"num_frames": 4, "height": 8, "width": 8}, "image_share": 0.3,
                },
            },
            "optimizer": {"lr": 1e-3, "schedule": "constant"},
            "trainer": {"max_steps": max_steps, "precision": "fp32", "device": "cpu", "num_threads": 1},
            "held_out": {"every": STEPS, "split": "train", "num_clips": 4, "sigmas": [0.5]},
            "wandb": {"mode": "disabled"},
        }
    )  # fmt: skip


def run_rank(folder: Path) -> None:
    """Four steps; two and, from their checkpoint, two more."""
    from videofm.run_dir import RunDirectory
    from videofm.train.worker import train

    for name, max_steps in (("straight", STEPS), ("halves", HALF), ("halves", STEPS)):
        os.environ["VIDEOFM_RENDEZVOUS"] = str(folder / f"rendezvous-{name}-{max_steps}")
        run = RunDirectory(folder / name)
        run.path.mkdir(exist_ok=True)
        train(config(folder, max_steps), run, 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    write_mixed_shards(folder / "shards", [(12, 32, 32), (12, 32, 34), (12, 20, 40)] * 10)
    launch_ranks(__file__, 1, folder)
    return folder


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_log_tells_how_full_packs_are(runs: Path) -> None:
    plan = StepLoader(config(runs).data, 3).plan
    for row, step in zip(rows(runs / "straight"), plan.steps(), strict=False):
        assert row["data/pack_fill"] == step.fill and 0.5 < step.fill <= 1
        tokens = [{9: {32: 48, 16: 24}, 1: {32: 16}}[d.num_frames][d.height] for draws in step.micro_batches for d in draws]
        assert row["data/pack_fill"] == sum(tokens) / 224
        assert row["tokens"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-5), "what the model really sees"
    assert rows(runs / "straight")[-1]["held_out_loss"] > 0


def test_resuming_is_exact(runs: Path) -> None:
    halves, straight = (
        [
            {name: row[name] for name in ("step", "loss", "sigma", "given", "grad_norm", "data/pack_fill")}
            for row in rows(runs / name)
        ]
        for name in ("halves", "straight")
    )
    assert halves == straight and [row["step"] for row in straight] == list(range(1, STEPS + 1))


def test_the_first_loss_is_that_of_its_clips_one_by_one(runs: Path) -> None:
    wanted = config(runs)
    models, objective = build_models(wanted), FlowMatchingObjective(wanted.objective)
    step = next(StepLoader(wanted.data, wanted.seed).steps())
    total, count = 0.0, 0
    for batch in (part.to("cpu") for micro_batch in step.batches for part in micro_batch.parts):
        with torch.no_grad():
            total += float(objective.loss(models, batch, KeyedRng(wanted.seed, 0, batch.sample_ids), "train").total)
        count += len(batch.captions)
    assert count == step.num_samples > 4
    assert rows(runs / "straight")[0]["loss"] == pytest.approx(total / count, rel=1e-5)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
