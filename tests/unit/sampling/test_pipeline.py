"""The sampler with tiny models: what a video depends on, what it does not, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.unit.sampling import tiny
from videofm import models, sampling
from videofm.errors import CheckpointError, ConfigError
from videofm.export import write_diffusers_folder
from videofm.sampling import Guidance, Pipeline, ShiftedSchedule
from videofm.sampling.noise import video_seed

SIZE: dict[str, Any] = {"num_frames": 5, "height": 16, "width": 24, "fps": 25.0, "num_steps": 3}
PROMPTS = ["a red circle", "a blue square moving left", ""]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return tiny.pipeline(num_layers=1)


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


def test_settings_change_what_they_say(pipeline: Pipeline) -> None:
    """Each of them makes another video, except for those that stand for the default."""
    plain = pipeline.generate(PROMPTS[:1], **SIZE)
    assert pipeline.generate(PROMPTS[:1], **SIZE, guidance=Guidance(3.0), schedule=pipeline.schedule).equal(plain)
    assert pipeline.generate([PROMPTS[0][:5]], **SIZE, prompt_suffix=PROMPTS[0][5:]).equal(plain)
    for changed in (
        {"guidance": Guidance(3.0, star=True)},
        {"negative_prompt": "blurry"},
        {"schedule": ShiftedSchedule(13.0)},
        {"solver": "heun"},
        {"causal_fix": True},
        {"solver": "stochastic"},
        {"masked_text": True},
        {"guidance_scale": 1.0},
    ):
        assert not torch.allclose(pipeline.generate(PROMPTS[:1], **SIZE, **changed), plain, atol=1e-4), changed  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no solver is called 'rk4'. There are: euler, heun, stochastic"):
        pipeline.generate(PROMPTS, **SIZE, solver="rk4")
    with pytest.raises(ConfigError, match="guidance_scale and guidance are both given"):
        pipeline.generate(PROMPTS, **SIZE, guidance_scale=2.0, guidance=Guidance(2.0))


def test_prompts_that_are_cut_are_counted(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    """24 bytes with the end token: 23 letters fit, 24 do not, and a suffix counts."""
    prompts = ["a" * 23, "a" * 24, "b"]
    assert pipeline.num_cut_prompts(prompts) == 1
    assert pipeline.num_cut_prompts(prompts, suffix=" .") == 2
    with caplog.at_level("WARNING", logger="videofm"):
        pipeline.generate(["b"], **SIZE)
        assert not caplog.messages
        pipeline.generate(prompts, **SIZE)
    assert caplog.messages == ["1 of 3 prompts are longer than the text encoder takes; their ends are cut"]


def test_cuts_of_two_text_encoders_are_told_apart(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    """Start and end take two of 40 and of 20 tokens: 30 letters are cut by the second alone, 39 by both."""
    pair = Pipeline(pipeline.dit, pipeline.vae, models.build("text/step_video", max_length=40, clip_max_length=20))
    assert pair.num_cut_prompts(["a" * 18, "a" * 30, "a" * 39]) == 2
    with caplog.at_level("WARNING", logger="videofm"):
        pair._warn_of_cuts(["a" * 18, "a" * 30, "a" * 39], "")
    assert caplog.messages == [
        "1 of 3 prompts are longer than the text encoder takes; their ends are cut",
        "2 of 3 prompts are longer than the clip text encoder takes; their ends are cut",
    ]
    with pytest.raises(ConfigError, match="masked_text is True, but text/step_video hides its padding in the one way"):
        pair.generate(["a"], **SIZE, masked_text=True)


@pytest.fixture(scope="module")
def denoising(pipeline: Pipeline) -> Pipeline:
    """A pipeline whose decoder takes a noise level."""
    torch.manual_seed(0)
    vae = models.build("vae/ltx", "tiny", timestep_conditioning=True)
    vae.set_latent_statistics(torch.randn(16) / 10, torch.rand(16) + 0.5)  # type: ignore[operator]
    return Pipeline(pipeline.dit, vae, pipeline.text_encoder)


def test_decoding_at_a_noise_level_is_that_of_diffusers(denoising: Pipeline, tmp_path: Path) -> None:
    """decode_timestep 0.05 and decode_noise_scale 0.025 of LTXPipeline; its noise is the generator's second draw."""
    parts = {"dit": denoising.dit, "vae": denoising.vae, "text_encoder": denoising.text_encoder}
    folder = write_diffusers_folder(tmp_path / "model", **parts, scheduler_config=sampling.Schedule().public_config())  # type: ignore[arg-type]
    theirs = diffusers.LTXPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    size = {"num_frames": 5, "height": 32, "width": 32}
    generators = [torch.Generator().manual_seed(video_seed(0, index)) for index in range(2)]

    def ours(**how: float) -> Tensor:
        return denoising.generate(PROMPTS[:2], fps=25.0, num_steps=2, **size, **how)  # type: ignore[arg-type]

    frames = theirs(
        PROMPTS[:2],
        frame_rate=25,
        num_inference_steps=2,
        generator=generators,
        decode_timestep=0.05,
        decode_noise_scale=0.025,
        max_sequence_length=24,
        output_type="pt",
        **size,
    ).frames
    found = ours(decode_sigma=0.05, decode_noise_scale=0.025)
    torch.testing.assert_close(frames.transpose(1, 2) * 2 - 1, found, atol=1e-4, rtol=0)
    assert not torch.allclose(found, ours(decode_sigma=0.05, decode_noise_scale=0.0), atol=1e-3)
    assert ours(decode_sigma=0.05).equal(ours(decode_sigma=0.05, decode_noise_scale=0.05))


def test_step_video_samples_through_the_same_pipeline() -> None:
    """Its recipe: shift 13, guidance 9 that decays; two text encoders; 17 frames a chunk. Any batch gives the same video."""
    torch.manual_seed(0)
    vae = models.build("vae/step_video", "tiny")
    dit = models.build("dit/step_video", "tiny", in_channels=vae.latent_channels)
    for parameter in dit.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    pipeline = Pipeline(dit, vae, models.build("text/step_video", "tiny"), ShiftedSchedule(13.0))
    settings: dict[str, Any] = {"num_frames": 17, "height": 32, "width": 32, "fps": 25.0, "num_steps": 3}
    settings |= {"guidance": Guidance(9.0, decay=True)}
    videos = pipeline.generate(["a cat", "b"], **settings)
    assert videos.shape == (2, 3, 17, 32, 32)
    torch.testing.assert_close(pipeline.generate(["a cat", "b"], batch_size=1, **settings), videos, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match=r"cannot make 18 frames of 32x32 pixels: this VAE makes 1 or 17 \* n frames"):
        pipeline.generate(["a"], **settings | {"num_frames": 18})


def test_a_decoder_without_a_noise_level_refuses_one(pipeline: Pipeline) -> None:
    with pytest.raises(ConfigError, match="decode_sigma is 0.05 and decode_noise_scale 0.05, but the decoder of this"):
        pipeline.generate(PROMPTS, **SIZE, decode_sigma=0.05)


def test_noise_of_the_decoder_belongs_to_the_video(pipeline: Pipeline) -> None:
    """Decoders of 0.9.1 inject noise: a video is the same in a batch and alone."""
    torch.manual_seed(0)
    num_stages = len(models.build("vae/ltx", "tiny", device="meta").config.inject_noise)
    vae = models.build("vae/ltx", "tiny", inject_noise=(True,) * num_stages)
    for name, parameter in vae.named_parameters():
        if "noise" in name or "per_channel" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    noisy = Pipeline(pipeline.dit, vae, pipeline.text_encoder)
    together = noisy.generate(PROMPTS, **SIZE)
    torch.testing.assert_close(noisy.generate(PROMPTS, **SIZE, batch_size=1), together, atol=1e-5, rtol=0)
    injected = noisy.decode(torch.zeros(2, 16, 2, 2, 3), [0, 1])
    assert (injected[0] - injected[1]).abs().max() > 1e-3


def test_bfloat16_weights_keep_a_float32_state(pipeline: Pipeline, tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", pipeline, ("dit", "vae", "text_encoder"))
    half = Pipeline.load(run, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.dit.parameters()} == {torch.bfloat16}
    videos = half.generate(PROMPTS[:1], **SIZE)
    assert videos.dtype == torch.float32
    torch.testing.assert_close(videos, pipeline.generate(PROMPTS[:1], **SIZE), atol=0.2, rtol=0)


def test_generate_takes_an_image(pipeline: Pipeline, tmp_path: Path) -> None:
    """16x24 pixels, as the clips of the run; given as pixels it is the condition that `Pipeline.generate` takes."""
    run = fake_run(tmp_path / "run", pipeline, ("dit", "vae", "text_encoder"))
    image = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    found = sampling.generate(run, ["a", "b"], num_steps=3, image=image)
    given = sampling.PixelCondition(torch.from_numpy(image).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1)
    torch.testing.assert_close(found, pipeline.generate(["a", "b"], **SIZE, conditions=[given]), atol=1e-5, rtol=0)
    two = sampling.generate(run, ["a", "b"], num_steps=3, image=[image, image[::-1].copy()], guidance=Guidance(3.0))
    torch.testing.assert_close(two[0], found[0], atol=1e-5, rtol=0)
    assert not torch.allclose(two[1], found[1], atol=1e-3)
    with pytest.raises(ConfigError, match=r"the image is 24x16 \(height x width\) and the video 16x24: another shape"):
        sampling.generate(run, "a", image=image.transpose(1, 0, 2).copy())


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
