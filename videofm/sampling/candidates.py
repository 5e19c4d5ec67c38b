"""Candidate videos of prompts by a DiT, with where they come from: what the actors of `videofm dpo generate` load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from videofm import media
from videofm.config.base import result_fields
from videofm.config.candidates import CandidatesConfig
from videofm.config.sample import SamplerConfig
from videofm.errors import DataError
from videofm.registry import resolve
from videofm.sampling.conditioning import PixelCondition
from videofm.sampling.images import fitted
from videofm.sampling.loading import load_pipeline
from videofm.sampling.noise import candidate_seed, noise_level
from videofm.sampling.pipeline import Pipeline
from videofm.sampling.settings import SamplingSettings
from videofm.sampling.source import models_folder

_NOT_SAMPLER = ("run", "prompts", "prompts_file")
"""Fields of a sampler that say what is made by which model, and not how."""


class GivenClip(Protocol):
    """A clip that a video begins from: its frames, uint8 `(T, H, W, 3)`, and the noise level that they are brought to."""

    @property
    def frames(self) -> media.Frames: ...

    @property
    def level(self) -> float: ...


class CandidateMaker:
    """Makes candidates with a pipeline that is kept; see `data_pipelines.candidates.shard.Maker`.

    Attributes:
        origin: `generator` (name of the run or folder), `policy` (SHA-256 of the DiT's weights as they are stored, adapters
            added, before they are cast to `dtype`) and `sampler` (settings, in plain values).
    """

    def __init__(self, pipeline: Pipeline, config: CandidatesConfig, origin: dict[str, Any]) -> None:
        self.pipeline, self.config, self.origin = pipeline, config, origin
        self.settings = SamplingSettings.from_config(config)

    @classmethod
    def load(cls, config: CandidatesConfig, device: str, num_threads: int = 1) -> CandidateMaker:
        """The models of a config, on `device`, in a process of so many threads.

        Raises:
            CheckpointError, ConfigError: see `loading.load_pipeline`.
        """
        torch.set_num_threads(num_threads)
        origin = {
            "generator": generator_name(config.run),
            "policy": weights_hash(config.run, "dit", config.ema),
            "sampler": sampler_facts(config),
        }
        return cls(load_pipeline(config, SamplingSettings.from_config(config), device), config, origin)

    def seed(self, prompt_number: int, candidate: int) -> int:
        """The generator seed of a candidate."""
        return candidate_seed(self.config.seed, prompt_number, candidate)

    def cut(self, prompts: Sequence[str]) -> list[bool]:
        """Which of `prompts` are longer than the text encoder takes."""
        return [self.pipeline.num_cut_prompts([prompt], self.config.prompt_suffix) > 0 for prompt in prompts]

    def level(self, name: str) -> float:
        """The noise level from which the clip `name` is denoised: uniform between those of the config."""
        wanted = self.config.from_clips
        assert wanted is not None, "only a config with from_clips begins from clips"
        return noise_level(self.config.seed, name, wanted.eta_min, wanted.eta_max)

    def make(
        self, prompts: Sequence[str], seeds: Sequence[int], on_step: Callable[[], None], given: Sequence[GivenClip] = ()
    ) -> Iterator[list[media.Frames]]:
        """A video for each prompt and seed, all together, in parts that follow each other in time.

        Those that begin from clips, `given` one for each, are made together where these are at one noise level, and come in
        one part.

        Raises:
            ConfigError: the model makes no such videos.
            DataError: a video has values that are not finite.
        """
        if not given:
            yield from self._parts(prompts, seeds, on_step, [])
            return
        found: list[media.Frames] = []
        rows = zip(prompts, seeds, given, strict=True)
        for level, group in groupby(rows, key=lambda row: row[2].level):
            own_prompts, own_seeds, clips = zip(*group, strict=True)
            video = torch.cat([self._fitted(clip.frames) for clip in clips])
            parts = self._parts(own_prompts, own_seeds, on_step, [PixelCondition(video, strength=1 - level)])
            found += [np.concatenate(row) for row in zip(*parts, strict=True)]
        yield found

    def _fitted(self, frames: media.Frames) -> Tensor:
        """Frames as the videos are, cropped about the centre and scaled, `(1, 3, T, H, W)`."""
        return fitted(frames, self.config.height, self.config.width, self.pipeline.vae.compression, "crop")

    def _parts(
        self, prompts: Sequence[str], seeds: Sequence[int], on_step: Callable[[], None], conditions: list[PixelCondition]
    ) -> Iterator[list[media.Frames]]:
        windows = self.pipeline.stream_windows(
            prompts, conditions=conditions, seeds=seeds, on_step=on_step, on_token=on_step, settings=self.settings
        )
        for window in windows:
            for video, prompt, seed in zip(window.video, prompts, seeds, strict=True):
                if not bool(video.isfinite().all()):
                    raise DataError(
                        f"the video of {prompt!r} with seed {seed} has values that are not finite: see whether the training of "
                        f"{self.config.run} diverged, or take dtype fp32."
                    )
            yield [media.to_frames(video) for video in window.video]


def weights_hash(run: str | Path, role: str, ema: bool) -> str:
    """SHA-256 (hex) of the weights of a role of a run, checkpoint or folder, as they are stored; adapters are added to them.

    Raises:
        CheckpointError: there is no such model.
    """
    component = "transformer" if role == "dit" else None
    model = resolve("videofm.models:load")(models_folder(run), role=role, component=component, ema=ema)
    found: str = resolve("videofm.train.encoders:weights_hash")(model)
    return found


def generator_name(run: str | Path) -> str:
    """What a run or folder is called, without the place where it lies; of a checkpoint with the name of its run."""
    path = Path(run).resolve()
    return f"{path.parents[1].name}/{path.name}" if path.parent.name == "checkpoints" else path.name


def sampler_facts(config: SamplerConfig) -> dict[str, Any]:
    """The settings of a sampler in plain values; of a guide its name and the hash of its weights, not where it lies."""
    fields = {name: value for name, value in result_fields(config).items() if name in SamplerConfig.model_fields}
    facts = {name: value for name, value in fields.items() if name not in _NOT_SAMPLER}
    if config.guide is not None:
        run = facts["guide"].pop("run")
        facts["guide"] |= {"generator": generator_name(run), "policy": weights_hash(run, "ar", config.ema)}
    return facts
