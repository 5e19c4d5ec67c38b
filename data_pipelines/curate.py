"""Curation: raw videos -> shards. `run` is what `videofm curate` calls; the run directory is the dataset's folder.

Sources fall into groups by the hash of their name; a group is a Ray task and becomes a shard. The stages form *steps*
(`plan.py`): stages that follow each other run on a source in one child process; a model, and a barrier that compares rows of
all groups, are steps of their own. What a step left of a group is kept in `groups/`, so that a run that was stopped or killed
goes on where it was, and a finished one has nothing left to do. Nothing here holds rows of the dataset, or grows with it but by
the number of groups.

```
sources/GROUP.jsonl         the sources of a group (see `sources.py`)
groups/STEP/                reports of groups: rows, metrics, losses (see `reports.py`)
attempts_log/               what was begun and how it ended (see `attempts.py`)
metrics.jsonl               counts of each stage, every ten seconds (see `live.py`)
funnel.json                 the funnel of all groups
scans/ exchange/            what steps leave for later ones, until the end
quarantine.jsonl            broken files, with stage, reason and detail; dropped.jsonl: sound ones that were not wanted
shards/ index/ manifest/    the dataset (see `videofm/data/shards.py`)
```
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipelines import reports, sink
from data_pipelines.groups import split_position
from data_pipelines.metrics import render
from data_pipelines.plan import Step, config_hash, plan_steps
from data_pipelines.reports import Input
from data_pipelines.session import Session
from data_pipelines.sources import Found, check_source, find_sources
from videofm.config.curate import CurateConfig
from videofm.data import manifest, storage
from videofm.errors import DataError
from videofm.progress import LOG
from videofm.run_dir import RunDirectory, read_json, write_json

SNAPSHOT = "snapshot.parquet"
"""Name, beside the entries, of the file that gathers them."""
_SHARDS_LOOKED_AT = 64
"""Shards in which a source is sought that can move to an empty split."""


def run(config: CurateConfig, run: RunDirectory) -> dict[str, Any]:
    """Curate `config.source` into the dataset at `run.path`.

    Returns:
        `num_sources`, `num_clips` of each split, `config_hash`, `manifest_hash`, `num_ignored_files` and the `funnel`, one
        entry a stage.

    Raises:
        ConfigError: the stages do not fit together, or the run directory lies in the source folder.
        DataError: the source is missing or empty, changed since a group was committed, or holds no usable clip; the disk is
            full; another process curates into the same run directory.
        TransientError: a store did not answer; run again.
        Interrupted: `control/stop` was touched; committed groups stay, and the next run goes on.
    """
    steps = plan_steps(config)
    own_hash = config_hash(config)
    try:
        with _only_driver(run.path):
            return _run(config, run, steps, own_hash)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOENT, errno.ENOTDIR):
            raise
        raise DataError(f"{run.path} could not be written: {error}. Free the disk, or choose another run directory") from None


def dry_run(config: CurateConfig, source_exists: bool = True) -> str:
    """Check that the stages fit together, that the weights of models are there, and the source; say what would run.

    Args:
        config: what would run.
        source_exists: false where an earlier stage makes the source, so that it is not looked for.

    Raises:
        ConfigError: see `plan_steps`; or the source is of a form that is not read.
        CheckpointError: weights are missing.
        DataError: a local source is missing.
    """
    if source_exists:
        check_source(config.source)
    steps, own_hash = plan_steps(config), config_hash(config)
    labels = " -> ".join(step.label for step in steps)
    return f"{labels}, groups of {config.engine.group_size} sources, config hash {own_hash[:12]}"


def _run(config: CurateConfig, run: RunDirectory, steps: Sequence[Step], own_hash: str) -> dict[str, Any]:
    session = Session(config, run, steps, own_hash)
    funnel = session.funnel
    try:
        found: Found = session.call(find_sources, config.source, run.path, config.engine.group_size)
        shown = storage.redacted(config.source)
        LOG.info("%d sources in %s (%d other files left alone)", found.num_sources, shown, found.num_ignored)
        inputs = [Input(group.name, group.num_sources, group.hash) for group in found.groups]
        for number, step in enumerate(steps):
            inputs = session.run_step(number, step, inputs)
        funnel.check()
        num_clips = _ensure_splits(run.path, config.held_out)
        total = sum(num_clips.values())
        result = {
            "num_sources": found.num_sources, "num_clips": num_clips, "num_ignored_files": found.num_ignored,
            "funnel": funnel.to_json(), "config_hash": own_hash, "manifest_hash": _finish(run.path) if total else None,
        }  # fmt: skip
        session.call(write_losses, run.path, session.groups)
        if config.output is not None and total:
            _upload(config.output, session, str(result["manifest_hash"]))
    finally:
        session.close()
    write_json(run.path / "funnel.json", result)
    title = f"{found.num_sources} sources -> {num_clips['train']} training clips, {num_clips['held_out']} held out"
    print(render(funnel, title, sys.stdout.isatty()), flush=True)
    if not total:
        raise DataError(
            f"{shown} holds no usable clip: of {found.num_sources} sources none passed. Refused at {funnel.reasons()}. "
            f"See {run.path / 'quarantine.jsonl'} and {run.path / 'dropped.jsonl'}; give other sources or loosen the stages"
        )
    return result


@contextmanager
def _only_driver(folder: Path) -> Iterator[None]:
    """Hold the run directory, so that two drivers do not work in it; a driver that dies lets go of it.

    Raises:
        DataError: another one holds it.
    """
    path = folder / "control" / "driver.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process curates into {folder}; wait for it, stop it, or choose another run directory"
            ) from None
        yield


def _finish(folder: Path) -> str:
    """Gather the entries in a snapshot, unless a newer one stands, and remove what only steps needed; the dataset's hash."""
    dataset, taken = manifest.Manifest.load(folder), folder / "manifest" / SNAPSHOT
    newest = max(path.stat().st_mtime_ns for path in (folder / "manifest").glob("shard-*.json"))
    if not taken.exists() or taken.stat().st_mtime_ns < newest:
        dataset.write_snapshot()
    for name in ("scans", "exchange"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return dataset.hash


def _ensure_splits(folder: Path, share: float) -> dict[str, int]:
    """See to it that with two sources or more neither split is empty; the number of clips of each split.

    A source's split is a function of its id alone, except here: of a few sources chance may put all on one side, and then the
    one whose number lies nearest to the other side moves. With many sources that does not happen, so few shards are looked at.
    """
    names = [path.stem.removeprefix("shard-") for path in sorted((folder / "manifest").glob("shard-*.json"))]
    counts = _count(folder, names)
    if share == 0 or min(counts.values()) > 0 or not sum(counts.values()):
        return counts
    homes: dict[str, list[str]] = {}
    for name in names[:_SHARDS_LOOKED_AT]:
        for record in manifest.read_index(folder, manifest.read_entry(folder, name)):
            if name not in homes.setdefault(record.source_id, []):
                homes[record.source_id].append(name)
    order = sorted(homes, key=split_position)
    if len(order) < 2:
        LOG.warning("only one source gave clips, so one of the splits is empty")
        return counts
    source, split = (order[0], "held_out") if not counts["held_out"] else (order[-1], "train")
    for name in homes[source]:
        manifest.assign_split(folder, manifest.read_entry(folder, name), source, split)
    return _count(folder, names)


def _count(folder: Path, groups: Sequence[str]) -> dict[str, int]:
    counts = dict.fromkeys(manifest.SPLITS, 0)
    for group in groups:
        for split, count in manifest.read_entry(folder, group).num_clips.items():
            counts[split] += count
    return counts


def write_losses(folder: Path, steps: Sequence[Sequence[str]]) -> None:
    """Gather the losses of all groups (`steps`: the groups of each step) in quarantine.jsonl and dropped.jsonl, by group."""
    at: dict[str, list[int]] = {}
    for number, groups in enumerate(steps):
        for group in groups:
            at.setdefault(group, []).append(number)
    temporary = {name: folder / f".{name}.jsonl.tmp-{os.getpid()}" for name in ("quarantine", "dropped")}
    with (
        temporary["quarantine"].open("w", encoding="utf-8") as quarantine,
        temporary["dropped"].open("w", encoding="utf-8") as dropped,
    ):
        for group in sorted(at):
            for number in at[group]:
                for loss in reports.read_losses(folder, number, group):
                    file = dropped if loss["kind"] == "dropped" else quarantine
                    file.write(json.dumps(loss, ensure_ascii=False) + "\n")
    for name, path in temporary.items():
        os.replace(path, folder / f"{name}.jsonl")


def _upload(output: str, session: Session, manifest_hash: str) -> None:
    """Copy the dataset to `output`, unless that was done."""
    done = session.folder / "uploaded.json"
    wanted = {"output": storage.redacted(output), "manifest_hash": manifest_hash}
    if done.exists() and read_json(done) == wanted:
        return
    sink.claim(output, manifest_hash)
    session.upload(output, session.groups[-1])
    storage.put_file(session.folder / "manifest" / SNAPSHOT, storage.join(output, f"manifest/{SNAPSHOT}"))
    write_json(done, wanted)
