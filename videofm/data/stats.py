"""`videofm data stats`: what a dataset holds, by one pass over its index."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow

from videofm.data import storage
from videofm.data.manifest import Manifest
from videofm.data.quantiles import RowSample
from videofm.data.view import in_splits, number

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_FACTS = ("num_frames", "duration", "caption_length")
_MOST = 12
"""Sizes and rates that are listed; the others are added up."""


@dataclass
class Stats:
    """Counts over the clips of a dataset. `rows` has the numbers for quantiles; names of scores begin with `score_`."""

    place: str
    manifest_hash: str
    config_hash: str
    num_shards: int
    tar_bytes: int
    rows: RowSample
    clips: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    video_bytes: int = 0
    sizes: Counter[str] = field(default_factory=Counter)
    rates: Counter[float] = field(default_factory=Counter)
    num_captioned: int = 0
    missing: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for programs."""
        total = self.clips.total()
        return {
            "place": self.place, "manifest_hash": self.manifest_hash, "config_hash": self.config_hash,
            "shards": self.num_shards, "tar_bytes": self.tar_bytes, "video_bytes": self.video_bytes, "clips": dict(self.clips),
            "hours": {split: seconds / 3600 for split, seconds in self.seconds.items()},
            "sizes": dict(self.sizes.most_common()), "fps": {f"{fps:g}": n for fps, n in self.rates.most_common()},
            "without_caption": total - self.num_captioned, "quantile_rank_error": self.rows.rank_error,
            "quantiles": {name: self.quantiles(name) for name in self.rows.names}, "without_score": dict(self.missing),
        }  # fmt: skip

    def quantiles(self, name: str) -> list[float]:
        """The values at `QUANTILES`; none where no clip has one."""
        values = self.rows.values(name)
        return [float(value) for value in np.quantile(values, QUANTILES, method="inverted_cdf")] if len(values) else []


def stats(manifest: Manifest) -> Stats:
    """Count what a dataset holds."""
    scores: set[str] = set()
    for shard in range(len(manifest.table)):
        # Empty scores count too: a column says that it was meant to be measured.
        scores |= {name for name in manifest.read_shard(shard).column_names if name.startswith("score_")}
    names = [*_FACTS, *sorted(scores)]
    hashes = manifest.table["config_hash"][0].as_py()
    found = Stats(
        storage.redacted(manifest.place), manifest.hash, hashes, len(manifest.table),
        int(np.asarray(manifest.table["bytes"].to_numpy()).sum()), RowSample(names),
    )  # fmt: skip
    columns = ["key", "split", "num_frames", "fps", "height", "width", "size", "caption", *sorted(scores)]
    for shard in range(len(manifest.table)):
        _add(found, manifest.read_shard(shard, columns))
    return found


def _add(found: Stats, table: pyarrow.Table) -> None:
    columns = {
        name: number(table, name.removeprefix("score_"), None) if name.startswith("score_") else number(table, None, name)
        for name in found.rows.names
    }
    found.rows.add(table["key"].to_pylist(), columns)
    for name, values in columns.items():
        found.missing[name] += int(np.isnan(values).sum())
    for split in sorted(set(table["split"].to_pylist())):
        mask = in_splits(table, [split])
        found.clips[split] += int(mask.sum())
        found.seconds[split] = found.seconds.get(split, 0.0) + float(columns["duration"][mask].sum())
    found.video_bytes += int(number(table, None, "bytes").sum())
    pairs = zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True)
    found.sizes.update(f"{height}x{width}" for height, width in pairs)
    found.rates.update(round(fps, 3) for fps in table["fps"].to_pylist())
    found.num_captioned += int((columns["caption_length"] > 0).sum())


def as_text(found: Stats) -> str:
    """The counts for people."""
    total, lines = found.clips.total(), []
    lines.append(f"{found.place}: {total:,} clips in {found.num_shards:,} shards, {found.tar_bytes / 2**30:.3f} GiB")
    lines.append(f"manifest {found.manifest_hash[:12]}, config {found.config_hash[:20]}")
    lines += [
        f"  {split:<9} {n:>12,} clips {found.seconds[split] / 3600:>12,.3f} h" for split, n in sorted(found.clips.items())
    ]
    lines += ["", f"captions: {found.num_captioned:,} clips have one, {total - found.num_captioned:,} do not", ""]
    for title, counts in (("height x width", found.sizes), ("fps", found.rates)):
        listed = counts.most_common(_MOST)
        shown = [f"{value:g}" if isinstance(value, float) else value for value, _ in listed]
        lines.append(f"{title}: " + ", ".join(f"{text} ({n:,})" for text, (_, n) in zip(shown, listed, strict=True)))
        if len(counts) > _MOST:
            lines[-1] += f" and {len(counts) - _MOST:,} others ({total - sum(n for _, n in listed):,})"
    width = max(map(len, found.rows.names))
    lines += ["", " " * width + "".join(f"{f'{q:.0%}':>11}" for q in QUANTILES) + f"{'without':>11}"]
    for name in found.rows.names:
        values = found.quantiles(name)
        cells = "".join(f"{value:>11.4g}" for value in values) if values else f"{'no clip has it':>{11 * len(QUANTILES)}}"
        lines.append(f"{name:<{width}}{cells}{found.missing[name]:>11,}")
    if found.rows.rank_error:
        lines.append(
            f"quantiles are from a sample: with a probability of 99% each is off by at most {found.rows.rank_error:.2%}"
        )
    return "\n".join(lines)
