"""A barrier: rows that share a key meet in one place, whatever group they are in, and no process holds the dataset.

Three kinds of task, each a plain function over files in `exchange/STEP/`:

```
map     a batch of groups    rows by their keys -> keys/BATCH/PARTITION.tsv (a partition is a range of the hash of a key)
reduce  a partition          rows of one key after the other -> drops/BATCH/PARTITION.jsonl
apply   a batch of groups    the drops of its rows -> reports of the groups (see `reports.py`)
```

A stage that fits something first gets the rows of smallest hash of all groups: `sample` tasks and one `fit` task.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from data_pipelines import reports
from data_pipelines.metrics import StageMetrics, latency_bin
from data_pipelines.plan import build_stage
from data_pipelines.rows import BarrierStage, Loss, Row
from data_pipelines.spill import Spill, sorted_values
from videofm.config.curate import CurationStage
from videofm.run_dir import read_json, write_json

ROWS_A_PARTITION = 50_000
MAX_PARTITIONS = 4096
MAX_OPEN = 200
"""Files that a map task has open at once, at most; beyond, it writes in several passes."""


@dataclass(frozen=True)
class Barrier:
    """A barrier step for some groups: what its tasks need, as plain values. `batch` is a number; `inputs` are hashes."""

    folder: str
    step: int
    section: dict[str, Any]
    name: str
    config_hash: str
    num_partitions: int
    batch: int = 0
    groups: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    partition: int = 0

    @property
    def place(self) -> Path:
        """Where the tasks exchange rows."""
        return Path(self.folder) / "exchange" / str(self.step)

    def stage(self) -> BarrierStage:
        """The stage, built from its section."""
        stage: BarrierStage = build_stage(TypeAdapter[Any](CurationStage).validate_json(json.dumps(self.section)))
        return stage

    def rows(self) -> Iterator[tuple[str, list[Row]]]:
        """The rows of each group of this batch, as they enter the barrier."""
        for group in self.groups:
            yield group, reports.read_rows(Path(self.folder), self.step, group)


def num_partitions(num_rows: int) -> int:
    """How many partitions a barrier over that many rows has."""
    return min(MAX_PARTITIONS, max(1, -(-num_rows // ROWS_A_PARTITION)))


def sample(barrier: Barrier) -> None:
    """Write the rows of this batch with the smallest hashes, as many as the stage wants of the whole dataset."""
    wanted = barrier.stage().num_fit_rows
    pairs = ((_hash(row.key), row.to_json()) for _, rows in barrier.rows() for row in rows)
    smallest = heapq.nsmallest(wanted, pairs, key=lambda pair: pair[0])
    write_json(barrier.place / "samples" / f"{barrier.batch:06d}.json", smallest)


def fit(barrier: Barrier) -> None:
    """Merge the samples of all batches, let the stage fit, and write `state.json`."""
    stage = barrier.stage()
    chosen: list[Any] = []
    for path in sorted((barrier.place / "samples").iterdir()):
        chosen = heapq.nsmallest(stage.num_fit_rows, [*chosen, *read_json(path)], key=lambda pair: pair[0])
    state = stage.fit([Row.from_json(value) for _, value in chosen])
    write_json(barrier.place / "state.json", state)


def map_keys(barrier: Barrier) -> None:
    """Write the rows of this batch once for each of their keys, into the file of the key's partition."""
    stage = barrier.stage()
    state_path = barrier.place / "state.json"
    state = read_json(state_path) if state_path.exists() else None
    folder = barrier.place / "keys" / f"{barrier.batch:06d}"
    folder.mkdir(parents=True)
    for first in range(0, barrier.num_partitions, MAX_OPEN):
        files: dict[int, Any] = {}
        for _, rows in barrier.rows():
            for row in rows:
                for key in sorted(set(stage.keys(row, state))):
                    name = _hash(key)
                    partition = int(name[:8], 16) * barrier.num_partitions >> 32
                    if first <= partition < first + MAX_OPEN:
                        if partition not in files:
                            files[partition] = (folder / f"{partition:05d}.tsv").open("w", encoding="utf-8")
                        value = {"batch": barrier.batch, "key": key, "row": row.with_(path="").to_json()}
                        files[partition].write(f"{name}\t{json.dumps(value, sort_keys=True)}\n")
        for file in files.values():
            file.close()


def reduce_partition(barrier: Barrier) -> None:
    """Let the stage choose among the rows of each key of this partition, and write what it drops by batch."""
    stage = barrier.stage()
    name = f"{barrier.partition:05d}"
    with Spill(barrier.place / "sorting" / name) as spill:
        for path in sorted((barrier.place / "keys").glob(f"*/{name}.tsv")):
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    spill.add_line(line)
    drops: dict[int, list[str]] = defaultdict(list)
    for _, values in groupby((value for _, value in sorted_values(spill.folder)), key=lambda value: value["key"]):
        met = [(Row.from_json(value["row"]), value["batch"], value["key"]) for value in values]
        batches = {row.key: batch for row, batch, _ in met}
        for row, reason, detail in stage.choose(met[0][2], sorted((row for row, _, _ in met), key=_order)):
            drops[batches[row.key]].append(json.dumps([row.key, reason, detail]) + "\n")
    for batch, dropped in drops.items():
        path = barrier.place / "drops" / f"{batch:06d}" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(dropped), encoding="utf-8")


def apply_drops(barrier: Barrier) -> None:
    """Write the reports of the groups of this batch: the rows that no key dropped, and the others as losses."""
    dropped = _drops(barrier)
    for (group, rows), inputs in zip(barrier.rows(), barrier.inputs, strict=True):
        cpu, wall = time.process_time(), time.monotonic()
        metrics = StageMetrics(barrier.name, num_in=len(rows))
        losses, kept = [], []
        for row in rows:
            if row.key not in dropped:
                kept.append(row)
                continue
            reason, detail = dropped[row.key]
            start, stop = (None, None) if row.stop is None else (row.start, row.stop)
            loss = Loss("dropped", barrier.name, row.name, reason, detail, start, stop, scores=row.scores, span=row.span)
            metrics.lose(loss)
            losses.append(loss)
        metrics.num_out = metrics.num_made = len(kept)
        metrics.cpu_seconds, metrics.wall_seconds = time.process_time() - cpu, time.monotonic() - wall
        if rows:
            metrics.latency[latency_bin(metrics.wall_seconds / len(rows))] += len(rows)
        hashes = (barrier.config_hash, inputs)
        folder = Path(barrier.folder)
        reports.write_report(folder, barrier.step, group, hashes, {group: kept}, losses, [metrics.to_json()])


def inputs_hash(own: str, everything: str) -> str:
    """What the result of a group depends on: its own rows, and those of all groups."""
    return hashlib.sha256(f"{own} {everything}".encode()).hexdigest()


def _drops(barrier: Barrier) -> dict[str, tuple[str, str]]:
    """Key of a row of this batch -> why it is dropped; where several keys say so, the first in the alphabet."""
    found: dict[str, tuple[str, str]] = {}
    for path in _files(barrier.place / "drops" / f"{barrier.batch:06d}"):
        with path.open(encoding="utf-8") as lines:
            for key, reason, detail in map(json.loads, lines):
                found[key] = min(found.get(key, (reason, detail)), (reason, detail))
    return found


def _files(folder: Path) -> Iterable[Path]:
    return sorted(folder.iterdir()) if os.path.isdir(folder) else ()


def _order(row: Row) -> tuple[str, str, tuple[float, float], int]:
    return row.name, row.source_id, row.span or (0.0, 0.0), row.start


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
