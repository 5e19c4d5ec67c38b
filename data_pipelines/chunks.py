"""Cutting long sources into spans, so that one of five hours is many tasks. A shot that crosses an edge is cut there.

The group `00003` stays the one of all sources that are short; the later spans of long ones become groups of their own, of the
second spans (`00003-0001`), the third (`00003-0002`) and so on, each with its own shard.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from data_pipelines import reports
from data_pipelines.metrics import StageMetrics
from data_pipelines.plan import CHUNK, spans
from data_pipelines.rows import Row


@dataclass(frozen=True)
class Chunking:
    """A chunk step for some groups, as plain values; `inputs` are hashes."""

    folder: str
    step: int
    config_hash: str
    chunk_seconds: float
    groups: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)


def cut(job: Chunking) -> None:
    """Write the reports of the groups: their sources, the long ones as spans."""
    for group, inputs in zip(job.groups, job.inputs, strict=True):
        started = time.monotonic()
        rows = reports.read_rows(Path(job.folder), job.step, group)
        parts: dict[str, list[Row]] = defaultdict(list)
        parts[group] = []
        for row in rows:
            assert row.info is not None, "probe comes before"
            for number, span in enumerate(spans(row.info.duration, job.chunk_seconds)):
                parts[f"{group}-{number:04d}" if number else group].append(row.with_(span=span))
        made = sum(map(len, parts.values()))
        metrics = StageMetrics(CHUNK, num_in=len(rows), num_out=len(rows), num_made=made)
        metrics.wall_seconds = time.monotonic() - started
        hashes = (job.config_hash, inputs)
        reports.write_report(Path(job.folder), job.step, group, hashes, parts, [], [metrics.to_json()])
