"""The sampler with tiny models: what a video depends on, what it does not, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from videofm import models, sampling
from videofm.errors import CheckpointError, ConfigError
from videofm.sampling import Pipeline

SIZE = {"num_frames": 5, "height": 16, "width": 24, "fps": 25.0, "num_steps": 3}
PROMPTS = ["a red circle", "a blue square moving left", ""]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    torch.manual_seed(0)
    vae = models.build("vae/ltx", "tiny")
    vae.set_latent_statistics(torch.randn(16) / 10, torch.rand(16) + 0.5)
    return Pipeline(models.build("dit/ltx", "tiny", num_layers=1), vae, models.build("text/t5", "tiny", max_length=24))


def test_shape_range_and_determinism(pipeline: Pipeline) -> None:
    videos = pipeline.generate(PROMPTS, **SIZE)
    assert videos.shape == (3, 3, 5, 16, 24)
    assert videos.dtype == torch.float32
    assert videos.abs().max() <= 1
    assert torch.equal(videos, pipeline.generate(PROMPTS, **SIZE))
    assert not torch.allclose(videos, pipeline.generate(PROMPTS, **SIZE, seed=1))


def test_a_video_does_not_depend_on_its_batch(pipeline: Pipeline) -> None:
    together = pipeline.generate(PROMPTS, **SIZE, batch_size=3)
    torch.testing.assert_close(pipeline.generate(PROMPTS, **SIZE, batch_size=1), together, atol=1e-5, rtol=0)
    behind = pipeline.generate(PROMPTS[1:], **SIZE, first_index=1)
    torch.testing.assert_close(behind, together[1:], atol=1e-5, rtol=0)


def test_modes_of_the_models_are_restored(pipeline: Pipeline) -> None:
    pipeline.dit.train()
    pipeline.dit.proj_in.eval()
    pipeline.vae.eval()
    seen = []
    pipeline.generate(["x"], **SIZE, on_step=lambda: seen.append(pipeline.dit.training))
    assert seen == [False] * 3
    next(pipeline.stream(["x", "y"], **SIZE, batch_size=1))  # also between batches, and when no more are taken
    assert pipeline.dit.training
    assert not pipeline.dit.proj_in.training
    assert not pipeline.vae.training


def test_refusals_say_what_fits(pipeline: Pipeline) -> None:
    with pytest.raises(ConfigError, match=r"cannot make 6 frames of 16x24 pixels: this VAE makes 1 \+ 4 \* n frames"):
        pipeline.generate(["x"], **SIZE | {"num_frames": 6})
    with pytest.raises(ConfigError, match="height in multiples of 8"):
        pipeline.generate(["x"], **SIZE | {"height": 20})
    with pytest.raises(ConfigError, match="nothing to sample: 0 prompts"):
        list(pipeline.stream([], **SIZE))
    with pytest.raises(CheckpointError, match="nowhere does not exist: give a training run of a DiT"):
        Pipeline.load("nowhere")


def fake_run(folder: Path, pipeline: Pipeline, roles: tuple[str, ...]) -> Path:
    """A run directory with one checkpoint, in the layout that `models.load` reads."""
    checkpoint = folder / "checkpoints" / "step_00000001"
    for role in roles:
        models.save(getattr(pipeline, role), checkpoint / "models" / role)
    (checkpoint / "COMMITTED.json").write_text("{}")
    (folder / "lineage.json").write_text(json.dumps({"fingerprint": "x"}))
    (folder / "config.yaml").write_text(json.dumps({"data": {"num_frames": 5, "height": 16, "width": 24}}))
    return folder


def test_generate_from_a_run_knows_the_size_of_its_clips(pipeline: Pipeline, tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", pipeline, ("dit", "vae", "text_encoder"))
    videos = sampling.generate(run, "a red circle", num_steps=3)
    torch.testing.assert_close(videos, pipeline.generate(["a red circle"], **SIZE), atol=1e-5, rtol=0)
    from_checkpoint = sampling.generate(run / "checkpoints" / "step_00000001", "a red circle", num_frames=9, num_steps=1)
    assert from_checkpoint.shape == (1, 3, 9, 16, 24)


def test_a_run_without_a_dit_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    run = fake_run(tmp_path / "vae", pipeline, ("vae",))
    with pytest.raises(ConfigError, match="no role 'dit'. There are: vae"):
        sampling.generate(run, "x")


def test_a_folder_that_does_not_know_its_size_asks_for_it(pipeline: Pipeline, tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", pipeline, ("dit", "vae", "text_encoder"))
    (run / "lineage.json").unlink()
    with pytest.raises(ConfigError, match="does not say how large its clips are: pass height, width"):
        sampling.generate(run, "x", num_frames=5)


def test_roles_that_were_not_trained_are_read_from_the_run(pipeline: Pipeline, tmp_path: Path) -> None:
    """A training run keeps its frozen VAE once, beside the checkpoints; run and checkpoint give the same pipeline."""
    run, checkpoint = tmp_path / "dit", tmp_path / "dit" / "checkpoints" / "step_00000001"
    models.save(pipeline.vae, run / "frozen" / "vae")
    models.save(pipeline.dit, checkpoint / "models" / "dit")
    models.save(pipeline.text_encoder, checkpoint / "models" / "text_encoder")
    (checkpoint / "COMMITTED.json").write_text("{}")
    for path in (run, checkpoint):
        loaded = Pipeline.load(path, device="cpu")
        assert all(a.equal(b) for a, b in zip(loaded.vae.parameters(), pipeline.vae.parameters(), strict=True))
