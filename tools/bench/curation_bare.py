"""The stages of a config run bare: one plain process a core, no Ray, no isolation, no rows on disk, no shards.

Every source passes through all stages of one source in one go, with one `Workspace`: the least that the stages cost. Barriers
then compare the rows, in memory. Sources must be such that barriers drop none: nothing that the pipeline skips is done here.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.child import build_stages, run_stages
from data_pipelines.plan import build_stage, plan_steps
from data_pipelines.rows import Row
from data_pipelines.sources import source_id_of
from data_pipelines.workspace import Workspace
from videofm.config.curate import CurateConfig


@dataclass
class Cost:
    """What a run took: seconds of wall time, CPU seconds of all processes, those of each stage, and clips that came out."""

    wall: float = 0.0
    cpu: float = 0.0
    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    num_clips: int = 0


def run_bare(config: CurateConfig, num_processes: int) -> Cost:
    """Run the stages on the local folder `config.source`; time counts from when all processes have loaded what they need."""
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    paths = sorted(Path(config.source).glob("*.mp4"))
    sections = [section for step in plan_steps(config) if step.kind == "child" for section in step.sections]
    context = multiprocessing.get_context("spawn")
    taken, ready, results = context.Value("i", 0), context.Barrier(num_processes + 1), context.Queue()
    with tempfile.TemporaryDirectory(prefix="videofm-bench-") as scratch:
        arguments = (sections, paths, scratch, taken, ready, results)
        processes = [context.Process(target=_work, args=arguments) for _ in range(num_processes)]
        for process in processes:
            process.start()
        ready.wait()
        started, cost, rows = time.perf_counter(), Cost(), list[Row]()
        for _ in processes:
            stages, made, cpu = results.get()
            for name, seconds in stages.items():
                cost.stages[name] += seconds
            cost.cpu += cpu
            rows += map(Row.from_json, made)
        cpu = time.process_time()
        for section in config.stages:
            if getattr(stage := build_stage(section), "placement", "child") == "barrier":
                begun = time.process_time()
                _meet(stage, rows)
                cost.stages[section.kind] += time.process_time() - begun
        cost.cpu += time.process_time() - cpu
        cost.wall, cost.num_clips = time.perf_counter() - started, len(rows)
        for process in processes:
            process.join()
    return cost


def _work(sections: list[dict[str, Any]], paths: list[Path], scratch: str, taken: Any, ready: Any, results: Any) -> None:
    """A process: takes one source after the other until none is left."""
    stages, costs, made = build_stages(sections), defaultdict[str, float](float), list[dict[str, Any]]()
    ready.wait()
    started = time.process_time()
    while True:
        with taken.get_lock():
            index, taken.value = taken.value, taken.value + 1
        if index >= len(paths):
            break
        path = paths[index]
        row = Row(source_id_of(path.name), path.name, str(path), path.stat().st_size)
        for event in run_stages(stages, [row], Workspace(path, Path(scratch))):
            assert "fatal" not in event, event
            if "stage" in event:
                costs[event["stage"]] += event["cpu_seconds"]
            made += event.get("rows", [])
        for clip in Path(scratch).glob(f"{row.source_id}*"):
            clip.unlink()
    results.put((dict(costs), made, time.process_time() - started))


def _meet(stage: Any, rows: list[Row]) -> None:
    """A barrier in memory."""
    assert not stage.num_fit_rows, "this benchmark has no barrier that fits"
    met: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for key in stage.keys(row, None):
            met[key].append(row)
    for key, members in met.items():
        dropped = list(stage.choose(key, sorted(members, key=lambda row: (row.name, row.start))))
        assert not dropped, f"{stage.name} drops a source of the benchmark: {dropped[0]}"
