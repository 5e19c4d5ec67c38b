"""What the report shows of a curation run, from a bounded part of it; samples are drawn by hash, so are the same each time.

Exact counts come from the funnel. Of shards, at most `MAX_SHARDS` are read, one after the other; of lists of losses, at most
`MAX_LIST_BYTES`, in evenly spaced pieces. So a page costs the same for a thousand clips and for a hundred million.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from videofm.data.index import ClipRecord, read_records
from videofm.data.manifest import read_entry
from videofm.errors import DataError
from videofm.report.histogram import Histogram, Spread, Threshold

MAX_SHARDS = 256
MAX_LIST_BYTES = 64 << 20
NUM_PIECES = 64
MAX_KEPT = 24
"""Clips on the sheet of kept ones."""
MAX_LOST = 12
"""Clips on the sheet of a reason."""
MAX_ALL_LOST = 144
"""Clips on the sheets of all reasons together."""
MAX_QUARANTINE = 50
SCORE = "score_"
FACTS = {
    "duration": "seconds a clip",
    "frames": "a clip",
    "fps": "frames a second",
    "height": "pixels",
    "width": "pixels",
    "caption length": "characters",
}
"""Facts of kept clips that have a histogram, with their units."""

LISTS = ("dropped.jsonl", "quarantine.jsonl")
Reason = tuple[str, str, str]
"""Stage, kind (dropped, quarantined, errors) and reason."""


@dataclass
class CurationData:
    """What the page needs. `kept` and `lost` are samples; `num_shards` counts all shards, `num_read` those that were read."""

    kept: list[ClipRecord] = field(default_factory=list)
    lost: dict[Reason, list[dict[str, Any]]] = field(default_factory=dict)
    scores: list[Histogram] = field(default_factory=list)
    facts: list[Histogram] = field(default_factory=list)
    constants: dict[str, float] = field(default_factory=dict)
    quarantined: list[dict[str, Any]] = field(default_factory=list)
    num_quarantined: int = 0
    num_shards: int = 0
    num_read: int = 0
    lists_cut: bool = False
    problems: list[str] = field(default_factory=list)


def gather(path: Path, config: dict[str, Any], funnel: list[dict[str, Any]]) -> CurationData:
    """What to show of the curation run at `path`. What cannot be read is a line in `problems`."""
    data = CurationData()
    groups = sorted(entry.stem.removeprefix("shard-") for entry in (path / "manifest").glob("shard-*.json"))
    data.num_shards = len(groups)
    indexes = [index for group in lowest(groups, MAX_SHARDS, str) if (index := _index(path, group, data)) is not None]
    data.num_read = len(indexes)
    data.lists_cut = any(_size(path / name) > MAX_LIST_BYTES for name in LISTS)
    data.num_quarantined = sum(sum(step.get(kind, {}).values()) for step in funnel for kind in ("quarantined", "errors"))
    _histograms(path, config, indexes, data)
    data.kept = _sample_kept(indexes)
    data.lost = _sample_lost(path)
    data.quarantined = sorted(
        (loss for reason, losses in _by_reason(path, MAX_QUARANTINE).items() if reason[1] != "dropped" for loss in losses),
        key=_hash_of_loss,
    )[:MAX_QUARANTINE]
    data.quarantined.sort(key=lambda loss: (str(loss.get("source")), loss["start"] or 0))
    return data


def thresholds_of(config: dict[str, Any], names: Iterable[str]) -> dict[str, list[Threshold]]:
    """The limits that rules of the config's stages set on the scores `names`."""
    found: dict[str, list[Threshold]] = {name: [] for name in names}
    for section in config.get("stages", []):
        stage = str(section.get("name") or section.get("kind"))
        for rule in section.get("rules") or []:
            for side in ("min", "max"):
                if isinstance(rule, dict) and rule.get("score") in found and isinstance(rule.get(side), int | float):
                    found[rule["score"]].append(Threshold(side, float(rule[side]), stage))  # type: ignore[arg-type]
    return found


def lowest(items: Iterable[Any], count: int, name: Callable[[Any], str]) -> list[Any]:
    """The `count` items whose names have the smallest hashes: a sample that does not depend on order. Sorted by name."""
    return sorted(heapq.nsmallest(count, items, key=lambda item: _hash(name(item))), key=name)


def sampled_lines(path: Path, most: int = MAX_LIST_BYTES, num_pieces: int = NUM_PIECES) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; of one larger than `most` bytes, those in `num_pieces` evenly spaced pieces of it."""
    size = _size(path)
    if not size:
        return
    spans = [(0, size)]
    if size > most:
        spans = [(size * i // num_pieces, size * i // num_pieces + most // num_pieces) for i in range(num_pieces)]
    with path.open("rb") as file:
        for start, stop in spans:
            file.seek(max(0, start - 1))
            if start:
                file.readline()  # the line that began before this piece, unless it ended just there
            while file.tell() < stop and (line := file.readline()):
                value = json.loads(line)
                if isinstance(value, dict):
                    yield value


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _index(path: Path, group: str, data: CurationData) -> Path | None:
    """The index of a group, if its metadata can be read."""
    try:
        index = path / read_entry(path, group).index
        pyarrow.parquet.read_metadata(index)
        return index
    except (DataError, OSError, pyarrow.ArrowException) as error:
        data.problems.append(str(error))
        return None


def _losses(path: Path) -> Iterator[dict[str, Any]]:
    """The refused rows in both lists; places in a source that are no numbers count as not given."""
    for name in LISTS:
        for loss in sampled_lines(path / name):
            span = loss.get("span")
            sound = isinstance(span, list) and len(span) == 2 and all(isinstance(end, int | float) for end in span)
            places = {key: loss.get(key) if isinstance(loss.get(key), int) else None for key in ("start", "stop")}
            scores = loss.get("scores")
            yield {**loss, **places, "span": span if sound else None, "scores": scores if isinstance(scores, dict) else {}}


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _hash_of_loss(loss: dict[str, Any]) -> bytes:
    return _hash(json.dumps([loss.get(name) for name in ("source", "span", "start", "stop", "stage")]))


# -- samples


def _sample_kept(indexes: list[Path]) -> list[ClipRecord]:
    """Clips with the smallest hashes of their keys."""

    def keys() -> Iterator[tuple[str, Path]]:
        for index in indexes:
            yield from ((key, index) for key in pyarrow.parquet.read_table(index, columns=["key"])["key"].to_pylist())

    wanted: dict[Path, set[str]] = {}
    for key, index in lowest(keys(), MAX_KEPT, lambda item: item[0]):
        wanted.setdefault(index, set()).add(key)
    records = [record for index, names in wanted.items() for record in read_records(index) if record.key in names]
    return sorted(records, key=lambda record: record.key)


def _by_reason(path: Path, count: int) -> dict[Reason, list[dict[str, Any]]]:
    """For each reason, the `count` losses with the smallest hashes."""
    heaps: dict[Reason, list[tuple[int, int, dict[str, Any]]]] = {}
    for number, loss in enumerate(_losses(path)):
        heap = heaps.setdefault((str(loss.get("stage")), str(loss.get("kind")), str(loss.get("reason"))), [])
        item = (-int.from_bytes(_hash_of_loss(loss)), -number, loss)
        if len(heap) < count:
            heapq.heappush(heap, item)
        else:
            heapq.heappushpop(heap, item)
    return {reason: [loss for _, _, loss in sorted(heap, reverse=True)] for reason, heap in heaps.items()}


def _sample_lost(path: Path) -> dict[Reason, list[dict[str, Any]]]:
    """For each reason a few losses, fewer where there are many reasons; by source and time."""
    found = _by_reason(path, MAX_LOST)
    share = max(1, min(MAX_LOST, MAX_ALL_LOST // max(1, len(found))))
    return {
        reason: sorted(losses[:share], key=lambda loss: (str(loss.get("source")), loss["start"] or 0))
        for reason, losses in list(found.items())[:MAX_ALL_LOST]
    }


# -- histograms


def _histograms(path: Path, config: dict[str, Any], indexes: list[Path], data: CurationData) -> None:
    """Two passes over the indexes and the lists: one for the ends of the axes, one for the counts."""
    spreads: dict[str, Spread] = {}
    for columns in _columns(path, indexes):
        for name, (values, _) in columns.items():
            spreads.setdefault(name, Spread()).add(values)
    scores = sorted(name for name in spreads if name.startswith(SCORE))
    rules = thresholds_of(config, [name.removeprefix(SCORE) for name in scores])
    short = {name: name.removeprefix(SCORE) for name in scores}
    histograms = {name: Histogram.over(short[name], spreads[name], rules[short[name]]) for name in scores}
    for name in FACTS:
        spread = spreads.get(name, Spread())
        if spread.low == spread.high:
            data.constants[name] = spread.low
        elif spread.low < spread.high:
            histograms[name] = Histogram.over(name, spread)
    for columns in _columns(path, indexes):
        for name, (values, kept) in columns.items():
            if name in histograms:
                histograms[name].add(values, kept)
    data.scores = [histograms[name] for name in scores]
    data.facts = [histograms[name] for name in FACTS if name in histograms]


def _columns(path: Path, indexes: list[Path]) -> Iterator[dict[str, tuple[np.ndarray[Any, Any], bool]]]:
    """Finite values of each score and fact, and whether these clips were kept: a shard, then some losses, at once."""
    for index in indexes:
        names = [name for name in pyarrow.parquet.read_schema(index).names if name.startswith(SCORE)]
        wanted = ["num_frames", "fps", "height", "width", "caption", *names]
        table = pyarrow.parquet.read_table(index, columns=wanted)
        frames, fps = (table[name].to_numpy().astype(np.float64) for name in ("num_frames", "fps"))
        lengths = pyarrow.compute.utf8_length(table["caption"]).to_numpy()
        values = {
            "duration": frames / fps, "frames": frames, "fps": fps, "height": table["height"].to_numpy(),
            "width": table["width"].to_numpy(), "caption length": lengths,
        }  # fmt: skip
        values |= {name: table[name].to_numpy() for name in names}
        yield {name: (_finite(array), True) for name, array in values.items()}
    pending: dict[str, list[float]] = {}
    for number, loss in enumerate(_losses(path), 1):
        for name, value in loss["scores"].items():
            if isinstance(value, int | float):
                pending.setdefault(SCORE + name, []).append(float(value))
        if number % 100_000 == 0:
            yield {name: (_finite(np.array(found)), False) for name, found in pending.items()}
            pending = {}
    yield {name: (_finite(np.array(found)), False) for name, found in pending.items()}


def _finite(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values = values.astype(np.float64)
    return values[np.isfinite(values)]
