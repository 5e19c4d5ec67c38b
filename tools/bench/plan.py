"""Starting, and resuming at step 1,000,000, on 10^8 clips in 10^5 shards: seconds and memory, in fresh processes.

The manifest is real: 100,000 rows in a snapshot beside as many (empty) entries, which are listed to see that it is current. So
is the reading of each index: a Parquet file of 1,000 rows with captions, whose keys are then renamed after the shard.

    python tools/bench/plan.py            # 10^5 shards
    python tools/bench/plan.py 2000       # fewer
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute

sys.path.insert(0, str(Path(__file__).parents[2]))

from videofm.config.data import DataConfig
from videofm.data import snapshot
from videofm.data.index import ClipRecord, read_table, write_index
from videofm.data.manifest import Manifest
from videofm.data.plan import DataPlan, PlanState

CLIPS, WINDOW, STEP = 1000, 256, 256
"""Clips of a shard, shards of a window, clips of a step."""

SIZES = [(81, 480, 832), (81, 832, 480), (33, 480, 832), (1, 480, 832)]
REPEATS = 5


class Simulated(Manifest):
    """A manifest whose shards all have the index of the first, under keys of their own."""

    def read_shard(self, shard: int, columns: Sequence[str] | None = None) -> pyarrow.Table:
        table = read_table(self.folder / "index.parquet", columns)
        keys = pyarrow.compute.binary_join_element_wise(f"{shard:06d}", table["key"], "-")
        return table.set_column(table.column_names.index("key"), "key", keys)


def write_dataset(folder: Path, num_shards: int) -> None:
    """The snapshot, the entries' names and one index."""
    rng = np.random.default_rng(0)
    shapes = [(81, 720, 1280), (121, 1280, 720), (40, 720, 1280), (81, 480, 854)]
    records = [
        ClipRecord(
            f"{i:06x}{i * i % 65536:010x}-{i:08d}", "shards/shard-000000.tar", i * 2_000_000, 1_900_000, "0" * 64,
            *(shapes[i % 4][0], 24.0, *shapes[i % 4][1:]), "a caption of some words " * 30, f"{i:032x}", "train",
            {name: float(rng.random()) for name in ("motion", "blur", "aesthetic", "saturation")},
        )
        for i in range(CLIPS)
    ]  # fmt: skip
    write_index(folder / "index.parquet", records)
    groups = [f"{number:06d}" for number in range(num_shards)]
    values = {
        "group": groups, "tar": [f"shards/shard-{group}.tar" for group in groups], "bytes": [2 * 10**9] * num_shards,
        "sha256": [f"{number:064x}" for number in range(num_shards)], "config_hash": ["c" * 64] * num_shards,
        "index": [f"index/shard-{group}.parquet" for group in groups], "num_train": [CLIPS] * num_shards,
        "index_sha256": [f"{number:064x}" for number in range(num_shards)], "num_held_out": [0] * num_shards,
    }  # fmt: skip
    table = pyarrow.table({name: pyarrow.array(values[name], kind) for name, kind in snapshot.COLUMNS.items()})
    (folder / "manifest").mkdir()
    names = [f"shard-{group}.json" for group in groups]
    for name in names:
        (folder / "manifest" / name).touch()
    snapshot.write(folder / "manifest" / snapshot.NAME, table, names)


def settings(folder: Path, buckets: bool) -> DataConfig:
    """256 clips a step; with buckets about as many."""
    values = {"manifest": str(folder), "num_frames": 33, "height": 480, "width": 832, "crop": "random"}
    if not buckets:
        values |= {"resize_short_side": 480, "height": 448, "width": 448}
    else:
        sizes = [{"num_frames": t, "height": h, "width": w} for t, h, w in SIZES]
        token = {"num_frames": 8, "height": 32, "width": 32}
        values["buckets"] = {"sizes": sizes, "token": token, "max_crop": 0.6, "image_share": 0.1}
    return DataConfig.model_validate({**values, "micro_batch_size": 4, "num_micro_batches": STEP // 4, "window_shards": WINDOW})


def position(folder: Path, num_shards: int, buckets: bool) -> PlanState:
    """Where a run stands after a million steps: exactly in the plain order, in which every clip is used; with buckets in the
    same window, with what another window leaves over as the carry."""
    step = 1_000_000
    epoch, left = divmod(step * STEP, num_shards * CLIPS)
    window, inside = divmod(left, WINDOW * CLIPS)
    if not buckets:
        assert num_shards * CLIPS % STEP == 0, "whole steps an epoch, so that nothing is carried"
        return PlanState(step, epoch, window, inside // STEP)
    (source,) = DataPlan([Simulated.load(folder)], settings(folder, buckets), 0).sources.values()
    return PlanState(step, epoch, window, 100, tuple(source.packed(PlanState(epoch=epoch, window=window - 1)).rest))


def memory(name: str) -> float:
    """A number of this process in MiB, as Linux counts: VmRSS now, VmHWM at its most."""
    # Not getrusage: what it calls the most begins with the parent's.
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def measure(folder: Path, buckets: bool, text: str) -> dict[str, float]:
    """In this process: from nothing to the first planned step with all records of its first micro-batch."""
    before = memory("VmRSS")
    start = time.perf_counter()
    manifest = Simulated.load(folder)
    loaded = time.perf_counter()
    plan = DataPlan([manifest], settings(folder, buckets), 0)
    step = next(plan.steps(PlanState.from_json(json.loads(text))))
    planned = time.perf_counter()
    for draw in step.micro_batches[0]:
        assert plan.record(draw).key == draw.key
    after = memory("VmHWM")
    return {"manifest": loaded - start, "plan": planned - loaded, "total": planned - start, "mib": after - before, "rss": after}


def run(folder: Path, buckets: bool, state: PlanState) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "measure", str(folder), str(int(buckets)), json.dumps(state.to_json())]
    values: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return values


def main(num_shards: int) -> None:
    """Measure and print; starts and resumes take turns, so that a busy machine is fair to both."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder, num_shards)
        print(f"{num_shards:,} shards of {CLIPS:,} clips, windows of {WINDOW} shards; medians of {REPEATS} (least)")
        for buckets in (False, True):
            states = {"step 0": PlanState(), "step 1,000,000": position(folder, num_shards, buckets)}
            found: dict[str, list[dict[str, float]]] = {label: [] for label in states}
            for _ in range(REPEATS):
                for label, state in states.items():
                    found[label].append(run(folder, buckets, state))
            print("\nbuckets" if buckets else "\none size")
            for label, rows in found.items():
                cells = [f"{part} {np.median(times):.2f} s ({min(times):.2f})" for part in ("manifest", "plan", "total")
                         for times in [[row[part] for row in rows]]]  # fmt: skip
                most = max(rows, key=lambda row: row["mib"])
                size = len(json.dumps(states[label].to_json()))
                print(f"  {label:<15} {', '.join(cells)}; +{most['mib']:.0f} MiB over imports, {most['rss']:.0f} MiB in all; "
                      f"state of {size:,} bytes")  # fmt: skip
            first, later = (np.median([row["total"] for row in rows]) for rows in found.values())
            print(f"  resume / start {later / first:.2f} (limit 1.2)")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3] == "1", sys.argv[4])))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 100_000)
