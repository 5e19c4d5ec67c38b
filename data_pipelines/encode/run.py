"""`videofm encode`: shards -> sidecar shards, by Ray actors that each take a shard at a time.

The run directory is the cache's folder (see `videofm/data/sidecar.py`). A committed sidecar is never made again, so a run that
was stopped or killed goes on where it was. The driver knows the names of shards and counts, nothing of clips.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipelines.encode.shard import ShardEncoder, ShardReport, data_config, read_entry
from data_pipelines.shard_actors import ShardActors
from videofm.config.encode import EncodeConfig
from videofm.config.reading import ReadingConfig
from videofm.data.manifest import Manifest
from videofm.data.reader import ReaderSettings
from videofm.data.sidecar import entry_path
from videofm.data.workers import WorkerPool
from videofm.errors import DataError, Interrupted
from videofm.progress import LOG, progress
from videofm.run_dir import RunDirectory, write_atomic

_OLD = 24 * 3600
"""Seconds after which a temporary file is not that of a writer at work."""


def run(config: EncodeConfig, run: RunDirectory) -> dict[str, Any]:
    """Encode every shard that has no sidecar yet.

    Returns:
        counts: shards, clips of each kind, clips that do not decode (listed in `failed.jsonl`).

    Raises:
        DataError: the dataset is missing or changed since a shard of it was encoded; or no clip fits the config.
        Interrupted: `control/stop` was touched; what is committed stays, and the next run goes on.
    """
    table = Manifest.load(config.manifest).table
    shards: dict[str, str] = dict(zip(table["group"].to_pylist(), table["sha256"].to_pylist(), strict=True))
    kinds = list(config.sections)
    done = [group for group in shards if all(entry_path(run.path, group, kind).exists() for kind in kinds)]
    for group in done:
        for kind in kinds:
            read_entry(run.path, group, kind, shards[group])
    _tidy(run.path)
    todo = sorted(shards.keys() - set(done))
    with progress("encode, shards", total=len(shards)) as bar:
        bar.start_at(len(done))
        if todo and not run.stop_requested:
            with _actors(config, run.path).cluster():
                for _ in encode_groups(config, run.path, todo, lambda: run.stop_requested):
                    bar.advance(1)
    counts, failed = _count(run.path, shards, kinds)
    if counts["shards"] < len(shards):
        raise Interrupted(f"encoding stopped with {counts['shards']} of {len(shards)} shards done; run it again to go on")
    write_atomic(run.path / "failed.jsonl", "".join(json.dumps(line, sort_keys=True) + "\n" for line in failed))
    if failed:
        LOG.warning("%d clips do not decode and are not in the cache; see failed.jsonl", len(failed))
    result = {"num_shards": len(shards), "num_failed": len(failed)} | {f"num_{kind}": counts[kind] for kind in kinds}
    if not any(counts[kind] for kind in kinds):
        raise DataError(
            f"no clip of split {config.split!r} of {config.manifest} is stored so that {config.num_frames} frames of "
            f"{config.height}x{config.width} can be cut from it; change num_frames, height, width, resize_short_side or crop"
        )
    return result


def dry_run(config: EncodeConfig) -> str:
    """Check that the sections fit together, and say what would run.

    Raises:
        ConfigError: sizes that a training could not ask for.
    """
    data = data_config(config)
    kinds = " and ".join(config.sections)
    return f"{kinds} of clips of {data.num_frames}x{data.height}x{data.width}, {config.engine.num_actors} actors"


def encode_groups(
    config: EncodeConfig, folder: Path, groups: Iterable[str], should_stop: Callable[[], bool]
) -> Iterator[ShardReport]:
    """Encode shards by a fixed number of actors, one at a time each; yields a report as each ends.

    An actor that dies is replaced, and its shard begun again.

    Raises:
        ConfigError: the cluster has not the CPUs and GPUs for the actors.
        DataError: a shard killed more actors than allowed, or cannot be read; or an actor does not start.
    """
    return _actors(config, folder).work(groups, should_stop)


def _actors(config: EncodeConfig, folder: Path) -> ShardActors:
    arguments = config.model_dump(mode="json"), str(folder.resolve())
    return ShardActors(EncodeActor, arguments, config.engine, name="encoder", made="a sidecar")


class EncodeActor:
    """A Ray actor. It loads the encoders with its first shard, so that what is wrong with them is told as an error."""

    def __init__(self, config: dict[str, Any], folder: str) -> None:
        self._config, self._folder = EncodeConfig.model_validate(config), Path(folder)
        self._encoder: ShardEncoder | None = None

    def ready(self) -> None:
        """Answers once the actor has a place."""

    def work(self, group: str) -> ShardReport | None:
        """Encode one shard."""
        device = "cuda" if self._config.engine.num_gpus else "cpu"
        self._encoder = self._encoder or ShardEncoder(self._config, self._folder, device, decoding(self._config))
        return self._encoder.encode(group)


def decoding(config: EncodeConfig) -> WorkerPool | None:
    """A process that decodes for an actor and can be killed, so that a clip that hangs or crashes costs itself alone; None
    where no clip is decoded."""
    if not config.reads_pixels:
        return None
    return WorkerPool(1, ReaderSettings(decoder=config.decoder), ReadingConfig(decode_timeout=config.engine.decode_timeout))


def _tidy(folder: Path) -> None:
    """Remove what writers that were killed left behind; what is young may be that of another run at work."""
    for name in ("sidecars", "index", "manifest"):
        for path in (folder / name).glob("*.tmp-*"):
            try:
                if time.time() - path.stat().st_mtime >= _OLD:
                    path.unlink()
            except FileNotFoundError:
                pass  # its writer finished


def _count(folder: Path, shards: dict[str, str], kinds: list[str]) -> tuple[Counter[str], list[dict[str, str]]]:
    """Committed shards and clips of each kind, and the clips that do not decode."""
    counts, failed = Counter[str](), []
    for group in sorted(shards):
        paths = {kind: entry_path(folder, group, kind) for kind in kinds}
        if not all(path.exists() for path in paths.values()):
            continue
        counts["shards"] += 1
        bad: dict[str, str] = {}
        for kind in kinds:
            entry = read_entry(folder, group, kind, shards[group])
            counts[kind] += entry.num_clips
            bad |= entry.failed
        failed += [{"shard": group, "key": key, "reason": why} for key, why in sorted(bad.items())]
    return counts, failed
