"""One group of sources through one segment of stages: what a Ray task does. The last segment ends with a committed shard."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipelines.attempts import AttemptsLog
from data_pipelines.isolate import COMMAND, Isolate, Result
from data_pipelines.metrics import StageMetrics
from data_pipelines.rows import Loss, Row
from data_pipelines.scratch import CLIPS, scratch_folder
from videofm.data.shards import ShardWriter
from videofm.run_dir import RunDirectory, read_json, write_json


@dataclass(frozen=True)
class Job:
    """What a task needs: the rows of a group and the stages (sections of the config, plain values) of one segment.

    `pack` says that this is the last segment, whose clips become a shard. Everything is plain JSON.
    """

    folder: str
    group: str
    segment: int
    rows: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    pack: bool
    config_hash: str
    held_out: float
    memory_mib: int
    timeout: float
    max_attempts: int

    @property
    def report_path(self) -> Path:
        """Where the result of this job is kept for a later run."""
        return Path(self.folder) / "groups" / f"{self.segment}-{self.group}.json"

    @property
    def inputs_hash(self) -> str:
        """SHA-256 of the rows, without the place where the sources lie here."""
        rows = [{name: value for name, value in row.items() if name != "path"} for row in self.rows]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def read_report(job: Job) -> dict[str, Any] | None:
    """The report of an earlier run of this very job, or None."""
    if not job.report_path.exists():
        return None
    report: dict[str, Any] = read_json(job.report_path)
    same = (report["config_hash"], report["inputs_hash"]) == (job.config_hash, job.inputs_hash)
    return report if same else None


def process_group(job: Job, command: Sequence[str] = COMMAND) -> dict[str, Any] | None:
    """Run a job: every source in a process of its own, with as many attempts as allowed.

    Returns:
        the report `{"config_hash", "inputs_hash", "rows", "metrics", "losses"}`, also written to `job.report_path`; None when
        a stop was asked for, in which case nothing was committed.
    """
    counts = _Counts([section["kind"] for section in job.stages])
    attempts = AttemptsLog(Path(job.folder) / "attempts_log" / f"{job.segment}-{job.group}.jsonl")
    run, kept = RunDirectory(job.folder), []
    with scratch_folder(CLIPS, Path(tempfile.gettempdir())) as scratch:
        with (
            Isolate(job.stages, scratch, job.memory_mib, job.timeout, command) as isolate,
            ShardWriter(Path(job.folder), job.group, job.config_hash) if job.pack else _Nothing() as writer,
        ):
            for row in sorted(map(Row.from_json, job.rows), key=lambda row: row.source_id):
                if run.stop_requested:
                    return None
                rows = _process_source(row, isolate, attempts, counts, job.max_attempts)
                if isinstance(writer, ShardWriter):
                    for clip in sorted(rows, key=lambda clip: clip.start):
                        _pack(writer, clip, job.held_out)
                else:
                    kept += rows
                for path in scratch.iterdir():
                    path.unlink()
            report = {
                "config_hash": job.config_hash, "inputs_hash": job.inputs_hash, "rows": [row.to_json() for row in kept],
                "metrics": [stage.to_json() for stage in counts.stages.values()], "losses": [asdict(x) for x in counts.losses],
            }  # fmt: skip
            # The report comes before the commit: a committed group always has one.
            write_json(job.report_path, report)
            if isinstance(writer, ShardWriter):
                writer.commit([row["source_id"] for row in job.rows])
            return report


class _Nothing:
    """Stands where a segment packs no shard."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class _Counts:
    """The metrics and losses of a group."""

    def __init__(self, stages: Sequence[str]) -> None:
        self.stages = {name: StageMetrics(name) for name in stages}
        self.losses: list[Loss] = []

    def take(self, result: Result) -> None:
        """Count what a child reports of the stages it finished."""
        for value in result.stages:
            stage = self.stages[value["stage"]]
            stage.num_in += value["in"]
            stage.num_out += value["out"]
            stage.num_made += value["made"]
            stage.cpu_seconds += value["cpu_seconds"]
            stage.notes.update({name: count for name, count in value["notes"].items() if count})
            for loss in value["losses"]:
                self.lose(Loss(**loss))

    def lose(self, loss: Loss) -> None:
        """Count a loss."""
        self.stages[loss.stage].lose(loss)
        self.losses.append(loss)


def _process_source(row: Row, isolate: Isolate, attempts: AttemptsLog, counts: _Counts, max_attempts: int) -> list[Row]:
    """The rows that a source becomes; none when it fails as often as allowed."""
    result: Result | None = None
    while attempts.failures(row.source_id) < max_attempts:
        attempts.start(row.source_id)
        result = isolate.run(row)
        attempts.end(row.source_id, "done" if result.failure is None else result.failure.kind)
        if result.failure is None:
            counts.take(result)
            return result.rows
    tries = attempts.failures(row.source_id)
    first = next(iter(counts.stages))
    stage, num_rows, reason, how = first, 1, "crash", "in an earlier run, without a trace of how"
    if result is not None and result.failure is not None:
        counts.take(result)
        failure = result.failure
        stage, num_rows, reason, how = failure.stage or first, failure.num_rows, failure.kind, failure.detail
    counts.stages[stage].num_in += num_rows
    counts.lose(Loss("quarantined", stage, row.name, reason, f"failed {tries} times; {how}", num_rows=num_rows))
    return []


def _pack(writer: ShardWriter, row: Row, held_out: float) -> None:
    """Append a finished clip to the shard."""
    assert row.clip is not None and row.stop is not None
    source = {"name": row.name, "start_frame": row.start, "end_frame": row.stop}
    info = row.info and {**asdict(row.info)}
    writer.add(
        f"{row.source_id}-{row.start:08d}",
        Path(row.clip.path).read_bytes(),
        num_frames=row.clip.num_frames,
        fps=row.clip.fps,
        height=row.clip.height,
        width=row.clip.width,
        caption=row.caption,
        source_id=row.source_id,
        split="held_out" if split_position(row.source_id) < held_out else "train",
        scores=row.scores,
        metadata={"source": {**source, **(info or {})}},
    )


def split_position(source_id: str) -> float:
    """A number in [0, 1) that is a function of the source alone; below the held-out share means held out.

    It is another hash than the one that sorts sources into groups, so that held-out clips spread over all shards.
    """
    return int.from_bytes(hashlib.sha256(f"split:{source_id}".encode()).digest()[:8], "big") / 2**64
