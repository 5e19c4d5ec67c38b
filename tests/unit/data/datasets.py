"""Datasets of a plan that lie in memory, and count what is read of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow

from videofm.config.data import DataConfig
from videofm.data.index import ClipRecord, table_of
from videofm.data.plan import DataPlan


class MemoryDataset:
    """The records of a dataset as its index would give them. `reads` counts how often each shard's index was opened."""

    def __init__(self, records: Sequence[ClipRecord], hash: str = "h", place: str = "m") -> None:
        self.hash, self.place, self.reads = hash, place, Counter[int]()
        self.tars = sorted({record.shard for record in records})
        self.tables = [table_of([record for record in records if record.shard == tar]) for tar in self.tars]

    def num_clips(self, split: str) -> np.ndarray:
        return np.array([table["split"].to_pylist().count(split) for table in self.tables])

    def read_shard(self, shard: int, columns: Sequence[str] | None = None) -> pyarrow.Table:
        self.reads[shard] += 1
        table = self.tables[shard]
        return table if columns is None else table.select([name for name in table.column_names if name in columns])


def plan_of(records: Sequence[ClipRecord], hash: str, config: DataConfig, seed: int) -> DataPlan:
    """The plan of one dataset in memory."""
    return DataPlan([MemoryDataset(records, hash)], config, seed)


def usable(plan: DataPlan) -> dict[str, ClipRecord]:
    """The records of every clip that an epoch of a plan of one dataset draws, by key."""
    (source,) = plan.sources.values()
    clips = [clip for window in range(source.num_windows) for clip in source.window(0, window).clips()]
    return {clip.key: source.record(clip.shard, clip.key) for clip in clips}
