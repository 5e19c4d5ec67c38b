"""What is watched during training: when, on what, and what a resumed run does with the rows of the one before.

That both see the weights that are shipped, under every ZeRO stage, is in tests/distributed/test_ema.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.demo_shards import write_demo_shards
from tests.unit.sampling import tiny
from videofm import media
from videofm.config.train import TrainConfig
from videofm.data.plan import PlanState
from videofm.data.shards import ShardWriter
from videofm.errors import DataError
from videofm.run_dir import RunDirectory
from videofm.train.watch import HeldOut, Samples
from videofm.train.watchdog import Heartbeat
from videofm.train.worker import watching

SIZE = {"num_frames": 5, "height": 32, "width": 32}


def config(clips: Path, **fields: Any) -> TrainConfig:
    base = {
        "kind": "train",
        "models": {
            role: {"name": name} for role, name in (("dit", "dit/ltx"), ("vae", "vae/ltx"), ("text_encoder", "text/t5"))
        },
        "objective": {"kind": "flow_matching"},
        "data": {"manifest": str(clips), "micro_batch_size": 2, **SIZE},
        "optimizer": {"lr": 1e-3},
        "trainer": {"max_steps": 7, "precision": "fp32"},
        "samples": {"every": 4, "prompts": ["a red circle"], "fps": 25.0, "num_steps": 1, **SIZE},
        "held_out": {"every": 3, "num_clips": 64, "sigmas": [0.5]},
    }
    return TrainConfig.model_validate(base | fields)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clips of noise, all held out."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    with ShardWriter(folder, "00000", "hash") as writer:
        for index in range(3):
            media.write_video(folder / "clip.mp4", rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8), 25)
            facts: dict[str, Any] = {"num_frames": 5, "fps": 25.0, "height": 32, "width": 32, "source_id": str(index)}
            writer.add(f"{index}", (folder / "clip.mp4").read_bytes(), caption="noise", split="held_out", **facts)
        writer.commit()
    return folder


@pytest.fixture
def a_job(clips: Path, tmp_path: Path) -> Callable[..., Any]:
    torch.manual_seed(0)
    built = tiny.pipeline(num_layers=1)

    def make(is_main: bool = True) -> Any:
        return SimpleNamespace(
            config=config(clips),
            run=RunDirectory(tmp_path),
            mesh=SimpleNamespace(is_main=is_main, device=torch.device("cpu")),
            heartbeat=Heartbeat(),
            models={role: getattr(built, role) for role in ("dit", "vae", "text_encoder")},
            averages={},
        )

    return make


def test_it_is_done_each_so_many_steps_and_at_the_end(
    a_job: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 7 steps samples are made at 4 and 7, and the loss is measured at 3, 6 and 7, on two whole micro-batches of two: there
    are three clips, fewer than asked for. The same weights make the same frames and have the same loss."""
    job, made = a_job(), []
    monkeypatch.setattr(media, "write_video", lambda path, frames, fps: made.append((path.parent.name, path.name, frames, fps)))
    samples, held_out = Samples(job.config.samples), HeldOut(job.config.held_out, job)
    seen = {}
    for step in range(1, 8):
        metrics: dict[str, float] = {}
        for callback in (samples, held_out):
            callback.after_step(job, PlanState(step=step), metrics)
        seen[step] = metrics.get("held_out_loss")
    assert [found[:2] for found in made] == [("step_00000004", "000.mp4"), ("step_00000007", "000.mp4")]
    assert np.array_equal(made[0][2], made[1][2]) and made[0][2].std() > 1 and made[0][3] == 25.0
    assert len(list(tmp_path.glob("samples/*/contact_sheet.png"))) == 2
    assert [step for step, loss in seen.items() if loss is not None] == [3, 6, 7] and seen[3] == seen[6] == seen[7]
    rows = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 7] and {row["num_clips"] for row in rows} == {4}


def test_a_resumed_run_measures_again_and_has_one_row_a_step(a_job: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 9.0, "loss_at_sigma": {"0.5": 9.0}} for step in (3, 6)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = a_job()
    HeldOut(job.config.held_out, job).after_step(job, PlanState(step=6), {})
    found = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == [3, 6] and found[0] == rows[0] and found[1]["loss"] < 9.0


def test_other_ranks_measure_and_write_nothing(a_job: Callable[..., Any], tmp_path: Path) -> None:
    job = a_job(is_main=False)
    metrics: dict[str, float] = {}
    for callback in (Samples(job.config.samples), HeldOut(job.config.held_out, job)):
        callback.after_step(job, PlanState(step=7), metrics)
    assert "held_out_loss" in metrics and list(tmp_path.iterdir()) == []


def test_a_split_without_clips_is_refused_before_training(a_job: Callable[..., Any]) -> None:
    job = a_job()
    with pytest.raises(DataError, match="train"):
        HeldOut(job.config.held_out.model_copy(update={"split": "train"}), job)


def test_of_a_mix_it_measures_held_out_clips_whatever_is_trained_on(a_job: Callable[..., Any], tmp_path: Path) -> None:
    """A dataset's own split says what is trained on. Checksums are verified as in the training."""
    shards = write_demo_shards(tmp_path / "shards", 6, 1, 5, 32, held_out=2)
    job, mix = a_job(), [{"name": "web", "manifest": str(shards), "weight": 1.0, "split": "train"}]
    job.config = config(shards, data={"mix": mix, "micro_batch_size": 2, **SIZE})
    loader = HeldOut(job.config.held_out, job)._loader
    drawn = {draw.key for step in islice(loader.plan.steps(), 3) for batch in step.micro_batches for draw in batch}
    assert drawn == {"clip-00004", "clip-00005"} and loader.config.verify_checksums


@pytest.mark.parametrize("objective", [{"kind": "dpo", "reference": {"kind": "cached"}}, {"kind": "reward_weighted"}])
def test_a_training_on_pairs_is_watched_as_flow_matching(
    objective: dict[str, Any], a_job: Callable[..., Any], clips: Path, tmp_path: Path
) -> None:
    """The loss of the dataset that is named, clip by clip, as a training on that dataset measures it; the same samples."""
    found: list[dict[str, float]] = []
    made = []
    for number, given in enumerate(({"kind": "flow_matching"}, objective)):
        job = a_job()
        if number:
            data = {"manifest": str(tmp_path / "candidates"), "pairs": {"path": "x"}, "micro_batch_size": 2, "start": "first"}
            held_out = {"every": 3, "num_clips": 64, "sigmas": [0.5], "manifest": str(clips)}
            job.config = config(clips, objective=given, data=data | SIZE, held_out=held_out)
        metrics: dict[str, float] = {}
        HeldOut(job.config.held_out, job).after_step(job, PlanState(step=3), metrics)
        Samples(job.config.samples).after_step(job, PlanState(step=4), metrics)
        found.append(metrics)
        made.append(media.read_video(tmp_path / "samples/step_00000004/000.mp4"))
    assert found[0] == found[1] and set(found[0]) == {"held_out_loss"}
    assert np.array_equal(*made)


def test_only_a_dit_is_watched(clips: Path) -> None:
    with pytest.raises(
        ValidationError,
        match="samples and held_out: only objectives flow_matching, dpo and reward_weighted train .* for them, not auto",
    ):
        config(clips, objective={"kind": "autoencoder"})


def test_samples_of_a_guided_training_say_what_they_lack(
    clips: Path, a_job: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Once, when the training starts; not of one that has no features, or makes no samples."""
    job, made = a_job(), {}
    for features, samples in (({}, True), (None, True), ({}, False)):
        fields = {"objective": {"kind": "flow_matching", "features": features}, "held_out": None}
        job.config = config(clips, **fields, **({} if samples else {"samples": None}))
        caplog.clear()
        with caplog.at_level("INFO", logger="videofm"):
            watching(job)
        made[features is not None, samples] = list(caplog.messages)
    told = "samples are made with the null feature, for want of a guide: `videofm sample` with one makes guided ones"
    assert made == {(True, True): [told], (False, True): [], (True, False): []}
