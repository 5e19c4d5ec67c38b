"""Candidates by a tiny random model: what a video follows from, and what is told of where it comes from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.unit.sampling import tiny
from videofm import models
from videofm.config.candidates import CandidatesConfig
from videofm.errors import CheckpointError, ConfigError, DataError, Interrupted
from videofm.media import Frames, to_frames
from videofm.ops.patchify import latents_from_tokens, tokens_from_latents
from videofm.pixels import scaled
from videofm.sampling import Pipeline
from videofm.sampling.candidates import CandidateMaker, generator_name
from videofm.sampling.noise import candidate_seed, initial_noise, video_seed
from videofm.sampling.solvers import SOLVERS, capped
from videofm.train.encoders import weights_hash

PROMPTS = ["a red circle", "a red circle", "a blue square moving left"]


def config_of(run: str | Path = "runs/dit", **changes: Any) -> CandidatesConfig:
    values: dict[str, Any] = {"kind": "dpo_generate", "run": str(run), "prompts": PROMPTS, "num_steps": 2, "fps": 25.0}
    return CandidatesConfig.model_validate(values | {"num_frames": 5, "height": 16, "width": 24} | changes)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return tiny.pipeline(num_layers=1)


@pytest.fixture
def maker(pipeline: Pipeline) -> CandidateMaker:
    return CandidateMaker(pipeline, config_of(), {})


def videos(maker: CandidateMaker, prompts: Sequence[str], seeds: Sequence[int]) -> list[Frames]:
    parts = list(maker.make(prompts, seeds, lambda: None))
    return [np.concatenate(row) for row in zip(*parts, strict=True)]


def test_the_seed_is_a_function_of_seed_prompt_and_candidate_alone(maker: CandidateMaker) -> None:
    """The upper 63 bits of BLAKE2b with 8 bytes; no two of 6 x 7 x 8 are equal, whichever of the three differs."""
    digest = hashlib.blake2b(b"candidate:3:12:5", digest_size=8).digest()
    assert candidate_seed(3, 12, 5) == int.from_bytes(digest, "big") // 2 < 2**63
    found = {candidate_seed(seed, prompt, n) for seed in range(6) for prompt in range(7) for n in range(8)}
    assert len(found) == 6 * 7 * 8
    assert maker.seed(12, 5) == candidate_seed(0, 12, 5)
    assert CandidateMaker(maker.pipeline, config_of(seed=3, num_candidates=9), {}).seed(12, 5) == candidate_seed(3, 12, 5)


def test_a_candidate_does_not_depend_on_its_batch(maker: CandidateMaker) -> None:
    """Within one of 255 levels, which is what the order of sums may do to a rounding; other seeds give other videos."""
    seeds = [maker.seed(number, 0) for number in range(3)]
    together = videos(maker, PROMPTS, seeds)
    assert [video.shape for video in together] == [(5, 16, 24, 3)] * 3 and together[0].dtype == np.uint8
    for prompt, seed, video in zip(PROMPTS, seeds, together, strict=True):
        (alone,) = videos(maker, [prompt], [seed])
        assert np.abs(alone.astype(int) - video).max() <= 1
    assert np.abs(together[0].astype(int) - together[1]).mean() > 1  # one prompt, two candidates


def test_seeds_stand_in_for_those_of_the_index(pipeline: Pipeline) -> None:
    """Given the seeds that a sampler would draw itself, the videos are its own, to the bit."""
    size: dict[str, Any] = {"num_frames": 5, "height": 16, "width": 24, "fps": 25.0, "num_steps": 2, "seed": 7}
    seeds = [video_seed(7, index) for index in (4, 5)]
    (window,) = pipeline.stream_windows(PROMPTS[1:], seeds=seeds, **size)
    (own,) = pipeline.stream_windows(PROMPTS[1:], first_index=4, **size)
    assert torch.equal(window.video, own.video)
    with pytest.raises(ConfigError, match="2 seeds are given for 3 prompts: give one for each"):
        next(pipeline.stream_windows(PROMPTS, seeds=seeds, **size))


def test_long_videos_come_in_parts(pipeline: Pipeline) -> None:
    config = config_of(num_frames=13, window={"num_frames": 9, "overlap_frames": 5})
    parts = list(CandidateMaker(pipeline, config, {}).make(PROMPTS[:2], [1, 2], lambda: None))
    assert [[len(frames) for frames in part] for part in parts] == [[9, 9], [4, 4]]


# -- from clips


CLIP = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)


def from_clip(pipeline: Pipeline, level: float, num_videos: int = 1, **changes: Any) -> list[Frames]:
    """Videos that begin from `CLIP` at a noise level; without guidance."""
    given = [SimpleNamespace(frames=CLIP, level=level)] * num_videos
    maker = CandidateMaker(pipeline, config_of(num_steps=6, guidance_scale=1.0, **changes), {})
    (part,) = maker.make(["a red circle"] * num_videos, range(num_videos), lambda: None, given)
    return part


def test_a_clip_without_noise_is_what_the_vae_keeps_of_it(pipeline: Pipeline) -> None:
    latents = pipeline.vae.normalize(pipeline.vae.encode(scaled(torch.from_numpy(CLIP).permute(3, 0, 1, 2)[None])).mode())
    kept = to_frames(pipeline.decode(latents, [0])[0])
    (video,) = from_clip(pipeline, 1e-4)
    assert np.abs(video.astype(int) - kept).max() <= 1


def test_a_clip_at_full_noise_is_nothing_but_noise(pipeline: Pipeline) -> None:
    (alone,) = videos(CandidateMaker(pipeline, config_of(num_steps=6, guidance_scale=1.0), {}), ["a red circle"], [0])
    (video,) = from_clip(pipeline, 1 - 1e-4)
    assert np.abs(video.astype(int) - alone).max() <= 2


def test_from_a_level_on_it_is_the_flow_of_the_mixture(pipeline: Pipeline) -> None:
    """SDEdit by hand: (1 - eta) z + eta e at eta, then Euler along the levels of the schedule below eta."""
    eta, dit = 0.7, pipeline.dit.eval()
    with torch.no_grad():
        z = pipeline.vae.normalize(pipeline.vae.encode(scaled(torch.from_numpy(CLIP).permute(3, 0, 1, 2)[None])).mode())
        state = tokens_from_latents((1 - eta) * z + eta * initial_noise([0], z.shape[1:]))
        text = pipeline.text_encoder.encode(["a red circle"])
        coordinates = dit.coordinates(z.shape[2:], torch.tensor([25.0]), pipeline.vae.compression, False)
        sigmas = pipeline.schedule.sigmas(6, state.shape[1]).tolist()
        levels = [eta, *(sigma for sigma in sigmas if sigma < eta)]
        for sigma, following in pairwise(levels):
            state = state + (following - sigma) * dit(state, torch.tensor([sigma]), text, coordinates)
    wanted = to_frames(pipeline.decode(latents_from_tokens(state, z.shape[2:]), [0])[0])
    (video,) = from_clip(pipeline, eta)
    assert np.abs(video.astype(int) - wanted).max() <= 1


def test_two_candidates_of_a_clip_share_more_than_two_of_noise(pipeline: Pipeline) -> None:
    """What differs grows with the level from which they are denoised."""
    levels = (0.001, 0.05, 0.3, 0.999)
    apart = [np.abs(np.subtract(*from_clip(pipeline, level, 2), dtype=np.float64)).mean() for level in levels]
    assert apart == sorted(apart) and apart[0] < apart[-1] / 10


def test_clips_at_other_levels_are_made_apart(pipeline: Pipeline) -> None:
    """In one call as alone, in the order that was asked for."""
    maker = CandidateMaker(pipeline, config_of(num_steps=6, guidance_scale=1.0), {})
    given = [SimpleNamespace(frames=CLIP, level=level) for level in (0.3, 0.3, 0.6)]
    (together,) = maker.make(["a red circle"] * 3, [0, 1, 0], lambda: None, given)
    for video, level, number in zip(together, (0.3, 0.3, 0.6), (0, 1, 0), strict=True):
        alone = from_clip(pipeline, level, number + 1)[number]
        assert np.abs(video.astype(int) - alone).max() <= 1


def test_levels_are_uniform_and_follow_from_seed_and_clip(pipeline: Pipeline) -> None:
    """Of 2,000: the quartiles of the uniform distribution within 0.01, four standard deviations of an order statistic."""
    config = config_of(prompts=[], from_clips={"manifest": "x", "eta_min": 0.6, "eta_max": 0.8})
    maker = CandidateMaker(pipeline, config, {})
    found = np.array([maker.level(f"{number:064x}") for number in range(2000)])
    assert found.min() >= 0.6 and found.max() < 0.8
    np.testing.assert_allclose(np.quantile(found, [0.25, 0.5, 0.75]), [0.65, 0.7, 0.75], atol=0.01)
    other = CandidateMaker(pipeline, config.model_copy(update={"seed": 1}), {})
    assert maker.level("a") == CandidateMaker(pipeline, config, {}).level("a") != other.level("a")


@pytest.mark.parametrize(("solver", "num_evaluations"), [("euler", 3), ("heun", 5), ("stochastic", 3)])
def test_the_model_is_not_asked_while_all_tokens_wait(solver: str, num_evaluations: int) -> None:
    """Levels 1, 0.8, 0.6, 0.4, 0.2, 0 cut off at 0.5: the first two steps move nothing, the third goes from 0.5 to 0.4."""
    levels = capped(torch.linspace(1, 0, 6), torch.full((1, 4), 0.5))
    noise, asked, steps = torch.randn(1, 4, 2, generator=torch.Generator().manual_seed(0)), [], []

    def velocity(state: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        asked.append(float(sigma[0, 0]))
        return state

    solve = SOLVERS[solver](lambda number: torch.zeros_like(noise))
    found = solve(velocity, noise, levels, lambda: steps.append(1))
    assert (len(asked), len(steps)) == (num_evaluations, 5) and asked[0] == 0.5
    if solver == "euler":
        torch.testing.assert_close(found, noise * (1 - 0.1) * (1 - 0.2) * (1 - 0.2))


def test_a_step_may_stop_it(maker: CandidateMaker) -> None:
    steps: list[int] = []

    def on_step() -> None:
        steps.append(1)
        if len(steps) == 2:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        list(maker.make(PROMPTS[:1], [1], on_step))
    assert len(steps) == 2


def test_a_model_that_diverged_is_told(pipeline: Pipeline) -> None:
    broken = tiny.pipeline(num_layers=1)
    with torch.no_grad():
        broken.dit.proj_out.bias.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(DataError, match="the video of 'a red circle' with seed 5 has values that are not finite"):
        list(CandidateMaker(broken, config_of(), {}).make(PROMPTS[:1], [5], lambda: None))


def test_prompts_that_are_cut_are_named(pipeline: Pipeline) -> None:
    """The encoder takes 24 bytes with the end token; a suffix counts."""
    prompts = ["a" * 23, "a" * 24, "b"]
    assert CandidateMaker(pipeline, config_of(), {}).cut(prompts) == [False, True, False]
    assert CandidateMaker(pipeline, config_of(prompt_suffix=" ."), {}).cut(prompts) == [True, True, False]


def write_run(path: Path, pipeline: Pipeline, dit: nn.Module, ema: nn.Module | None = None) -> Path:
    """What a training leaves of a DiT, with one checkpoint."""
    checkpoint = path / "checkpoints" / "step_00000002"
    models.save(dit, checkpoint / "models" / "dit")
    if ema is not None:
        models.save(ema, checkpoint / "ema" / "dit")
    for role in ("vae", "text_encoder"):
        models.save(getattr(pipeline, role), path / "frozen" / role)
    (checkpoint / "COMMITTED.json").write_text("{}")
    return path


def policy_of(run: Path, **changes: Any) -> str:
    policy: str = CandidateMaker.load(config_of(run, **changes), "cpu").origin["policy"]
    return policy


def test_the_policy_is_the_hash_of_the_weights_that_are_used(pipeline: Pipeline, tmp_path: Path) -> None:
    """Of averaged weights with `ema`; whatever type they are cast to; of base and adapters together, which add nothing here."""
    averaged = tiny.pipeline(num_layers=1).dit
    with torch.no_grad():
        averaged.proj_in.bias.add_(1)  # type: ignore[union-attr, operator]
    run = write_run(tmp_path / "run", pipeline, pipeline.dit, averaged)
    assert policy_of(run) == weights_hash(averaged)
    assert policy_of(run, dtype="bf16") == weights_hash(averaged)
    assert policy_of(run, ema=False) == weights_hash(pipeline.dit) != weights_hash(averaged)
    adapted = tiny.pipeline(num_layers=1).dit
    models.inject_lora(adapted, 2)
    tuned = write_run(tmp_path / "tuned", pipeline, adapted)
    models.save_base(adapted, tuned / "base" / "dit")
    assert policy_of(tuned) == weights_hash(pipeline.dit)
    with torch.no_grad():
        next(parameter for name, parameter in adapted.named_parameters() if "lora_B" in name).fill_(0.1)
    models.save(adapted, tuned / "checkpoints" / "step_00000002" / "models" / "dit")
    assert policy_of(tuned) not in (weights_hash(pipeline.dit), weights_hash(averaged))


def test_the_origin_says_how_and_not_where(pipeline: Pipeline, tmp_path: Path) -> None:
    run = write_run(tmp_path / "tuned", pipeline, pipeline.dit)
    schedule = {"kind": "shifted", "shift": 3.0}
    loaded = CandidateMaker.load(config_of(run, guidance_scale=2.0, schedule=schedule, crf=30, seed=4), "cpu")
    assert loaded.origin["generator"] == "tuned"
    sampler = loaded.origin["sampler"]
    assert (sampler["guidance_scale"], sampler["schedule"], sampler["seed"]) == (2.0, schedule, 4)
    assert (sampler["num_frames"], sampler["height"], sampler["width"], sampler["fps"]) == (5, 16, 24, 25.0)
    assert not {"run", "prompts", "prompts_file", "crf", "engine", "num_candidates"} & set(sampler)
    assert str(tmp_path) not in json.dumps(loaded.origin)
    assert loaded.settings.schedule is not None and loaded.pipeline.schedule == loaded.settings.schedule
    assert generator_name(run / "checkpoints" / "step_00000002") == "tuned/step_00000002"
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        CandidateMaker.load(config_of(tmp_path / "nowhere"), "cpu")
