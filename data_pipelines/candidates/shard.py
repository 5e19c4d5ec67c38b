"""One shard of candidates: what an actor of `videofm dpo generate` does. Ends with a committed shard of clips.

```
header-candidates.json          by which weights, sampler and prompts the candidates of this run directory are made
work/GROUP/KEY.mp4              videos of batches that are done, of a shard that is not
groups/shard-GROUP.json         what else is known of a shard
```
A candidate follows from its prompt, its seed and the header; those that are made together are the same at each attempt, since a
shard is cut into batches in one way. So what a killed attempt left behind is what would be made again, and is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipelines.candidates.clips import identity, read_frames
from data_pipelines.clip_file import ClipFormat, ClipWriter, check_clip, constant_rate
from data_pipelines.encode.shard import claim_header
from videofm.config.candidates import CandidatesConfig
from videofm.data.index import ClipRecord
from videofm.data.manifest import entry_path
from videofm.data.shards import ShardWriter
from videofm.errors import DataError, Interrupted
from videofm.files import sync
from videofm.media import Frames
from videofm.run_dir import RunDirectory, read_json, write_json

_KIND = "candidates"
HEADER = "header-candidates.json"


@dataclass(frozen=True)
class Given:
    """A clip that a video begins from: its frames `(T, H, W, 3)`, and the noise level that they are brought to."""

    frames: Frames
    level: float


class Maker(Protocol):
    """Makes videos (`registry.CANDIDATES`).

    Attributes:
        origin: `generator`, `policy` and `sampler` of every video, in plain values: all that decides it besides its prompt and
            its seed.
    """

    origin: dict[str, Any]

    def seed(self, prompt_number: int, candidate: int) -> int:
        """The seed of a candidate of a prompt: a function of the seed of the config and these two."""
        ...

    def cut(self, prompts: Sequence[str]) -> list[bool]:
        """Which of `prompts` are longer than the model takes."""
        ...

    def level(self, name: str) -> float:
        """The noise level from which the clip `name` is denoised."""
        ...

    def make(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        on_step: Callable[[], None],
        given: Sequence[Given] = (),
    ) -> Iterator[Sequence[Frames]]:
        """A video for each prompt, all together, in parts that follow each other in time; `on_step` may raise to stop.

        Videos begin from noise, or each from what is `given` for it.
        """
        ...


@dataclass(frozen=True)
class Candidate:
    """A video to make: candidate `number` of prompt `prompt_number`."""

    prompt_number: int
    number: int
    prompt: str

    @property
    def group(self) -> str:
        """The source of the clip: what all candidates of the prompt share."""
        return f"{self.prompt_number:06d}"

    @property
    def key(self) -> str:
        """The key of the clip."""
        return f"{self.group}-{self.number:03d}"


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard: how many of its videos were made now, and how many of its prompts are cut."""

    group: str
    num_made: int
    num_cut_prompts: int


class ShardMaker:
    """Makes shard after shard into the run directory `folder`."""

    def __init__(
        self,
        config: CandidatesConfig,
        prompts: Sequence[str],
        folder: Path,
        maker: Maker,
        clips: Sequence[ClipRecord] = (),
    ) -> None:
        """
        Args:
            config: how many videos, and how they are stored.
            prompts: of all shards.
            folder: the run directory.
            maker: makes the videos.
            clips: with `from_clips`, the clip of each prompt.

        Raises:
            DataError: the run directory holds candidates of other weights.
        """
        self.config, self.prompts, self.folder, self.maker, self.clips = config, list(prompts), Path(folder), maker, clips
        self.rate = constant_rate(config.fps)
        self.form = ClipFormat(self.rate, config.height, config.width, config.crf, config.preset, config.gop)
        header: dict[str, Any] = {
            **maker.origin,
            "prompts": hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest(),
            "num_candidates": config.num_candidates,
            "prompts_a_shard": config.prompts_a_shard,
            "stored": {"fps": str(self.rate), "crf": config.crf, "preset": config.preset, "gop": config.gop},
        }
        if config.from_clips is not None:
            levels = [config.from_clips.eta_min, config.from_clips.eta_max]
            header["clips"] = {"content": identity(clips), "levels": levels}
        self.hash = claim_header(self.folder, _KIND, header, made_by="model")

    def work(self, group: str) -> ShardReport | None:
        """Make what is missing of a shard and commit it; None where a stop was asked for, which keeps whole batches.

        Raises:
            DataError: a video cannot be read back as it was written, or has values that are no numbers.
            ConfigError: the model makes no such videos.
        """
        wanted = wanted_of(group, self.prompts, self.config)
        cut = sum(self.maker.cut([candidate.prompt for candidate in wanted if candidate.number == 0]))
        if entry_path(self.folder, group).exists():
            return ShardReport(group, 0, cut)
        place = self.folder / "work" / group
        place.mkdir(parents=True, exist_ok=True)
        num_made = 0
        for first in range(0, len(wanted), self.config.batch_size):
            batch = wanted[first : first + self.config.batch_size]
            if not all(_path(place, candidate).exists() for candidate in batch):
                try:
                    self._make(batch, place)
                except Interrupted:
                    return None
                num_made += len(batch)
        write_json(_report_path(self.folder, group), {"num_cut_prompts": cut})
        self._commit(group, wanted, place)
        shutil.rmtree(place)
        return ShardReport(group, num_made, cut)

    def _make(self, batch: Sequence[Candidate], place: Path) -> None:
        """The files of a batch, each under its name once it is whole."""
        run = RunDirectory(self.folder)

        def on_step() -> None:
            if run.stop_requested:
                raise Interrupted("stopped on request")

        on_step()
        asides = [place / f".{candidate.key}.tmp-{os.getpid()}.mp4" for candidate in batch]
        try:
            with ExitStack() as stack:
                writers = [stack.enter_context(ClipWriter(aside, self.form)) for aside in asides]
                prompts, seeds = [candidate.prompt for candidate in batch], [self._seed(candidate) for candidate in batch]
                for part in self.maker.make(prompts, seeds, on_step, self._given(batch)):
                    for writer, frames in zip(writers, part, strict=True):
                        for image in frames:
                            writer.write(np.ascontiguousarray(image))
            for candidate, aside in zip(batch, asides, strict=True):
                if wrong := check_clip(aside, self.config.num_frames, self.config.height, self.config.width):
                    raise DataError(f"candidate {candidate.key}: {wrong}; see that the disk of {place} is sound and run again")
                sync(aside)
            for candidate, aside in zip(batch, asides, strict=True):
                os.replace(aside, _path(place, candidate))
            sync(place)
        finally:
            for aside in asides:
                aside.unlink(missing_ok=True)

    def _commit(self, group: str, wanted: Sequence[Candidate], place: Path) -> None:
        config = self.config
        with ShardWriter(self.folder, group, self.hash) as writer:
            for candidate in wanted:
                writer.add(
                    candidate.key,
                    _path(place, candidate).read_bytes(),
                    num_frames=config.num_frames,
                    fps=float(self.rate),
                    height=config.height,
                    width=config.width,
                    caption=candidate.prompt,
                    source_id=candidate.group,
                    split="train",
                    metadata=self._facts(candidate),
                )
            writer.commit(sorted({candidate.group for candidate in wanted}))

    def _facts(self, candidate: Candidate) -> dict[str, Any]:
        """What KEY.json says besides what a clip of any dataset does; `origin` is a `data.preferences.Origin`."""
        origin = {**self.maker.origin, "seed": self._seed(candidate)}
        if self.config.from_clips is not None:
            clip = self.clips[candidate.prompt_number]
            begun = {"key": clip.key, "sha256": clip.sha256, "level": self.maker.level(clip.sha256)}
            origin["sampler"] = {**origin["sampler"], "from_clip": begun}
        return {"origin": origin, "prompt_number": candidate.prompt_number, "candidate": candidate.number}

    def _given(self, batch: Sequence[Candidate]) -> list[Given]:
        """What the videos of a batch begin from; nothing where that is noise."""
        if self.config.from_clips is None:
            return []
        clips = {candidate.prompt_number: self.clips[candidate.prompt_number] for candidate in batch}
        found = {
            number: Given(read_frames(self.config, self.config.from_clips, clip), self.maker.level(clip.sha256))
            for number, clip in clips.items()
        }
        return [found[candidate.prompt_number] for candidate in batch]

    def _seed(self, candidate: Candidate) -> int:
        return self.maker.seed(candidate.prompt_number, candidate.number)


def wanted_of(group: str, prompts: Sequence[str], config: CandidatesConfig) -> list[Candidate]:
    """The candidates of a shard, by key."""
    first = int(group) * config.prompts_a_shard
    return [
        Candidate(number, candidate, prompts[number])
        for number in range(first, min(first + config.prompts_a_shard, len(prompts)))
        for candidate in range(config.num_candidates)
    ]


def groups_of(num_prompts: int, prompts_a_shard: int) -> list[str]:
    """The names of all shards."""
    return [f"{number:05d}" for number in range(-(-num_prompts // prompts_a_shard))]


def num_waiting(folder: Path) -> int:
    """Videos that are made, of shards that are not committed."""
    return sum(1 for _ in (folder / "work").glob("*/[!.]*.mp4"))


def num_cut_prompts(folder: Path, groups: Sequence[str]) -> int:
    """How many prompts of committed shards are longer than the model takes."""
    return sum(int(read_json(_report_path(folder, group))["num_cut_prompts"]) for group in groups)


def _report_path(folder: Path, group: str) -> Path:
    return folder / "groups" / f"shard-{group}.json"


def _path(place: Path, candidate: Candidate) -> Path:
    return place / f"{candidate.key}.mp4"
