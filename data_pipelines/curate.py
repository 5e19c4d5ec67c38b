"""Curation: a folder of raw videos -> shards. `run` is what `videofm curate` calls; the run directory is the dataset's folder.

Sources are sorted by id and cut into groups; a group is a Ray task and becomes a shard. The stages form *segments* between
barriers (`dedup` needs all sources at once): each source runs through a whole segment in one child process. What a group gave
is kept in `groups/`, so that a run that was stopped or killed goes on where it was, and a finished one has nothing left to do.

```
groups/SEGMENT-GROUP.json   report of a group: rows, metrics, losses
attempts_log/               what was begun and how it ended (see `attempts.py`)
funnel.json                 the funnel of all groups
quarantine.jsonl            broken files, with stage, reason and detail; dropped.jsonl: sound ones that were not wanted
shards/ index/ manifest/    the dataset (see `videofm/data/shards.py`)
```
"""

from __future__ import annotations

import hashlib
import json
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipelines import engine
from data_pipelines.groups import Job, read_report, split_position
from data_pipelines.metrics import Funnel, StageMetrics, render
from data_pipelines.rows import BarrierStage, Row
from videofm import registry
from videofm.config.curate import CurateConfig
from videofm.data import manifest
from videofm.errors import ConfigError, DataError, Interrupted
from videofm.progress import LOG, progress
from videofm.run_dir import RunDirectory, write_atomic, write_json

PIPELINE_VERSION = 1
"""Part of the config hash: raise it when a change of code changes what is written."""

VIDEO_SUFFIXES = frozenset(
    f".{ending}"
    for ending in (
        "mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "ts", "m2ts", "mts", "flv", "wmv", "asf", "ogv", "3gp", "ivf",
        "h264", "hevc", "m4a",
    )
)  # fmt: skip
SIDECAR_SUFFIXES = frozenset([".txt", ".json", ".jsonl"])


def run(config: CurateConfig, run: RunDirectory) -> dict[str, Any]:
    """Curate `config.source` into the dataset at `run.path`.

    Returns:
        `num_sources`, `num_clips` of each split, `manifest_hash`, `num_ignored_files` and the `funnel`, one entry a stage.

    Raises:
        ConfigError: the stages do not fit together, or the run directory lies in the source folder.
        DataError: the source folder is missing or empty, changed since a group was committed, or holds no usable clip.
        Interrupted: `control/stop` was touched; committed groups stay, and the next run goes on.
    """
    segments = plan_segments(config)
    rows, ignored = find_sources(Path(config.source), run.path)
    LOG.info("%d sources in %s (%d other files left alone)", len(rows), config.source, ignored)
    funnel = Funnel(section.kind for section in config.stages)
    groups = {row.source_id: f"{i // config.engine.group_size:05d}" for i, row in enumerate(rows)}
    session = _Session(config, run, funnel)
    try:
        for number, (sections, barrier) in enumerate(segments):
            rows = session.run_segment(number, sections, rows, groups, last=number == len(segments) - 1)
            if barrier is not None:
                rows = _run_barrier(barrier, rows, funnel)
    finally:
        session.close()
    funnel.check()
    num_clips = _ensure_splits(run.path, config.held_out)
    result = {
        "num_sources": len(groups), "num_clips": num_clips, "num_ignored_files": ignored, "funnel": funnel.to_json(),
        "manifest_hash": manifest.Manifest.load(run.path).hash if sum(num_clips.values()) else None,
    }  # fmt: skip
    _write_results(run, funnel, result)
    title = f"{len(groups)} sources -> {num_clips['train']} training clips, {num_clips['held_out']} held out"
    print(render(funnel, title, sys.stdout.isatty()), flush=True)
    if not sum(num_clips.values()):
        raise DataError(
            f"{config.source} holds no usable clip: of {len(groups)} sources none passed. Refused at {funnel.reasons()}. "
            f"See {run.path / 'quarantine.jsonl'} and {run.path / 'dropped.jsonl'}; give other sources or loosen the stages"
        )
    return result


def dry_run(config: CurateConfig) -> str:
    """Check that the stages fit together, and say what would run.

    Raises:
        ConfigError: see `plan_segments`.
    """
    plan_segments(config)
    return f"{' -> '.join(section.kind for section in config.stages)}, groups of {config.engine.group_size} sources"


def plan_segments(config: CurateConfig) -> list[tuple[list[dict[str, Any]], Any]]:
    """The stages between barriers: pairs of (sections as plain values, the barrier's section that follows or None).

    Raises:
        ConfigError: a stage is named twice, comes before one that it needs, or the last one is not `transcode`.
    """
    seen: list[str] = []
    segments: list[tuple[list[dict[str, Any]], Any]] = [([], None)]
    for section in config.stages:
        stage = registry.lookup(registry.CURATION_STAGES, section.kind, "curation stage")
        missing = [name for name in stage.requires if name not in seen]
        if missing:
            raise ConfigError(f"stages: {section.kind!r} needs {missing[0]!r} before it; the order is {_names(config)}")
        if section.kind in seen:
            raise ConfigError(f"stages: {section.kind!r} is named twice; the order is {_names(config)}")
        seen.append(section.kind)
        if stage.barrier:
            segments[-1] = (segments[-1][0], section)
            segments.append(([], None))
        else:
            segments[-1][0].append(section.model_dump(mode="json"))
    if seen[-1] != "transcode":
        raise ConfigError(f"stages: the last must be 'transcode', which makes what is packed; the order is {_names(config)}")
    return segments


def _names(config: CurateConfig) -> str:
    return ", ".join(section.kind for section in config.stages)


def find_sources(folder: Path, output: Path) -> tuple[list[Row], int]:
    """The video files below `folder`, sorted by source id, and the number of files that are neither video nor sidecar.

    Raises:
        DataError: the folder is missing or holds no video file.
        ConfigError: `output` lies in it, so that a second run would read what the first one wrote.
    """
    if not folder.is_dir():
        raise DataError(f"the source folder {folder} does not exist; set `source` to a folder of videos")
    if output.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"the run directory {output} lies in the source folder {folder}; choose another run directory")
    rows, ignored = [], 0
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        if path.suffix.lower() in VIDEO_SUFFIXES:
            name = path.relative_to(folder).as_posix()
            source_id = hashlib.sha256(unicodedata.normalize("NFC", name).encode()).hexdigest()[:24]
            rows.append(Row(source_id, name, str(path.resolve()), path.stat().st_size))
        else:
            ignored += path.suffix.lower() not in SIDECAR_SUFFIXES
    if not rows:
        endings = " ".join(sorted(VIDEO_SUFFIXES))
        raise DataError(f"{folder} holds no video file (looked for {endings}); {ignored} other files lie there")
    return sorted(rows, key=lambda row: row.source_id), ignored


def config_hash(config: CurateConfig) -> str:
    """SHA-256 of all that determines the content of a shard, given its sources."""
    value = {
        "version": PIPELINE_VERSION, "stages": [section.model_dump(mode="json") for section in config.stages],
        "held_out": config.held_out, "group_size": config.engine.group_size,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class _Session:
    """Runs segments; starts Ray when the first group needs it and not before."""

    def __init__(self, config: CurateConfig, run: RunDirectory, funnel: Funnel) -> None:
        self.config, self.run, self.funnel = config, run, funnel
        self.hash = config_hash(config)
        self.committed = {entry.group: entry for entry in manifest.read_entries(run.path)}
        self._ray = ExitStack()
        self._started = False

    def run_segment(
        self, number: int, sections: list[dict[str, Any]], rows: Sequence[Row], groups: dict[str, str], last: bool
    ) -> list[Row]:
        """The rows that come out of a segment; those of the last one lie in shards and are not returned."""
        jobs = [self._job(number, name, sections, members, last) for name, members in _by_group(rows, groups).items()]
        reports: dict[str, dict[str, Any]] = {}
        if last:
            self._check_nothing_else({job.group for job in jobs})
        for job in jobs:
            report = read_report(job)
            self._check_committed(job, report)
            if report is not None and (not last or job.group in self.committed):
                reports[job.group] = report
        label = "+".join(section["kind"] for section in sections) or "pack"
        todo = [job for job in jobs if job.group not in reports]
        with progress(f"{label}, sources", total=len(rows)) as bar:
            bar.start_at(sum(len(job.rows) for job in jobs if job.group in reports))
            for job, report in self._run(todo):
                if report is not None:
                    reports[job.group] = report
                    bar.advance(len(job.rows))
        if len(reports) < len(jobs):
            done = f"{len(reports)} of {len(jobs)} groups done"
            raise Interrupted(f"curation stopped with {done} ({label}); run it again to go on")
        for name in sorted(reports):
            self.funnel.add_group(reports[name]["metrics"], reports[name]["losses"])
        return [Row.from_json(row) for name in sorted(reports) for row in reports[name]["rows"]]

    def close(self) -> None:
        """Stop Ray, where it was started."""
        self._ray.close()

    def _run(self, jobs: list[Job]) -> Iterator[tuple[Job, dict[str, Any] | None]]:
        if not jobs or self.run.stop_requested:
            return
        if not self._started:
            self._ray.enter_context(engine.cluster(self.config.engine))
            self._started = True
        yield from engine.run_jobs(jobs, self.config.engine, lambda: self.run.stop_requested)

    def _job(self, number: int, group: str, sections: list[dict[str, Any]], rows: Sequence[Row], last: bool) -> Job:
        limits = self.config.engine
        return Job(
            str(self.run.path.resolve()), group, number, [row.to_json() for row in rows], sections, last, self.hash,
            self.config.held_out, limits.task_memory_mib, limits.task_timeout, limits.max_attempts,
        )  # fmt: skip

    def _check_committed(self, job: Job, report: dict[str, Any] | None) -> None:
        """A committed group must be the one that would be made now."""
        entry = self.committed.get(job.group)
        if entry is None:
            return
        if entry.config_hash != self.hash:
            raise DataError(
                f"{self.run.path} holds shards of another config (hash {entry.config_hash[:12]}, this one is "
                f"{self.hash[:12]}); choose another run directory"
            )
        if report is None:
            raise self._changed(job.group)

    def _check_nothing_else(self, groups: set[str]) -> None:
        """No group is committed that would not be made now."""
        for group in sorted(self.committed.keys() - groups):
            raise self._changed(group)

    def _changed(self, group: str) -> DataError:
        return DataError(
            f"group {group} of {self.run.path} was committed from other files than {self.config.source} holds now; "
            "choose another run directory, so that the dataset stays of one piece"
        )


def _by_group(rows: Sequence[Row], groups: dict[str, str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.source_id):
        found.setdefault(groups[row.source_id], []).append(row)
    return found


def _run_barrier(section: Any, rows: Sequence[Row], funnel: Funnel) -> list[Row]:
    stage: BarrierStage = registry.lookup(registry.CURATION_STAGES, section.kind, "curation stage")(section)
    kept, losses = stage.process_all(rows)
    metrics = StageMetrics(section.kind, num_in=len(rows), num_out=len(kept), num_made=len(kept))
    for loss in losses:
        metrics.lose(loss)
    funnel.add_group([metrics.to_json()], [asdict(loss) for loss in losses])
    return kept


def _ensure_splits(folder: Path, share: float) -> dict[str, int]:
    """See to it that with two sources or more neither split is empty; the number of clips of each split.

    A source's split is a function of its id alone, except here: of a few sources chance may put all on one side, and then the
    one whose number lies nearest to the other side moves.
    """
    entries = manifest.read_entries(folder)
    sources = {r.source_id: (entry, r.split) for entry in entries for r in manifest.read_index(folder, entry)}
    order = sorted(sources, key=split_position)
    if share > 0 and len(order) >= 2:
        splits = {split for _, split in sources.values()}
        if splits == {"train"}:
            manifest.assign_split(folder, sources[order[0]][0], order[0], "held_out")
        elif splits == {"held_out"}:
            manifest.assign_split(folder, sources[order[-1]][0], order[-1], "train")
    elif share > 0 and order:
        LOG.warning("only one source gave clips, so one of the splits is empty")
    counts = [entry.num_clips for entry in manifest.read_entries(folder)]
    return {split: sum(count[split] for count in counts) for split in manifest.SPLITS}


def _write_results(run: RunDirectory, funnel: Funnel, result: dict[str, Any]) -> None:
    write_json(run.path / "funnel.json", result)
    listed: dict[str, list[str]] = {"quarantine.jsonl": [], "dropped.jsonl": []}
    for loss in sorted(funnel.losses, key=lambda loss: (loss.source, loss.start or 0)):
        name = "dropped.jsonl" if loss.kind == "dropped" else "quarantine.jsonl"
        listed[name].append(json.dumps({name: value for name, value in asdict(loss).items() if value is not None}) + "\n")
    for name, lines in listed.items():
        write_atomic(run.path / name, "".join(lines))
