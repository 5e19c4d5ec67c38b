"""What is given of a video: where it is written, that it stays, and that diffusers' pipelines make the same frames of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tests.unit.sampling import tiny
from videofm.errors import ConfigError, DataError
from videofm.export import write_diffusers_folder
from videofm.ops import flow
from videofm.sampling import Condition, Guidance, LinearQuadraticSchedule, Pipeline, PixelCondition, ShiftedSchedule
from videofm.sampling.conditioning import coordinates_at, located, place
from videofm.sampling.noise import initial_noise, video_seed
from videofm.sampling.solvers import capped, euler
from videofm.types import Compression

CELLS = Compression(4, 8, 8)
SIZE = {"num_frames": 13, "height": 32, "width": 32}
PROMPTS = ["a red circle moving left", "a cyan square"]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return tiny.pipeline()


@pytest.fixture(scope="module")
def clip() -> Tensor:
    return torch.rand(2, 3, 13, 32, 32, generator=torch.Generator().manual_seed(3)) * 1.6 - 0.8


def placed(conditions: list[Condition], noise: Tensor) -> Any:
    def coordinates_of(num_latent_frames: int, frame: int) -> Tensor:
        num_tokens = num_latent_frames * noise.shape[3] * noise.shape[4]
        return torch.full((len(noise), 3, num_tokens), float(frame))

    return place(noise, conditions, coordinates_of, CELLS, seeds=range(len(noise)))


def test_a_first_frame_is_written_in_place_and_a_keyframe_behind() -> None:
    """4 latent frames of one cell. In place: frame 0 at strength 0.75. Behind: the image at frame 6, at strength 1. A clip of 3
    latent frames at frame 4: two of them behind, the third in place at latent frame 4 / 4 + 2 = 3."""
    noise = torch.randn(2, 5, 4, 1, 1)
    image, clip = torch.full((1, 5, 1, 1, 1), 7.0), torch.full((2, 5, 3, 1, 1), 9.0)
    start = placed([Condition(image, 0, 0.75), Condition(image, 6), Condition(clip, 4)], noise)
    assert start.tokens.shape == (2, 7, 5)
    torch.testing.assert_close(start.tokens[:, 0], 0.25 * noise[:, :, 0, 0, 0] + 0.75 * 7)
    assert start.tokens[:, 1:3].equal(noise[:, :, 1:3, 0, 0].transpose(1, 2))
    assert start.tokens[:, 3:].flatten(2).amax(dim=2).tolist() == [[9.0, 7.0, 9.0, 9.0]] * 2
    assert start.ceilings.tolist() == [[0.25, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]] * 2
    assert start.coordinates[0, 0].tolist() == [0, 0, 0, 0, 6, 4, 4]


def test_nothing_given_leaves_one_level_for_the_sample() -> None:
    noise = torch.randn(1, 5, 2, 1, 1)
    start = placed([], noise)
    assert start.ceilings is None
    assert start.tokens.equal(noise[..., 0, 0].transpose(1, 2))


def test_noise_of_keyframes_belongs_to_the_video() -> None:
    """At strength 0.5 additional tokens hold noise; that of a video does not depend on its batch."""
    image, noise = torch.zeros(1, 5, 1, 1, 1), torch.zeros(2, 5, 2, 1, 1)
    both = placed([Condition(image, 3, 0.5), Condition(image, 6, 0.5)], noise).tokens[:, 2:]
    assert both.flatten().unique().numel() == both.numel()
    assert placed([Condition(image, 3, 0.5)], noise[:1]).tokens[:, 2:].equal(both[:1, :1])


def test_any_strength_is_exact_for_an_exact_velocity() -> None:
    """A token at strength c holds 1 - c noise and waits for the schedule: the straight path leads it to the clean token."""
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 5, 3, 2, 2), torch.randn(2, 5, 3, 2, 2)
    start = placed([Condition(clean[:, :, :1], 0, 0.35), Condition(clean[:, :, 1:2], 4, 1.0)], noise)
    want = placed([], clean).tokens
    behind = torch.cat([want, placed([], clean[:, :, 1:2]).tokens], dim=1)
    free = torch.cat([placed([], noise).tokens, start.tokens[:, 12:]], dim=1)

    def velocity(noisy: Tensor, sigma: Tensor) -> Tensor:
        torch.testing.assert_close(noisy, flow.add_noise(behind, free, sigma), atol=1e-5, rtol=0)
        return flow.velocity(behind, free)

    levels = capped(ShiftedSchedule(3.0).sigmas(5, 0), start.ceilings)
    torch.testing.assert_close(euler(velocity, start.tokens, levels)[:, :12], want, atol=1e-5, rtol=0)


def test_coordinates_of_a_keyframe_are_those_of_its_time(pipeline: Pipeline) -> None:
    """Frame 6 at 12 frames a second: 0.5 s later than frame 0, height and width unchanged; also where the first latent frame
    is 4 frames shorter than the others (the causal fix)."""
    fps = torch.tensor([12.0])
    for causal_fix in (False, True):
        here, later = (coordinates_at(pipeline.dit, (2, 2, 2), fps, CELLS, causal_fix, frame) for frame in (0, 6))
        torch.testing.assert_close(later[:, 0], here[:, 0] + 0.5, atol=1e-6, rtol=0)
        assert later[:, 1:].equal(here[:, 1:])


def test_a_given_first_frame_keeps_its_bits(pipeline: Pipeline, clip: Tensor) -> None:
    first = PixelCondition(clip[:, :, :1])
    latents = pipeline.vae.normalize(pipeline.vae.encode(clip[:, :, :1]).mode())  # type: ignore[operator]
    seen: list[Tensor] = []
    decode, pipeline.decode = pipeline.decode, lambda latents, *rest: seen.append(latents) or decode(latents, *rest)  # type: ignore
    try:
        settings = {"fps": 25.0, "num_steps": 3, **SIZE}
        free = pipeline.generate(PROMPTS, **settings)
        guided = pipeline.generate(PROMPTS, conditions=[first], **settings)
    finally:
        del pipeline.decode
    assert seen[1][:, :, :1].equal(latents)
    assert not seen[0][:, :, 1:].equal(seen[1][:, :, 1:])
    assert not free.equal(guided)


def test_a_given_video_does_not_depend_on_its_batch(pipeline: Pipeline, clip: Tensor) -> None:
    given = [PixelCondition(clip[:, :, :1], strength=0.8), PixelCondition(clip[:1, :, -1:], -1, 0.5)]
    settings = {"fps": 25.0, "num_steps": 2, **SIZE}
    together = pipeline.generate(PROMPTS, conditions=given, **settings)
    alone = pipeline.generate(PROMPTS, conditions=given, batch_size=1, **settings)
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)


def test_refusals(pipeline: Pipeline, clip: Tensor) -> None:
    settings = {"fps": 25.0, "num_steps": 2, **SIZE}
    image = clip[:1, :, :1]
    with pytest.raises(ConfigError, match="gives 1 frame from frame 13 on, but the video has frames 0 to 12"):
        pipeline.generate(PROMPTS, conditions=[PixelCondition(image, 13)], **settings)
    with pytest.raises(ConfigError, match="gives 5 frames from frame -1 on"):
        pipeline.generate(PROMPTS, conditions=[PixelCondition(clip[:, :, :5], -1)], **settings)
    with pytest.raises(ConfigError, match=r"strength 0.0: it lies in \(0, 1\]"):
        pipeline.generate(PROMPTS, conditions=[PixelCondition(image, 0, 0.0)], **settings)
    with pytest.raises(ConfigError, match="given for 2 videos, but there are 1 prompts"):
        pipeline.generate(PROMPTS[:1], conditions=[PixelCondition(clip[:, :, :1])], **settings)
    with pytest.raises(ConfigError, match="two conditions give the frames from 0 on: give each frame once"):
        pipeline.generate(PROMPTS, conditions=[PixelCondition(image), PixelCondition(image)], **settings)
    with pytest.raises(ConfigError, match="from frame 3 on; it has to begin at a multiple of 4: 0 or 4"):
        pipeline.generate(PROMPTS, conditions=[PixelCondition(clip[:, :, :9], 3)], **settings)
    with pytest.raises(ConfigError, match="16 channels and 2x4 cells; the video has 16 and 4x4"):
        pipeline.generate(PROMPTS, conditions=[Condition(torch.zeros(1, 16, 1, 2, 4))], **settings)
    with pytest.raises(DataError, match="video has 6 frames; this VAE takes 1"):
        pipeline.generate(PROMPTS, conditions=[PixelCondition(clip[:, :, :6])], **settings)
    assert located(PixelCondition(image, -2), 1, 13, 1).frame == 11


# -- against diffusers


@pytest.fixture(scope="module")
def folder(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts: dict[str, Any] = {"dit": pipeline.dit, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    target = tmp_path_factory.mktemp("export") / "model"
    return write_diffusers_folder(target, **parts, scheduler_config=pipeline.schedule.public_config())  # type: ignore[attr-defined]


@torch.no_grad()
def embeddings(pipeline: Pipeline, prompts: list[str]) -> dict[str, Tensor]:
    positive, negative = (pipeline.text_encoder.encode(texts) for texts in (prompts, [""] * len(prompts)))  # type: ignore[operator]
    found = {"prompt_embeds": positive.embeddings, "prompt_attention_mask": positive.mask}
    return found | {"negative_prompt_embeds": negative.embeddings, "negative_prompt_attention_mask": negative.mask}


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


@pytest.mark.parametrize("kind", ["first", "first_and_last", "continuation", "clip_in_the_middle"])
def test_equals_the_condition_pipeline(pipeline: Pipeline, folder: Path, clip: Tensor, kind: str) -> None:
    """LTXConditionPipeline: linear-quadratic levels, coordinates with the causal fix, keyframes as additional tokens.

    Its VAE is made to return the most likely latents, as ours does, and it gets our embeddings: unlike LTXPipeline it runs the
    text encoder with the mask.
    """
    given = {
        "first": [(clip[:1, :, :1], 0)],
        "first_and_last": [(clip[:1, :, :1], 0), (clip[:1, :, -1:], 12)],
        "continuation": [(clip[:1, :, :5], 0)],
        "clip_in_the_middle": [(clip[:1, :, :9], 4)],
    }[kind]
    parts = diffusers.LTXPipeline.from_pretrained(folder).components
    theirs = quiet(diffusers.LTXConditionPipeline(**parts | {"scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}))
    encode = theirs.vae.encode
    theirs.vae.encode = lambda video: SimpleNamespace(latents=encode(video).latent_dist.mode())
    conditions = [Given(video, frame) for video, frame in given]
    frames = theirs(
        conditions=conditions,
        **embeddings(pipeline, PROMPTS[:1]),
        frame_rate=24,
        num_inference_steps=5,
        guidance_scale=2.0,
        image_cond_noise_scale=0.0,
        generator=torch.Generator().manual_seed(video_seed(0, 0)),
        output_type="pt",
        **SIZE,
    ).frames
    ours = pipeline.generate(
        PROMPTS[:1],
        fps=24.0,
        num_steps=5,
        guidance_scale=2.0,
        schedule=LinearQuadraticSchedule(),
        causal_fix=True,
        conditions=[PixelCondition(video, frame) for video, frame in given],
        **SIZE,
    )
    torch.testing.assert_close(frames.transpose(1, 2) * 2 - 1, ours, atol=1e-4, rtol=0)


class Given:
    """What LTXConditionPipeline reads of a condition; tensors in [0, 1]."""

    def __init__(self, video: Tensor, frame: int) -> None:
        images = video[0].transpose(0, 1) / 2 + 0.5  # (3, T, H, W) -> (T, 3, H, W)
        self.image = images if len(images) == 1 else None
        self.video = None if len(images) == 1 else images
        self.frame_index, self.strength = frame, 1.0
