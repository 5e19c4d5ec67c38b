"""Curation against the cost of its own stages; its memory as files grow; its time as workers grow.

python -m tools.bench.curation --throughput [--files 48] [--repeats 3] [--workers 2]
python -m tools.bench.curation --memory [--counts 100 1000 5000]
python -m tools.bench.curation --scaling [--files 48] [--repeats 3]

`--throughput`: the stages of configs/data/local.yaml on files of 6 to 10 s, 640x360, 25 frames a second, in shots. *Bare* are
the same stages in one plain process a core, without Ray, isolation, rows on disk or shards (see curation_bare.py). The start of
Ray is told apart; that of workers and of decoding processes counts as the pipeline's. CPU seconds are those of all processes,
Ray's own among them; they depend less than seconds on what else runs.

`--memory`: files of 12 frames of 64x64 through probe, dedup and transcode. Memory is proportional (pages that processes share
count once), sampled four times a second; the driver's is also its exact peak of resident memory.

`--scaling`: the files of `--throughput` on 1 and on 2 workers; beside it the bare stages on 1 and on 2 processes, which say
what a second process is worth on this machine.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from data_pipelines import curate, engine
from tools.bench.curation_bare import Cost, run_bare
from tools.bench.curation_processes import MemoryWatch, cpu_seconds
from tools.bench.curation_sources import render, render_tiny
from videofm.config.curate import CurateConfig
from videofm.config.load import load
from videofm.run_dir import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
SECONDS, SIZE = (6.0, 10.0), (360, 640)
AIM = 0.75
CHEAP: list[dict[str, Any]] = [
    {"kind": "probe", "min_frames": 9},
    {"kind": "dedup"},
    {"kind": "transcode", "short_side": 64, "preset": "ultrafast"},
]


def local_config(source: Path, num_workers: int, group_size: int) -> CurateConfig:
    """configs/data/local.yaml on a folder."""
    values = [f"source={source}", f"engine.num_workers={num_workers}", f"engine.group_size={group_size}"]
    return load(ROOT / "configs/data/local.yaml", values, CurateConfig)


def run_pipeline(config: CurateConfig, parent: Path) -> tuple[Cost, float]:
    """Curate in this process, with a Ray of its own: the cost after Ray has started, and the seconds that it took to start."""
    started = time.perf_counter()
    with (
        tempfile.TemporaryDirectory(prefix="run-", dir=parent) as folder,
        engine.cluster(config.engine),
        redirect_stdout(io.StringIO()),
    ):
        start_up, cpu, begun = time.perf_counter() - started, cpu_seconds(os.getpid()), time.perf_counter()
        result = curate.run(config, RunDirectory.create(folder, config))
        cost = Cost(time.perf_counter() - begun, cpu_seconds(os.getpid()) - cpu)
    cost.stages = {stage["stage"]: stage["cpu_seconds"] for stage in result["funnel"]}
    cost.num_clips = sum(result["num_clips"].values())
    return cost, start_up


def take_turns(ways: dict[str, Callable[[], Cost]], repeats: int) -> dict[str, list[Cost]]:
    """Each way `repeats` times, in turns, each of them first in some."""
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for turn in range(repeats):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            costs[name].append(ways[name]())
            cost = costs[name][-1]
            print(
                f"  turn {turn + 1}, {name}: {cost.wall:.1f} s, {cost.cpu:.1f} CPU s, load {os.getloadavg()[0]:.1f}", flush=True
            )
    clips = {cost.num_clips for many in costs.values() for cost in many}
    assert len(clips) == 1, f"the ways gave different numbers of clips: {clips}"
    return costs


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and lowest to highest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def throughput(folder: Path, arguments: argparse.Namespace) -> bool:
    """Print the table of bare stages and pipeline; whether the aim is met."""
    config = local_config(folder, arguments.workers, arguments.group_size)
    start_ups: list[float] = []

    def pipeline() -> Cost:
        cost, start_up = run_pipeline(config, folder.parent)
        start_ups.append(start_up)
        return cost

    costs = take_turns({"bare": lambda: run_bare(config, arguments.workers), "pipeline": pipeline}, arguments.repeats)
    bare, ours = costs["bare"], costs["pipeline"]
    names = list(ours[0].stages)
    print(f"\n{'CPU seconds':24} {'bare':>24} {'pipeline':>24}")
    for name in names:
        print(f"{name:24} " + " ".join(f"{spread([cost.stages[name] for cost in many]):>24}" for many in (bare, ours)))
    for title, value in (
        ("all stages", lambda cost: sum(cost.stages.values())), ("all processes", lambda cost: cost.cpu),
        ("seconds", lambda cost: cost.wall), ("clips/s", lambda cost: cost.num_clips / cost.wall),
    ):  # fmt: skip
        print(f"{title:24} " + " ".join(f"{spread([value(cost) for cost in many]):>24}" for many in (bare, ours)))
    of_time = [one.wall / other.wall for one, other in zip(bare, ours, strict=True)]
    of_cpu = [one.cpu / other.cpu for one, other in zip(bare, ours, strict=True)]
    print(f"{bare[0].num_clips} clips; Ray starts in {spread(start_ups, 1)} s, which is not in these")
    print(f"pipeline / bare, clips/s: {spread(of_time)}; bare CPU / pipeline CPU: {spread(of_cpu)}; aim {AIM}")
    return statistics.median(of_time) >= AIM


def scaling(folder: Path, arguments: argparse.Namespace) -> None:
    """Print seconds with 1 and 2 workers, beside the bare stages on 1 and 2 processes."""
    configs = {count: local_config(folder, count, arguments.group_size) for count in (1, 2)}
    ways: dict[str, Callable[[], Cost]] = {}
    for count, config in configs.items():
        ways[f"pipeline, {count} at once"] = lambda config=config: run_pipeline(config, folder.parent)[0]  # type: ignore[misc]
        ways[f"bare, {count} at once"] = lambda config=config, count=count: run_bare(config, count)  # type: ignore[misc]
    costs = take_turns(ways, arguments.repeats)
    print()
    for way in ("pipeline", "bare"):
        one, two = (costs[f"{way}, {count} at once"] for count in (1, 2))
        ratios = [a.wall / b.wall for a, b in zip(one, two, strict=True)]
        seconds = [spread([cost.wall for cost in many], 1) for many in (one, two)]
        print(f"{way:10} 1 at once {seconds[0]} s, 2 at once {seconds[1]} s: {spread(ratios)} times as fast")


def curate_and_tell(source: str, folder: str, num_workers: int, results: Any) -> None:
    """In a process of its own: curate tiny files; seconds, peak resident bytes of this process, clips."""
    engine_values = {"num_workers": num_workers}
    config = CurateConfig.model_validate({"kind": "curate", "source": source, "stages": CHEAP, "engine": engine_values})
    started = time.perf_counter()
    with redirect_stdout(io.StringIO()):
        result = curate.run(config, RunDirectory.create(folder, config))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.put((time.perf_counter() - started, peak, sum(result["num_clips"].values())))


def memory(parent: Path, arguments: argparse.Namespace) -> None:
    """Print memory for growing numbers of files."""
    context = multiprocessing.get_context("spawn")
    heads = ("seconds", "driver, peak", "driver", "Ray's own", "workers", "all", "all, median")
    print(f"MiB: peaks of samples, but for the first column of the driver\n{'files':>6} " + " ".join(f"{h:>13}" for h in heads))
    for count in arguments.counts:
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            source = Path(folder) / "videos"
            source.mkdir()
            render_tiny(source, count, arguments.workers)
            results = context.Queue()
            process = context.Process(
                target=curate_and_tell, args=(str(source), str(Path(folder) / "run"), arguments.workers, results)
            )
            process.start()
            assert process.pid is not None
            with MemoryWatch(process.pid) as watch:
                seconds, driver_peak, num_clips = results.get()
            process.join()
        assert num_clips == count, f"{num_clips} clips of {count} files"
        totals = [sum(sample.values()) for sample in watch.samples]
        peaks = [max(sample[kind] for sample in watch.samples) for kind in ("driver", "ray", "work")]
        values = [value / 2**20 for value in (driver_peak, *peaks, max(totals), statistics.median(totals))]
        print(f"{count:6} {seconds:13.1f} " + " ".join(f"{value:13.1f}" for value in values), flush=True)


def main() -> int:
    """Print the tables asked for; 1 where the aim of `--throughput` is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--throughput", action="store_true", help="against the bare stages")
    parser.add_argument("--memory", action="store_true", help="as the number of files grows")
    parser.add_argument("--scaling", action="store_true", help="1 and 2 workers")
    parser.add_argument("--files", type=int, default=48, help="sources of --throughput and --scaling (default 48)")
    parser.add_argument("--group-size", type=int, default=8, help="sources of a group, on average (default 8)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="workers, and bare processes (default 2)")
    parser.add_argument("--counts", type=int, nargs="+", default=[100, 1000, 5000], help="numbers of files of --memory")
    arguments = parser.parse_args()
    if not (arguments.throughput or arguments.memory or arguments.scaling):
        parser.error("choose --throughput, --memory or --scaling")
    met = True
    with tempfile.TemporaryDirectory(prefix="videofm-bench-") as name:
        folder = Path(name) / "videos"
        if arguments.throughput or arguments.scaling:
            folder.mkdir()
            render(folder, arguments.files, SECONDS, SIZE, arguments.workers)
        if arguments.throughput:
            met = throughput(folder, arguments)
        if arguments.scaling:
            scaling(folder, arguments)
        if arguments.memory:
            memory(Path(name), arguments)
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
