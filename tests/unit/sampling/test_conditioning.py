"""What is given of a video: where it is written, and that it stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.sampling import tiny
from videofm import models
from videofm.errors import ConfigError, DataError
from videofm.ops import flow
from videofm.sampling import Condition, Pipeline, PixelCondition, ShiftedSchedule
from videofm.sampling.conditioning import FrameGrid, coordinates_at, located, place
from videofm.sampling.solvers import capped, euler
from videofm.types import Compression

CELLS = Compression(4, 8, 8)
SIZE = {"num_frames": 13, "height": 32, "width": 32}
FOUR = FrameGrid(4)
PROMPTS = ["a red circle moving left", "a cyan square"]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return tiny.pipeline()


@pytest.fixture(scope="module")
def clip() -> Tensor:
    return torch.rand(2, 3, 13, 32, 32, generator=torch.Generator().manual_seed(3)) * 1.6 - 0.8


def placed(conditions: list[Condition], noise: Tensor, grid: FrameGrid = FOUR) -> Any:
    def coordinates_of(num_latent_frames: int, frame: int) -> Tensor:
        num_tokens = num_latent_frames * noise.shape[3] * noise.shape[4]
        return torch.full((len(noise), 3, num_tokens), float(frame))

    return place(noise, conditions, coordinates_of, grid, seeds=range(len(noise)))


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


def test_frames_on_latent_frames() -> None:
    """LTX: 4 frames a latent frame. Step-Video: chunks of 17 frames, 1 + 8 + 8 of them on 3 latent frames."""
    assert [FrameGrid(4).position(frame) for frame in (0, 4, 6)] == [0.0, 1.0, 1.5]
    grid = FrameGrid(8, 17)
    assert [grid.position(frame) for frame in (0, 8, 16, 17, 20, 25, 34)] == [0.0, 1.0, 2.0, 3.0, 3.375, 4.0, 6.0]
    assert [frame for frame in range(40) if grid.begins(frame)] == [0, 17, 34]
    assert [frame for frame in range(40) if FrameGrid(4).begins(frame)] == [0]


def test_where_the_vae_begins_anew_all_is_written_in_place() -> None:
    """9 latent frames are chunks of 3. In place: an image at frame 17, latent frame 3, and a chunk at frame 34, latent frames 6
    to 8. An image at frame 20 is not the first of a chunk, and goes behind."""
    noise, image, clip = torch.randn(1, 5, 9, 1, 1), torch.full((1, 5, 1, 1, 1), 7.0), torch.full((1, 5, 3, 1, 1), 9.0)
    given = [Condition(image, 17), Condition(clip, 34), Condition(image, 20, 0.5)]
    start = placed(given, noise, FrameGrid(8, 17))
    assert start.ceilings.tolist() == [[1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.5]]
    assert start.tokens[0, [3, 6, 7, 8], 0].tolist() == [7.0, 9.0, 9.0, 9.0]
    assert start.tokens[0, [0, 1, 2, 4, 5]].equal(noise[0, :, [0, 1, 2, 4, 5], 0, 0].T)
    assert start.coordinates[0, 0].tolist() == [0] * 9 + [20]
    with pytest.raises(ConfigError, match="from frame 8 on; it has to begin at a multiple of 17: 0 or 17"):
        placed([Condition(clip, 8)], noise, FrameGrid(8, 17))
    with pytest.raises(ConfigError, match="two conditions give the frames from 34 on"):
        placed([Condition(clip, 34), Condition(image, 34)], noise, FrameGrid(8, 17))


def step_video() -> Pipeline:
    torch.manual_seed(0)
    vae = models.build("vae/step_video", "tiny")
    dit = models.build("dit/step_video", "tiny", num_layers=1, in_channels=vae.latent_channels)
    for parameter in dit.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return Pipeline(dit, vae, models.build("text/step_video", "tiny"), ShiftedSchedule(13.0))


def test_keyframes_of_step_video() -> None:
    """The first frame of the second chunk has the latents that it has in the clip: it is latent frame 3, at noise level 0 for
    the model, and keeps its bits. Frame 20 lies 3 frames behind: at 3 + 3 / 8 along time, at level 0 as well, removed in the
    end. The tokens between are all noise at first."""
    pipeline = step_video()
    video = torch.rand(1, 3, 34, 32, 32, generator=torch.Generator().manual_seed(4)) * 1.6 - 0.8
    with torch.no_grad():
        whole, alone = (pipeline.vae.encode(x).mode() for x in (video, video[:, :, 17:18]))  # type: ignore[operator]
    torch.testing.assert_close(alone, whole[:, :, 3:4], atol=1e-5, rtol=0)

    seen: list[Any] = []
    pipeline.dit.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    latents: list[Tensor] = []
    pipeline.decode = lambda found, *rest: latents.append(found) or torch.zeros(1, 3, 34, 32, 32)  # type: ignore[method-assign, assignment, func-returns-value]
    given = [PixelCondition(video[:, :, 17:18], 17), PixelCondition(video[:, :, 20:21], 20)]
    settings = {"num_frames": 34, "height": 32, "width": 32, "fps": 25.0, "num_steps": 2, "guidance_scale": 1.0}
    pipeline.generate(["a cat"], conditions=given, **settings)  # type: ignore[arg-type]
    _, sigma, _, coordinates = seen[0]
    assert sigma.shape == (1, 6 * 4 + 4)
    assert sigma[0].tolist() == [1.0] * 12 + [0.0] * 4 + [1.0] * 8 + [0.0] * 4
    assert coordinates[0, 0].tolist() == [frame for frame in range(6) for _ in range(4)] + [3.375] * 4
    assert latents[0].shape == whole.shape
    assert latents[0][:, :, 3:4].equal(pipeline.vae.normalize(alone).float())  # type: ignore[operator]
    pipeline.generate(["a cat"], **settings)  # type: ignore[arg-type]
    assert (latents[1] - latents[0]).abs().amax(dim=(0, 1, 3, 4)).min() > 1e-3, "all frames know of it"


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
        here, later = (coordinates_at(pipeline.dit, (2, 2, 2), fps, CELLS, causal_fix, frame / 4) for frame in (0, 6))
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
