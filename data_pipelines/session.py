"""Running steps over groups: which groups are done, what is left, and the cluster that does it.

The driver holds names, hashes and counters of groups; rows are on disk and in the tasks.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data_pipelines import chunks, engine, exchange, reports, sink
from data_pipelines.actors import Client, Pool
from data_pipelines.groups import Job, Limits, process_group
from data_pipelines.live import LiveMetrics
from data_pipelines.metrics import Funnel
from data_pipelines.plan import Step, build_stage, stage_name
from data_pipelines.reports import Input, Summary
from data_pipelines.rows import BarrierStage, ModelStage
from videofm.config.curate import CurateConfig
from videofm.data import manifest, storage
from videofm.errors import DataError, Interrupted
from videofm.progress import LOG, progress
from videofm.run_dir import RunDirectory

GROUPS_A_BATCH = 256
"""Groups that a task of a barrier handles at most."""
_ROWS_A_BATCH = 50_000


class Session:
    """Runs steps; starts Ray when the first group needs it and not before."""

    def __init__(self, config: CurateConfig, run: RunDirectory, steps: Sequence[Step], config_hash: str) -> None:
        self.config, self.run, self.hash = config, run, config_hash
        self.funnel = Funnel(name for step in steps for name in step.names)
        self.keep_scans = sum(step.kind in ("child", "model") for step in steps) > 1
        """Whether a step may find what an earlier one measured of a source."""
        self.folder = run.path.resolve()
        self.committed = {entry.group: entry.config_hash for entry in _entries(run.path)}
        for other in sorted({found for found in self.committed.values() if found != config_hash}):
            raise DataError(
                f"{run.path} holds shards of another config (hash {other[:12]}, this one is {config_hash[:12]}); "
                "choose another run directory"
            )
        self.live = LiveMetrics(run.metrics_path, list(self.funnel.stages))
        self.groups: list[list[str]] = []
        """The groups of each step so far."""
        self._ray = ExitStack()
        self._started = False

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """A call that goes through the whole dataset in constant memory: on a cluster in a worker, else here."""
        if self.config.engine.address is None:
            return function(*arguments)
        self._start()
        return engine.call(function, self.config.engine, *arguments)

    def run_step(self, number: int, step: Step, inputs: Sequence[Input]) -> list[Input]:
        """What the groups `inputs` became.

        Raises:
            Interrupted: a stop was asked for; what is done stays.
            DataError: a committed group would be another one now, or see `engine.run_tasks`.
        """
        inputs = [self._input(step, one, everything) for everything in [_hash_of(inputs)] for one in inputs if one.num_rows]
        done = {one.group for one in inputs if self._is_done(number, step, one)}
        self._check_committed(number, step, inputs, done)
        self.groups.append([one.group for one in inputs])
        if len(done) < len(inputs):
            with progress(f"{step.label}, rows", total=sum(one.num_rows for one in inputs)) as bar:
                bar.start_at(sum(one.num_rows for one in inputs if one.group in done))
                sizes = {one.group: one.num_rows for one in inputs}
                todo = [one for one in inputs if one.group not in done]
                self.live.begin(step.label, len(done), len(inputs))
                for group in self._run(number, step, inputs, todo):
                    done.add(group)
                    bar.advance(sizes[group])
                    self.live.group_done(self._summary(number, group).metrics)
                self.live.tell(0, force=True)
        if len(done) < len(inputs):
            raise Interrupted(
                f"curation stopped with {len(done)} of {len(inputs)} groups done ({step.label}); run it again to go on"
            )
        made: list[Input] = []
        for one in inputs:
            summary = self._summary(number, one.group)
            self.funnel.add_group(summary.metrics)
            made += summary.parts
        return sorted(made, key=lambda one: one.group)

    def upload(self, output: str, groups: Sequence[str]) -> None:
        """Copy committed shards to `output`.

        Raises:
            Interrupted: a stop was asked for.
        """
        parts = [list(groups[i : i + GROUPS_A_BATCH]) for i in range(0, len(groups), GROUPS_A_BATCH)]
        if len(list(self._map(sink.upload, ((f"of {part[0]}", (str(self.folder), output, part)) for part in parts)))) < len(
            parts
        ):
            raise Interrupted("the copy to `output` stopped; run it again to go on")

    def close(self) -> None:
        """Stop Ray, where it was started."""
        self._ray.close()

    def _run(self, number: int, step: Step, inputs: Sequence[Input], todo: Sequence[Input]) -> Iterator[str]:
        """Do the groups `todo`; yields each as it ends."""
        if self._stopped():
            return
        self._start()
        if step.kind == "barrier":
            yield from self._run_barrier(number, step, inputs)
        elif step.kind == "chunk":
            assert self.config.engine.chunk_seconds is not None
            job = chunks.Chunking(str(self.folder), number, self.hash, self.config.engine.chunk_seconds)
            batches = _batches(todo)
            tasks = ((batch, (replace(job, groups=_names(batch), inputs=[one.hash for one in batch]),)) for batch in batches)
            for batch, _ in self._map(chunks.cut, tasks):
                yield from _names(batch)
        else:
            yield from self._run_groups(number, step, todo)

    def _run_groups(self, number: int, step: Step, todo: Sequence[Input]) -> Iterator[str]:
        settings = self.config.engine
        todo = sorted(todo, key=lambda one: -one.num_rows)  # the largest first, so that workers end together
        limits = asdict(Limits(**{name: getattr(settings, name) for name in Limits.__dataclass_fields__}))
        job = Job(
            str(self.folder), "", number, list(step.sections), list(step.names), self.hash, "", self.config.held_out, step.pack,
            scans=self.keep_scans, limits=limits, source=storage.redacted(self.config.source),
            max_bytes=next((section.max_bytes for section in self.config.stages if section.kind == "probe"), None),
        )  # fmt: skip
        if step.kind == "child":
            tasks: Iterable[Any] = ((one.group, (replace(job, group=one.group, inputs_hash=one.hash),)) for one in todo)
            for group, finished in self._map(process_group, tasks):
                if finished:
                    yield group
            return
        stage: ModelStage = build_stage(self._section(step))
        job = replace(job, frames=asdict(stage.frames))
        pool = Pool(step.sections[0], step.names[0])
        try:
            tasks = (
                (one.group, (replace(job, group=one.group, inputs_hash=one.hash), pool.handles, turn))
                for turn, one in enumerate(todo)
            )
            # These tasks hold no CPUs, so that they cannot keep a dead actor from coming back; their number is bounded.
            for group, finished in self._map(process_with_model, tasks, num_cpus=0.0, reserved_cpus=pool.num_cpus):
                if finished:
                    yield group
        finally:
            pool.close()

    def _run_barrier(self, number: int, step: Step, inputs: Sequence[Input]) -> Iterator[str]:
        """All groups, also those with a report: a barrier compares them all. Yields them when all is done."""
        stage: BarrierStage = build_stage(self._section(step))
        count = exchange.num_partitions(sum(one.num_rows for one in inputs))
        barrier = exchange.Barrier(str(self.folder), number, step.sections[0], step.names[0], self.hash, count)
        shutil.rmtree(barrier.place, ignore_errors=True)
        batches = [
            replace(barrier, batch=index, groups=_names(batch), inputs=[one.hash for one in batch])
            for index, batch in enumerate(_batches(inputs))
        ]
        partitions = [replace(barrier, partition=index) for index in range(count)]
        phases: list[tuple[Callable[..., None], list[exchange.Barrier]]] = [
            (exchange.map_keys, batches), (exchange.reduce_partition, partitions), (exchange.apply_drops, batches),
        ]  # fmt: skip
        if stage.num_fit_rows:
            phases = [(exchange.sample, batches), (exchange.fit, [barrier]), *phases]
        for function, jobs in phases:
            tasks = ((f"{step.label} {function.__name__}", (job,)) for job in jobs)
            if len(list(self._map(function, tasks))) < len(jobs):
                return
        shutil.rmtree(barrier.place)
        yield from _names(inputs)

    def _map(self, function: Callable[..., Any], tasks: Iterable[Any], **options: float) -> Iterator[tuple[Any, Any]]:
        self._start()
        return engine.run_tasks(
            function, tasks, self.config.engine, self._stopped, tick=self.live.tell, failed=self._end_early, **options
        )

    def _end_early(self) -> None:
        """A task failed: those that run end at their next source. The next attempt takes the request away."""
        LOG.warning("the run fails; waiting for the groups that are worked on, so that no source of theirs takes the blame")
        with suppress(OSError):  # a full disk may be the very failure; they end by themselves, too
            self.run.request_stop()

    def _start(self) -> None:
        if not self._started:
            self._ray.enter_context(engine.cluster(self.config.engine))
            self._started = True

    def _stopped(self) -> bool:
        return self.run.stop_requested

    def _section(self, step: Step) -> Any:
        """The section of a step of one stage."""
        return next(section for section in self.config.stages if stage_name(section) == step.names[0])

    def _input(self, step: Step, one: Input, everything: str) -> Input:
        return replace(one, hash=exchange.inputs_hash(one.hash, everything)) if step.kind == "barrier" else one

    def _summary(self, number: int, group: str) -> Summary:
        summary = Summary.load(self.folder, number, group)
        assert summary is not None, f"step {number} of group {group} ended without a report"
        return summary

    def _is_done(self, number: int, step: Step, one: Input) -> bool:
        """Whether a report of this very work stands, and in the last step a shard."""
        summary = Summary.load(self.folder, number, one.group)
        same = summary is not None and (summary.config_hash, summary.inputs_hash) == (self.hash, one.hash)
        return same and (not step.pack or one.group in self.committed)

    def _check_committed(self, number: int, step: Step, inputs: Sequence[Input], done: set[str]) -> None:
        """A committed group must be the one that would be made now, and none may be there that would not be made."""
        names = {reports.base_group(group) for group in self.committed} if number == 0 else set(self.committed)
        there = {one.group for one in inputs}
        wrong = names & there - done
        if number == 0 or step.pack:
            wrong |= names - there
        for group in sorted(wrong):
            raise DataError(
                f"group {group} of {self.run.path} was committed from other files than {storage.redacted(self.config.source)} "
                "holds now; choose another run directory, so that the dataset stays of one piece"
            )


def process_with_model(job: Job, handles: Sequence[Any], turn: int) -> bool:
    """`process_group` for a step with a model, in a task."""
    return process_group(job, Client(handles, turn))


def _entries(folder: Path) -> Iterator[manifest.Entry]:
    """The committed entries, one by one: together they name every source."""
    for path in sorted((folder / "manifest").glob("shard-*.json")):
        yield manifest.read_entry(folder, path.stem.removeprefix("shard-"))


def _hash_of(inputs: Sequence[Input]) -> str:
    found = hashlib.sha256()
    for one in inputs:
        found.update(f"{one.group} {one.hash}\n".encode())
    return found.hexdigest()


def _names(inputs: Sequence[Input]) -> list[str]:
    return [one.group for one in inputs]


def _batches(inputs: Sequence[Input]) -> list[list[Input]]:
    """Groups, in order, in lists of bounded numbers of groups and rows."""
    batches: list[list[Input]] = []
    rows = 0
    for one in inputs:
        if not batches or len(batches[-1]) >= GROUPS_A_BATCH or rows + one.num_rows > _ROWS_A_BATCH:
            batches.append([])
            rows = 0
        batches[-1].append(one)
        rows += one.num_rows
    return batches
