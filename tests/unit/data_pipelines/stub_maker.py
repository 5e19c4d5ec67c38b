"""A maker of candidates without a model: a frame is a function of the prompt and the seed, so that bytes can be compared."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.candidates.shard import HEADER, Given, ShardMaker, groups_of
from videofm.config.candidates import CandidatesConfig
from videofm.media import Frames

LONGEST = 20
"""Letters of a prompt that are not cut."""

PROMPTS = ["a red circle", "a blue square that moves left", "a red circle", "ä", "five"]
"""One is longer than the stub takes, two are the same."""

TREE = ("shards", "index", "manifest", "work", "groups", HEADER)


class StubMaker:
    """Videos of a bar that moves over noise, in two parts.

    With the environment variable VIDEOFM_STUB_DEATH=FILE the process kills itself over its third batch, once: FILE says that it
    happened.
    """

    def __init__(self, config: CandidatesConfig, policy: str = "a" * 64) -> None:
        self.config, self.num_batches = config, 0
        self.origin = {"generator": "stub", "policy": policy, "sampler": {"num_steps": config.num_steps}}

    @classmethod
    def load(cls, config: CandidatesConfig, device: str, num_threads: int) -> StubMaker:
        """What an actor calls."""
        assert (device, num_threads) == ("cpu", 1)
        return cls(config)

    def seed(self, prompt_number: int, candidate: int) -> int:
        return 10**6 * self.config.seed + 1000 * prompt_number + candidate

    def cut(self, prompts: Sequence[str]) -> list[bool]:
        return [len(prompt) > LONGEST for prompt in prompts]

    def level(self, name: str) -> float:
        return int(name[:2], 16) / 512

    def make(
        self, prompts: Sequence[str], seeds: Sequence[int], on_step: Callable[[], None], given: Sequence[Given] = ()
    ) -> Iterator[Sequence[Frames]]:
        self.num_batches += 1
        mark = os.environ.get("VIDEOFM_STUB_DEATH")
        if mark and self.num_batches == 3 and not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        videos = [self._video(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        if given:
            videos = [one.frames[:, :16, :24] // 2 + video // 2 for one, video in zip(given, videos, strict=True)]
        for part in (slice(0, 2), slice(2, None)):
            on_step()
            yield [video[part] for video in videos]

    def _video(self, prompt: str, seed: int) -> np.ndarray[Any, Any]:
        rng = np.random.default_rng([seed, *prompt.encode()])
        shape = (self.config.num_frames, self.config.height, self.config.width, 1)
        frames = rng.integers(100, 156, shape, dtype=np.uint8).repeat(3, axis=3)  # grey: chroma is stored at half the size
        for number, frame in enumerate(frames):
            frame[:, number : number + 4] = 255
        return frames


def config_of(**changes: Any) -> CandidatesConfig:
    """5 prompts of 3 candidates in 3 shards, made in batches of 4 videos of 5 x 16 x 24."""
    values: dict[str, Any] = {"kind": "dpo_generate", "run": "runs/dit", "prompts": PROMPTS, "num_candidates": 3}
    values |= {"num_frames": 5, "height": 16, "width": 24, "fps": 24000 / 1001, "batch_size": 4, "prompts_a_shard": 2}
    return CandidatesConfig.model_validate(values | changes)


def make_all(config: CandidatesConfig, folder: Path, maker: Any = None) -> ShardMaker:
    """Every shard, one after the other."""
    shards = ShardMaker(config, PROMPTS, folder, maker or StubMaker(config))
    for group in groups_of(len(PROMPTS), config.prompts_a_shard):
        assert shards.work(group) is not None
    return shards


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a dataset of candidates."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parts[len(folder.parts)] in TREE]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
