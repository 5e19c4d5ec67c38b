"""The stage `dpo_generate`: prompts -> a dataset of candidate videos, by Ray actors that each take a shard at a time.

The run directory is the dataset's folder. A committed shard is never made again, and of a shard that is not, whole batches of
videos are kept (see `shard.py`): a run that was stopped or killed goes on where it was, to the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipelines.candidates.shard import HEADER, ShardMaker, ShardReport, groups_of, num_cut_prompts, num_waiting, wanted_of
from data_pipelines.shard_actors import ShardActors
from videofm import registry
from videofm.config.candidates import CandidatesConfig
from videofm.data.index import ClipRecord
from videofm.data.manifest import entry_path
from videofm.errors import ConfigError, Interrupted
from videofm.progress import LOG, progress
from videofm.run_dir import RunDirectory, read_json

MAX_PROMPTS = 10**6
"""Numbers of prompts have six digits in keys, which must sort as numbers do."""


def run(
    config: CandidatesConfig, prompts: Sequence[str], run: RunDirectory, clips: Sequence[ClipRecord] = ()
) -> dict[str, Any]:
    """Make the shards that are not there yet; with `from_clips` prompt i begins from `clips[i]`.

    Returns:
        counts of prompts, videos and prompts that were cut, and `policy`, the hash of the weights.

    Raises:
        ConfigError: more prompts than keys can number; a size that the model cannot make; no place for the actors.
        CheckpointError: the model is missing, or is not one that makes videos.
        DataError: the weights are not those that made what is there already; a shard killed more actors than allowed.
        Interrupted: `control/stop` was touched; what is finished stays, and the next run goes on.
    """
    if len(prompts) > MAX_PROMPTS:
        raise ConfigError(f"{len(prompts)} prompts are more than {MAX_PROMPTS}: make them in several run directories.")
    groups = groups_of(len(prompts), config.prompts_a_shard)
    todo = [group for group in groups if not entry_path(run.path, group).exists()]
    for group in sorted(set(groups) - set(todo)):
        shutil.rmtree(run.path / "work" / group, ignore_errors=True)  # of an actor that was killed behind its commit
    sizes = {group: len(wanted_of(group, prompts, config)) for group in todo}
    total = len(prompts) * config.num_candidates
    with progress("candidate videos", total) as bar:
        committed = total - sum(sizes.values())

        def tick() -> None:
            bar.advance(max(0, committed + num_waiting(run.path) - bar.count))

        bar.start_at(committed + num_waiting(run.path))
        if todo and not run.stop_requested:
            actors = _actors(config, prompts, run.path, clips)
            with actors.cluster():
                for report in actors.work(todo, lambda: run.stop_requested, tick):
                    committed += sizes[report.group]
    done = [group for group in groups if entry_path(run.path, group).exists()]
    if len(done) < len(groups):
        raise Interrupted(f"stopped with {len(done)} of {len(groups)} shards of candidates done; run it again to go on")
    num_cut = num_cut_prompts(run.path, groups)
    if num_cut:
        LOG.warning("%d of %d prompts are longer than the text encoder takes; their ends are cut", num_cut, len(prompts))
    policy = read_json(run.path / HEADER)["policy"]
    return {"num_prompts": len(prompts), "num_videos": total, "num_cut_prompts": num_cut, "policy": policy}


def dry_run(config: CandidatesConfig) -> str:
    """Say what would run."""
    of = f"{len(config.prompts)} prompts" if config.prompts else f"the prompts of {config.prompts_file}"
    if config.from_clips is not None:
        of = f"the clips of {config.from_clips.manifest}"
    video = f"{config.num_frames}x{config.height}x{config.width}"
    return f"{config.num_candidates} candidates of {video} for each of {of}, {config.engine.num_actors} actors"


def _actors(config: CandidatesConfig, prompts: Sequence[str], folder: Path, clips: Sequence[ClipRecord]) -> ShardActors:
    # The name of the class travels, not the class: an actor imports it where it runs.
    maker, values = registry.CANDIDATES["pipeline"], config.model_dump(mode="json")
    arguments = values, list(prompts), str(folder.resolve()), maker, list(clips)
    return ShardActors(CandidateActor, arguments, config.engine, name="candidate", made="a shard of candidates")


class CandidateActor:
    """A Ray actor. It loads the model with its first shard, so that what is wrong with it is told as an error."""

    def __init__(self, config: dict[str, Any], prompts: list[str], folder: str, maker: str, clips: list[ClipRecord]) -> None:
        self._config, self._prompts, self._folder = CandidatesConfig.model_validate(config), prompts, Path(folder)
        self._maker, self._clips = maker, clips
        self._shards: ShardMaker | None = None

    def ready(self) -> None:
        """Answers once the actor has a place."""

    def work(self, group: str) -> ShardReport | None:
        """Make one shard."""
        if self._shards is None:
            engine = self._config.engine
            device = "cuda" if engine.num_gpus else "cpu"
            maker = registry.resolve(self._maker).load(self._config, device, engine.num_cpus)
            self._shards = ShardMaker(self._config, self._prompts, self._folder, maker, self._clips)
        return self._shards.work(group)
