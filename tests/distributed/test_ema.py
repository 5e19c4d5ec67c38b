"""The moving average under ZeRO: what is saved, loaded elsewhere and sampled from is the average of whole weights, and what is
watched during training is made from the same.

Two ranks train a small diffusion transformer and its text encoder at ZeRO 0 to 3; then one process, or one rank, reads what
they saved. At ZeRO 3 one matrix of the model is sharded and all other parameters are kept whole beside their shards.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.demo import render_shot
from tests.helpers import launch_ranks
from videofm import media, models
from videofm.config.train import TrainConfig
from videofm.data.loader import StepLoader
from videofm.data.shards import ShardWriter
from videofm.objectives.flow_matching import FlowMatchingObjective
from videofm.objectives.latent_statistics import first_clips
from videofm.run_dir import RunDirectory
from videofm.sampling import Pipeline
from videofm.shapes import motifs
from videofm.train.watch import held_out_losses

STAGES = (0, 1, 2, 3)
WATCHED, STEPS, DECAY = 3, 4, 0.5
ROLES = ("dit", "text_encoder")
SIZE = {"num_frames": 5, "height": 32, "width": 32}
SAMPLES = {"every": WATCHED, "prompts": ["a red circle", ""], "fps": 25.0, "num_steps": 2, **SIZE}
HELD_OUT: dict[str, Any] = {"every": WATCHED, "num_clips": 4, "sigmas": [0.2, 0.8]}
SMALL_VAE = {"encoder_widths": [8, 8, 16], "decoder_widths": [16, 8], "latent_channels": 4}
SMALL_DIT = {"in_channels": 4, "num_layers": 1, "num_heads": 4, "head_width": 42}  # 168 x 672 = 112,896: DeepSpeed shards 1e5


def config(folder: Path, zero_stage: int, data_degree: int) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "seed": 3,
            "models": {
                "vae": {"name": "vae/ltx", "overrides": SMALL_VAE},
                "dit": {"name": "dit/ltx", "overrides": SMALL_DIT},
                "text_encoder": {"name": "text/t5", "overrides": {"num_layers": 1, "max_length": 32}},
            },
            "objective": {"kind": "flow_matching", "train_text_encoder": True, "caption_dropout": 0.1},
            "data": {"manifest": str(folder / "clips"), "micro_batch_size": 2, "num_micro_batches": 2, **SIZE},
            "optimizer": {"lr": 0.02, "ema_decay": DECAY, "schedule": "constant"},
            "trainer": {"max_steps": 100, "precision": "fp32", "device": "cpu", "checkpoint_every": WATCHED},
            "samples": SAMPLES,
            "held_out": HELD_OUT,
            "parallel": {"zero_stage": zero_stage, "data_degree": data_degree},
        }
    )  # fmt: skip


def write_clips(folder: Path) -> None:
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "00000", "hash") as writer:
        for index, motif in enumerate(motifs()[:12]):
            frames = render_shot(motif.colour, motif.shape, motif.direction, 6, 32, rng)
            media.write_video(folder / "clip.mp4", frames, 25)
            facts: dict[str, Any] = {"num_frames": 6, "fps": 25.0, "height": 32, "width": 32, "source_id": str(index)}
            facts |= {"caption": motif.caption, "split": "held_out" if index % 3 == 0 else "train"}
            writer.add(f"clip-{index:02d}", (folder / "clip.mp4").read_bytes(), **facts)
        writer.commit()


def save_rank(folder: Path) -> None:
    """Train at each stage and save at step 3, with everything watched there; beside it a run that nobody watches."""
    from videofm.parallel.mesh import create_mesh, destroy_mesh
    from videofm.train import state
    from videofm.train.build import build_job, build_models
    from videofm.train.trainer import train_step
    from videofm.train.worker import watching

    degree, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    mesh = create_mesh(config(folder, 0, degree).parallel, torch.device("cpu"), folder / f"rendezvous_{degree}")
    results: dict[str, Any] = {}
    made: list[np.ndarray[Any, Any]] = []
    write = media.write_video

    def keep_and_write(path: str | Path, frames: media.Frames, fps: float) -> None:
        made.append(frames)
        write(path, frames, fps)

    media.write_video = keep_and_write
    for stage in STAGES:
        settings = config(folder, stage, degree)
        run = RunDirectory(folder / f"stage_{stage}")
        run.path.mkdir(exist_ok=True)
        final = {}
        for watched in (False, True):
            loader = StepLoader(settings.data, settings.seed, mesh.data_rank, mesh.data_degree)
            job = build_job(settings, run, mesh, loader, build_models(settings))
            average = {role: doubled(state.whole_weights(job, role)) for role in ROLES}
            rows = []
            for index, step in zip(range(STEPS), job.loader.steps(), strict=False):
                rows.append(train_step(job, step))
                if index >= WATCHED:
                    continue
                decay = min(DECAY, (1 + index) / (10 + index))
                for role in ROLES:
                    for name, weight in doubled(state.whole_weights(job, role)).items():
                        average[role][name] = decay * average[role][name] + (1 - decay) * weight
                if watched and index + 1 == WATCHED:
                    for callback in watching(job):
                        callback.after_step(job, step.after, rows[-1])
                    state.save_frozen(job)
                    state.save(job, step.after)
            final[watched] = rows, {role: state.whole_weights(job, role) for role in ROLES}
        rows, weights = final[True]
        watched_loss = rows[WATCHED - 1].pop("held_out_loss")
        results[str(stage)] = {
            "average": average,
            "watched_loss": watched_loss,
            "same_rows": rows == final[False][0],
            "same_weights": all(torch.equal(value, final[False][1][r][n]) for r in ROLES for n, value in weights[r].items()),
            "frames": torch.from_numpy(np.stack(made)) if made else None,
            "sharded": sum(p.shape != p.ds_shape for p in job.models["dit"].parameters()) if stage == 3 else 0,
        }
        made.clear()
    torch.save(results, folder / f"results_{rank}.pt")
    destroy_mesh()


def resume_rank(folder: Path) -> None:
    """Take the checkpoints of the two ranks up on one, at another stage."""
    from videofm.parallel.mesh import create_mesh, destroy_mesh
    from videofm.train import state
    from videofm.train.build import build_job, build_models

    mesh = create_mesh(config(folder, 0, 1).parallel, torch.device("cpu"), folder / "rendezvous_1")
    found = {}
    for stage in STAGES:
        settings = config(folder, (stage + 1) % 4, 1)
        run, built = RunDirectory(folder / f"stage_{stage}"), build_models(settings)
        checkpoint = state.resume_folder(run)
        assert checkpoint is not None
        state.load_weights(checkpoint, built, ROLES)
        job = build_job(settings, run, mesh, StepLoader(settings.data, settings.seed), built)
        assert state.load_state(job, checkpoint).step == WATCHED
        found[str(stage)] = {role: job.averages[role].whole(mesh.gradient_group) for role in ROLES}
    torch.save(found, folder / "resumed.pt")
    destroy_mesh()


def doubled(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double().clone() for name, value in state.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ema")
    write_clips(folder / "clips")
    launch_ranks(__file__, 2, folder)
    launch_ranks(__file__, 1, folder)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"results_{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("stage", STAGES)
def test_the_saved_average_is_that_of_whole_weights(folder: Path, results: list[dict[str, Any]], stage: int) -> None:
    """`average <- d average + (1 - d) weights`, d = min(0.5, (1 + step) / (10 + step)), in float64 over whole weights; what is
    loaded has it to the rounding of three float32 steps, of weights near 1. The weights themselves are far from it."""
    for role in ROLES:
        loaded = models.load(folder / f"stage_{stage}", role=role, ema=True)
        plain = models.load(folder / f"stage_{stage}", role=role, ema=False)
        expected = results[0][str(stage)]["average"][role]
        for name, parameter in loaded.named_parameters():
            torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-6, atol=1e-6)
        distances = [(a - b).abs().max() for a, b in zip(loaded.parameters(), plain.parameters(), strict=True)]
        assert max(distances) > 1e-3
    assert results[0]["3"]["sharded"] > 0, "ZeRO 3 must have something to gather"


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_resumes_the_average(folder: Path, stage: int) -> None:
    resumed = torch.load(folder / "resumed.pt", weights_only=True)[str(stage)]
    for role in ROLES:
        loaded = models.load(folder / f"stage_{stage}", role=role, ema=True)
        for name, parameter in loaded.named_parameters():
            assert torch.equal(resumed[role][name], parameter), name


@pytest.mark.parametrize("stage", STAGES)
def test_samples_are_those_of_the_checkpoint(folder: Path, results: list[dict[str, Any]], stage: int) -> None:
    """One process that loads the average makes the videos that two ranks made while they trained; the weights make others.

    Frames are compared before they are encoded; rounding may put a pixel on the next of 255 levels.
    """
    run = folder / f"stage_{stage}"
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [row["caption"] for row in rows] == SAMPLES["prompts"] and {row["step"] for row in rows} == {WATCHED}
    assert (run / "samples" / "step_00000003" / "contact_sheet.png").exists()
    assert [media.read_video(run / row["file"]).shape for row in rows] == [(5, 32, 32, 3)] * 2
    assert results[1][str(stage)]["frames"] is None, "one rank writes"
    made = results[0][str(stage)]["frames"].int()
    distances = {}
    for ema in (True, False):
        pipeline = Pipeline.load(run, ema=ema, device="cpu")
        videos = pipeline.generate(SAMPLES["prompts"], seed=3, num_steps=2, fps=25.0, **SIZE)
        again = torch.stack([torch.from_numpy(media.to_frames(video)) for video in videos]).int()
        distances[ema] = int((made - again).abs().max())
    assert distances[True] <= 1 < 5 < distances[False]


@pytest.mark.parametrize("stage", STAGES)
def test_the_held_out_loss_is_that_of_the_checkpoint(folder: Path, results: list[dict[str, Any]], stage: int) -> None:
    run, settings = folder / f"stage_{stage}", config(folder, 0, 1)
    (row,) = [json.loads(line) for line in (run / "held_out.jsonl").read_text().splitlines()]
    assert row["step"] == WATCHED and row["num_clips"] == 4 and [*row["loss_at_sigma"]] == ["0.2", "0.8"]
    assert row["loss"] == pytest.approx(sum(row["loss_at_sigma"].values()) / 2)
    assert [result[str(stage)]["watched_loss"] for result in results] == [row["loss"]] * 2, "every rank has it"
    loader = StepLoader(settings.data.model_copy(update={"split": "held_out"}), settings.seed)
    found = {}
    for ema in (True, False):
        roles = {role: models.load(run, role=role, ema=ema) for role in ("dit", "vae", "text_encoder")}
        objective = FlowMatchingObjective(settings.objective)  # type: ignore[arg-type]
        clips = (batch.to("cpu") for batch in first_clips(loader.first_clips(), 4))
        found[ema] = held_out_losses(objective, roles, clips, HELD_OUT["sigmas"], 3)
    assert found[True]["loss_at_sigma"] == pytest.approx(row["loss_at_sigma"], rel=1e-5)
    assert found[False]["loss"] != pytest.approx(row["loss"], rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_watching_changes_nothing(results: list[dict[str, Any]], stage: int) -> None:
    """The step behind it has the loss, and leaves the weights, of a run that nobody watched, to the last bit."""
    for result in results:
        assert result[str(stage)]["same_rows"] and result[str(stage)]["same_weights"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    (save_rank if os.environ["WORLD_SIZE"] == "2" else resume_rank)(Path(sys.argv[1]))
