"""One group of rows through one step: what a Ray task does. The last step ends with a committed shard."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines import reports
from data_pipelines.attempts import AttemptsLog
from data_pipelines.batches import Ask, Batches
from data_pipelines.fetching import CopyLimits, check_reachable, fetched, wait_for_space
from data_pipelines.isolate import COMMAND, Isolate, Result
from data_pipelines.metrics import StageMetrics
from data_pipelines.rows import FrameRequest, Loss, Row, Unusable
from data_pipelines.scratch import CLIPS, scratch_folder
from videofm.data.shards import ShardWriter
from videofm.errors import DataError, TransientError
from videofm.run_dir import RunDirectory

_UNREACHABLE_RUNS = 3
"""In so many runs a store that does not answer keeps the group from being committed; then its source is given up."""


@dataclass(frozen=True)
class Limits:
    """What work on a group may take; see `EngineConfig`, where the fields have the same names."""

    task_memory_mib: int = 1024
    task_timeout: float = 120.0
    max_attempts: int = 2
    batch_mib: int = 16
    scratch: str | None = None
    scratch_free_mib: int = 0
    scratch_wait: float = 600.0
    fetch_timeout: float = 3600.0


@dataclass(frozen=True)
class Job:
    """What a task needs: a group and a step. Everything is plain JSON; the rows lie on disk (see `reports.py`).

    Args:
        folder: the run directory.
        group: name of the group.
        step: number of the step.
        stages: sections of the config, as plain values; `names` are those in the funnel.
        frames: what the model of the step wants to see, as plain values of a `FrameRequest`; None without a model.
        pack: this is the last step, whose clips become a shard.
        scans: keep the scans of sources for later steps; the last one removes them.
        max_bytes: the most bytes of a source that are copied from a store; None: any number.
        source: the folder or list that names the sources, without its secrets (see `CopyLimits`).
    """

    folder: str
    group: str
    step: int
    stages: list[dict[str, Any]]
    names: list[str]
    config_hash: str
    inputs_hash: str
    held_out: float = 0.0
    pack: bool = False
    scans: bool = False
    frames: dict[str, int] | None = None
    max_bytes: int | None = None
    source: str = ""
    limits: dict[str, Any] = field(default_factory=dict)


def process_group(job: Job, ask: Ask | None = None, command: Sequence[str] = COMMAND) -> bool:
    """Run a job: every source in a process of its own, with as many attempts as allowed.

    Args:
        job: what to do; a report is written (see `reports.py`), and in the last step a shard.
        ask: sends clips to the model of the step; None where it has none.
        command: how to start the decoding process.

    Returns:
        whether it was done; False when a stop was asked for, in which case nothing was committed.

    Raises:
        TransientError: the store of a source could not be reached; the group can be tried again, a few times.
        DataError: the scratch disk is full, or a stage says that the request cannot be met.
    """
    return _Work(job, ask, command).run()


class _Work:
    """The state of a job while it runs."""

    def __init__(self, job: Job, ask: Ask | None, command: Sequence[str]) -> None:
        self.job, self.command, self.limits = job, command, Limits(**job.limits)
        self.copying = CopyLimits(job.max_bytes, self.limits.fetch_timeout, job.source)
        self.folder = Path(job.folder)
        self.scans = self.folder / "scans" / job.group
        self.directory = RunDirectory(job.folder)
        self.metrics = {name: StageMetrics(name) for name in job.names}
        self.losses: list[Loss] = []
        self.attempts = AttemptsLog(self.folder / "attempts_log" / f"{job.step}-{job.group}.jsonl")
        self.unreachable: TransientError | None = None
        self.request = FrameRequest(**job.frames) if job.frames else None
        self.batches: Batches | None = None
        if self.request is not None:
            assert ask is not None, "a step with a model needs somebody to ask"
            path = self.folder / "attempts_log" / f"{job.step}-{job.group}-model.jsonl"
            self.batches = Batches(
                ask, self.request, path, self.limits.max_attempts, self.limits.batch_mib, self.metrics[job.names[0]]
            )

    def run(self) -> bool:
        """See `process_group`."""
        job, kept, limits = self.job, list[Row](), self.limits
        rows = reports.read_rows(self.folder, job.step, job.group)
        with ExitStack() as stack:
            parent = Path(limits.scratch or tempfile.gettempdir())
            self.scratch = stack.enter_context(scratch_folder(CLIPS, parent))
            if job.scans and not job.pack:
                self.scans.mkdir(parents=True, exist_ok=True)
            isolate = Isolate(
                job.stages, self.scratch, limits.task_memory_mib, limits.task_timeout, self.command, self.request,
                self.scans if job.scans else None, not job.pack,
            )  # fmt: skip
            self.isolate = stack.enter_context(isolate)
            writer = stack.enter_context(ShardWriter(self.folder, job.group, job.config_hash)) if job.pack else None
            for members in by_unit(rows):
                wait_for_space(
                    self.scratch, limits.scratch_free_mib, limits.scratch_wait, lambda: self.directory.stop_requested
                )
                if self.directory.stop_requested:
                    return False
                made = self._unit(members)
                if writer is None:
                    kept += made
                else:
                    for clip in sorted(made, key=lambda clip: clip.key):
                        pack(writer, clip, job.held_out)
                for path in self.scratch.iterdir():
                    path.unlink()
            if self.unreachable is not None:
                raise self.unreachable
            if self.batches is not None:
                kept += self.batches.flush()
                self.losses += self.batches.losses
            # The report comes before the commit: a committed group always has one.
            metrics = [stage.to_json() for stage in self.metrics.values()]
            hashes = (job.config_hash, job.inputs_hash)
            kept.sort(key=lambda row: row.key)
            reports.write_report(self.folder, job.step, job.group, hashes, {job.group: kept}, self.losses, metrics)
            if writer is not None:
                writer.commit(sorted({row.source_id for row in rows}))
                shutil.rmtree(self.scans, ignore_errors=True)
        return True

    def _unit(self, rows: list[Row]) -> list[Row]:
        """What the rows of a source become."""
        first = next(iter(self.metrics.values()))
        try:
            with ExitStack() as stack:
                try:
                    if self.unreachable is not None:
                        check_reachable(rows[0], self.copying)
                        return []  # the group will not be committed now: only see which others do not answer
                    notes = self.metrics["caption"].notes if "caption" in self.metrics else None
                    path = stack.enter_context(fetched(rows[0], self.scratch, notes is not None, notes, self.copying))
                except TransientError as error:
                    return self._not_reached(rows, error)
                first.bytes_in += path.stat().st_size
                here = [row.with_(path=str(path), num_bytes=path.stat().st_size) for row in rows]
                made = self._tried(here)
                if self.batches is not None:
                    return self.batches.add(made, self.scratch)
                return made
        except Unusable as refusal:
            first.num_in += len(rows)
            self._lose(Loss("quarantined", first.stage, rows[0].name, refusal.reason, refusal.detail, num_rows=len(rows)))
            return []

    def _not_reached(self, rows: list[Row], error: TransientError) -> list[Row]:
        """Count it. A store that never answers must not keep the group back for ever: in the end its source is lost."""
        attempt = f"fetch:{rows[0].unit}"
        self.attempts.start(attempt)
        if self.attempts.failures(attempt) <= _UNREACHABLE_RUNS:
            self.unreachable = self.unreachable or error
            return []
        detail = f"in {self.attempts.failures(attempt)} runs; {error}"
        raise Unusable("unreachable", detail) from None

    def _tried(self, rows: list[Row]) -> list[Row]:
        """The rows that come out of the child; none when it fails as often as allowed."""
        result: Result | None = None
        unit, first = rows[0].unit, self.job.names[0]
        while self.attempts.failures(unit) < self.limits.max_attempts:
            if result is not None and result.failure is not None:
                self.metrics[self._name(result.failure.stage)].retries += 1
            self.attempts.start(unit)
            result = self.isolate.run(*rows)
            self.attempts.end(unit, _outcome(result))
            if result.failure is not None and result.failure.kind == "fatal":
                raise DataError(f"curation of {rows[0].name} cannot go on: {result.failure.detail}")
            if result.failure is None:
                self._take(result)
                return result.rows
        tries = self.attempts.failures(unit)
        stage, num_rows, reason, how = first, len(rows), "crash", "in an earlier run, without a trace of how"
        if result is not None and result.failure is not None:
            self._take(result)
            failure = result.failure
            stage, num_rows, reason, how = self._name(failure.stage), failure.num_rows, failure.kind, failure.detail
            if failure.kind == "timeout":
                how += "; for long sources set engine.chunk_seconds or raise engine.task_timeout"
        self.metrics[stage].num_in += num_rows
        detail = f"failed {tries} times; {how}"
        self._lose(Loss("quarantined", stage, rows[0].name, reason, detail, num_rows=num_rows, span=rows[0].span))
        return []

    def _name(self, stage: str | None) -> str:
        """The name in the funnel of a stage that a child names: its frames are those of the step's model."""
        return stage if stage in self.metrics else self.job.names[0]

    def _take(self, result: Result) -> None:
        """Count what a child reports of the stages it finished."""
        for event in result.stages:
            stage = self.metrics[self._name(event["stage"])]
            if self.batches is None:
                stage.take(event)
            else:  # the rows count as out when the model has answered
                stage.take({**event, "out": 0, "made": 0, "seconds": []})
                stage.wall_seconds += sum(event["seconds"])
            for loss in event["losses"]:
                self._lose(Loss(**{**loss, "stage": stage.stage, "span": loss["span"] and tuple(loss["span"])}))

    def _lose(self, loss: Loss) -> None:
        self.metrics[loss.stage].lose(loss)
        self.losses.append(loss)


def _outcome(result: Result) -> str:
    """How an attempt ended, for the attempts log."""
    if result.failure is None:
        return "done"
    return "stopped" if result.failure.kind == "fatal" else result.failure.kind


def by_unit(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The rows of each source, or span of one, in the order of their keys."""
    for _, members in itertools.groupby(sorted(rows, key=lambda row: row.key), key=lambda row: row.unit):
        yield list(members)


def pack(writer: ShardWriter, row: Row, held_out: float) -> None:
    """Append a finished clip to the shard."""
    assert row.clip is not None and row.stop is not None
    source = {"name": row.name, "start_frame": row.start, "end_frame": row.stop, **(asdict(row.info) if row.info else {})}
    if row.span is not None:
        source["span_seconds"] = row.span
    if row.border is not None:
        source["border"] = row.border
    made_by = {name: value for name, value in (("scored_by", row.scored_by), ("captions", row.captions)) if value}
    writer.add(
        row.key,
        Path(row.clip.path).read_bytes(),
        num_frames=row.clip.num_frames,
        fps=row.clip.fps,
        height=row.clip.height,
        width=row.clip.width,
        caption=row.caption,
        source_id=row.source_id,
        split="held_out" if split_position(row.source_id) < held_out else "train",
        scores=row.scores,
        metadata={"source": source, **made_by},
    )


def split_position(source_id: str) -> float:
    """A number in [0, 1) that is a function of the source alone; below the held-out share means held out.

    It is another hash than the one that sorts sources into groups, so that held-out clips spread over all shards.
    """
    return int.from_bytes(hashlib.sha256(f"split:{source_id}".encode()).digest()[:8], "big") / 2**64
