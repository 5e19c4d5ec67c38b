"""What is given of a video, and the ways of LTX-Video 0.9.5 and later: diffusers' pipelines make the same frames."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.pipelines.ltx import pipeline_ltx_condition
from diffusers.schedulers import scheduling_flow_match_euler_discrete as their_scheduler
from torch import Tensor

from tests.unit.sampling import tiny
from videofm.export import write_diffusers_folder
from videofm.sampling import Guidance, LinearQuadraticSchedule, Pipeline, PixelCondition
from videofm.sampling.noise import initial_noise, named_noise, video_seed

SIZE = {"num_frames": 13, "height": 32, "width": 32}
PROMPTS = ["a red circle moving left", "a cyan square"]
NUM_TOKENS, NUM_STEPS = 4 * 4 * 4, 5


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return tiny.pipeline()


@pytest.fixture(scope="module")
def clip() -> Tensor:
    return torch.rand(2, 3, 13, 32, 32, generator=torch.Generator().manual_seed(3)) * 1.6 - 0.8


@pytest.fixture(scope="module")
def folder(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts: dict[str, Any] = {"dit": pipeline.dit, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    target = tmp_path_factory.mktemp("export") / "model"
    return write_diffusers_folder(target, **parts, scheduler_config=pipeline.schedule.public_config())  # type: ignore[attr-defined]


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_equals_the_image_to_video_pipeline(pipeline: Pipeline, folder: Path, clip: Tensor) -> None:
    """Frame 0 is given: LTXImageToVideoPipeline takes it in its `latents`, the other frames start from our noise. Guidance
    with rescale. The control: without the frame the result is another one."""
    theirs = quiet(diffusers.LTXImageToVideoPipeline.from_pretrained(folder))
    latents = pipeline.vae.normalize(pipeline.vae.encode(clip[:, :, :1]).mode())  # type: ignore[operator]
    noise = initial_noise([video_seed(0, index) for index in range(2)], (16, 4, 4, 4))
    start = torch.cat([latents, noise[:, :, 1:]], dim=2).flatten(2).transpose(1, 2)  # (B, C, T, H, W) -> (B, L, C)
    settings = {"num_inference_steps": 4, "guidance_scale": 2.5, "guidance_rescale": 0.4, "frame_rate": 24.0}
    frames = theirs(prompt=PROMPTS, latents=start.detach(), max_sequence_length=24, output_type="pt", **settings, **SIZE).frames
    guidance = Guidance(2.5, rescale=0.4)
    ours = pipeline.generate(
        PROMPTS, fps=24.0, num_steps=4, guidance=guidance, conditions=[PixelCondition(clip[:, :, :1])], **SIZE
    )
    torch.testing.assert_close(frames.transpose(1, 2) * 2 - 1, ours, atol=1e-4, rtol=0)
    free = pipeline.generate(PROMPTS, fps=24.0, num_steps=4, guidance=guidance, **SIZE)
    assert (free - ours).abs().max() > 1e-2


class Given:
    """What LTXConditionPipeline reads of a condition; tensors in [0, 1]."""

    def __init__(self, video: Tensor, frame: int, strength: float = 1.0) -> None:
        images = video[0].transpose(0, 1) / 2 + 0.5  # (3, T, H, W) -> (T, 3, H, W)
        self.image = images if len(images) == 1 else None
        self.video = None if len(images) == 1 else images
        self.frame_index, self.strength = frame, strength


def condition_pipeline(folder: Path) -> Any:
    """Theirs, with a VAE that returns the most likely latents, as ours does."""
    parts = diffusers.LTXPipeline.from_pretrained(folder).components
    theirs = quiet(diffusers.LTXConditionPipeline(**parts | {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}))
    encode = theirs.vae.encode
    theirs.vae.encode = lambda video: SimpleNamespace(latents=encode(video).latent_dist.mode())
    return theirs


def their_frames(theirs: Any, given: list[tuple[Tensor, int]], noise_scale: float = 0.0) -> Tensor:
    frames = theirs(
        conditions=[Given(video, frame) for video, frame in given],
        prompt=PROMPTS[:1],
        negative_prompt=[""],
        max_sequence_length=24,
        frame_rate=24,
        num_inference_steps=NUM_STEPS,
        guidance_scale=2.0,
        image_cond_noise_scale=noise_scale,
        generator=torch.Generator().manual_seed(video_seed(0, 0)),
        output_type="pt",
        **SIZE,
    ).frames
    return frames.transpose(1, 2) * 2 - 1


def our_frames(pipeline: Pipeline, given: list[tuple[Tensor, int]], **settings: Any) -> Tensor:
    how = {"fps": 24.0, "num_steps": NUM_STEPS, "guidance_scale": 2.0, "schedule": LinearQuadraticSchedule()}
    how |= {"causal_fix": True, "masked_text": True, **SIZE}
    return pipeline.generate(PROMPTS[:1], conditions=[PixelCondition(video, frame) for video, frame in given], **how | settings)


def kinds(clip: Tensor) -> dict[str, list[tuple[Tensor, int]]]:
    return {
        "first": [(clip[:1, :, :1], 0)],
        "first_and_last": [(clip[:1, :, :1], 0), (clip[:1, :, -1:], 12)],
        "continuation": [(clip[:1, :, :5], 0)],
        "clip_in_the_middle": [(clip[:1, :, :9], 4)],
    }


@pytest.mark.parametrize("kind", ["first", "first_and_last", "continuation", "clip_in_the_middle"])
def test_equals_the_condition_pipeline(pipeline: Pipeline, folder: Path, clip: Tensor, kind: str) -> None:
    """LTXConditionPipeline: linear-quadratic levels, coordinates with the causal fix, the text encoder with the mask, keyframes
    as additional tokens. The control: with real tokens that attend to padding, as LTXPipeline has it, frames differ."""
    given = kinds(clip)[kind]
    frames = their_frames(condition_pipeline(folder), given)
    torch.testing.assert_close(frames, our_frames(pipeline, given), atol=1e-4, rtol=0)
    assert (frames - our_frames(pipeline, given, masked_text=False)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["first_and_last", "clip_in_the_middle"])
def test_noise_on_what_is_given(
    pipeline: Pipeline, folder: Path, clip: Tensor, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their image_cond_noise_scale at its default 0.15, with our noise: they draw one tensor `(B, L, C)` a step, additional
    tokens in front. It reaches the last frame of the video too, as that of the last step stays."""
    given, draw, number = kinds(clip)[kind], pipeline_ltx_condition.randn_tensor, iter(range(NUM_STEPS))

    def drawn(shape: torch.Size, **kwargs: Any) -> Tensor:
        if len(shape) != 3:
            return draw(shape, **kwargs)
        noise = named_noise([video_seed(0, 0)], f"condition_noise:{next(number)}", shape[1:])
        return torch.cat([noise[:, NUM_TOKENS:], noise[:, :NUM_TOKENS]], dim=1)

    monkeypatch.setattr(pipeline_ltx_condition, "randn_tensor", drawn)
    frames = their_frames(condition_pipeline(folder), given, noise_scale=0.15)
    assert next(number, None) is None
    torch.testing.assert_close(frames, our_frames(pipeline, given, condition_noise_scale=0.15), atol=1e-4, rtol=0)
    assert (frames - our_frames(pipeline, given)).abs().max() > 1e-3


def test_stochastic_steps(pipeline: Pipeline, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LTXPipeline with stochastic_sampling in its scheduler, which gets our noise."""
    theirs = quiet(diffusers.LTXPipeline.from_pretrained(folder))
    theirs.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(theirs.scheduler.config, stochastic_sampling=True)
    seeds, number = [video_seed(0, index) for index in range(2)], iter(range(4))
    monkeypatch.setattr(
        their_scheduler, "randn_tensor", lambda shape, **kwargs: named_noise(seeds, f"step:{next(number)}", shape[1:])
    )
    frames = theirs(
        PROMPTS,
        frame_rate=24,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        max_sequence_length=24,
        output_type="pt",
        **SIZE,
    ).frames
    settings = {"fps": 24.0, "num_steps": 4, "guidance_scale": 1.0, **SIZE}
    ours = pipeline.generate(PROMPTS, solver="stochastic", **settings)
    torch.testing.assert_close(frames.transpose(1, 2) * 2 - 1, ours, atol=1e-4, rtol=0)
    alone = pipeline.generate(PROMPTS, solver="stochastic", batch_size=1, **settings)
    torch.testing.assert_close(alone, ours, atol=1e-5, rtol=0)
    assert (pipeline.generate(PROMPTS, **settings) - ours).abs().max() > 1e-2
