"""One dataset as the order sees it: windows over its shards, read when their turn comes, and nothing else of it in memory.

Shards that have clips of the split are permuted by (seed, epoch) and cut into windows; the usable clips of a window are
permuted. A dataset of any size costs one row a shard and the window that is being read.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol, overload

import numpy as np
import pyarrow
import pyarrow.compute

from videofm.config.data import DataConfig
from videofm.data.buckets import Bucket, BucketBatch, Buckets, Pack, Packed, Placement
from videofm.data.draws import Clip, Draw, PlanState, Shape, generator, uniform
from videofm.data.index import ClipRecord, records_of
from videofm.data.sizes import no_clip, refusal
from videofm.data.view import ResolvedView
from videofm.errors import DataError

_RECORD_BYTES = 32 << 20
"""Bytes of whole index tables that stay in memory for `record`."""

_CLIPS_A_TIME = 4096
"""Clips that are made of columns at a time where all of a window are looked at: as objects they take five times the memory."""

_WINDOWS = 2
"""Windows that stay in memory: one that is trained on, and the next one where reading is ahead."""

Indices = np.ndarray[Any, np.dtype[np.int64]]
Numbers = np.ndarray[Any, np.dtype[np.int32]]


class Dataset(Protocol):
    """What a source needs of a dataset; `videofm.data.manifest.Manifest` is one."""

    @property
    def place(self) -> str:
        """Its folder or URL."""

    @property
    def hash(self) -> str:
        """Its identity."""

    @property
    def tars(self) -> Sequence[str]:
        """The name of each shard's tar."""

    def num_clips(self, split: str) -> Indices:
        """How many clips of a split each shard has."""

    def read_shard(self, shard: int, columns: Sequence[str] | None = None) -> pyarrow.Table:
        """The named columns of a shard's index; None: all."""


@dataclass(frozen=True)
class Survey:
    """What some shards hold: the shapes of their clips, which of them are used, and why others are not."""

    num_shards: int
    used: Counter[Shape]
    left_out: Counter[str]


@dataclass(frozen=True)
class _Rows:
    """Clips in columns: keys, and the numbers of their shards in `shards` (rows of the manifest) and shapes in `shapes`."""

    keys: pyarrow.ChunkedArray
    parts: Numbers
    codes: Numbers
    shards: list[int]
    shapes: list[Shape]
    epoch: int

    def __len__(self) -> int:
        return len(self.codes)

    def clips(self, start: int = 0, stop: int | None = None) -> list[Clip]:
        """Those from `start` to `stop`; none where `stop` comes first."""
        part = slice(start, max(start, len(self) if stop is None else min(stop, len(self))))
        keys = self.keys.slice(start, part.stop - start).to_pylist()
        facts = zip(keys, self.parts[part].tolist(), self.codes[part].tolist(), strict=True)
        return [Clip(key, self.epoch, self.shards[part], self.shapes[code]) for key, part, code in facts]

    def at(self, numbers: Sequence[int]) -> list[Clip]:
        """Those of these numbers."""
        rows = np.array(numbers, np.int64)
        return replace(self, keys=self.keys.take(rows), parts=self.parts[rows], codes=self.codes[rows]).clips()

    def each(self) -> Iterator[Clip]:
        """All of them, a few in memory at a time."""
        for start in range(0, len(self), _CLIPS_A_TIME):
            yield from self.clips(start, start + _CLIPS_A_TIME)


@dataclass(frozen=True)
class _Numbered:
    """The clips that are packed together, by number: those carried into a window, then its own."""

    carry: tuple[Clip, ...]
    rows: _Rows

    def at(self, numbers: Sequence[int]) -> dict[int, Clip]:
        """The clips of these numbers."""
        count = len(self.carry)
        own = [number for number in numbers if number >= count]
        found = dict(zip(own, self.rows.at([number - count for number in own]), strict=True))
        return found | {number: self.carry[number] for number in numbers if number < count}


class _Steps(Sequence[list[BucketBatch[Clip] | Pack[Clip]]]):
    """Steps of clips, made of steps of their numbers when one is asked for."""

    def __init__(self, steps: Sequence[Sequence[BucketBatch[int] | Pack[int]]], clips: _Numbered) -> None:
        self._steps, self._clips = steps, clips

    def __len__(self) -> int:
        return len(self._steps)

    @overload
    def __getitem__(self, index: int) -> list[BucketBatch[Clip] | Pack[Clip]]: ...

    @overload
    def __getitem__(self, index: slice) -> _Steps: ...

    def __getitem__(self, index: int | slice) -> list[BucketBatch[Clip] | Pack[Clip]] | _Steps:
        if isinstance(index, slice):
            return _Steps(self._steps[index], self._clips)
        step = self._steps[index]
        clip_of: Callable[[int], Clip] = self._clips.at([number for batch in step for _, number in batch.pairs]).__getitem__
        return [batch.of(clip_of) for batch in step]


class ClipSource:
    """The endless order of the clips of one dataset.

    Args:
        name: of the dataset in a mix; "" where it is the only one.
        dataset: the committed shards.
        split: which clips are read.
        view: which of them pass; None: all.
        config: the section `data`.
        buckets: the buckets of `config`.
        seed: of the run.
    """

    def __init__(
        self,
        name: str,
        dataset: Dataset,
        split: str,
        view: ResolvedView | None,
        config: DataConfig,
        buckets: Buckets | None,
        seed: int,
    ) -> None:
        """
        Raises:
            DataError: no clip can be used.
        """
        self.name, self.dataset, self.split, self.view = name, dataset, split, view
        self.config, self.buckets = config, buckets
        self.key: tuple[int | str, ...] = (seed, name) if name else (seed,)
        self._drawn_as_images = config.buckets.image_share if config.buckets is not None else 0.0
        counts, tars = dataset.num_clips(split), dataset.tars
        self._shards = sorted(np.flatnonzero(counts).tolist(), key=lambda shard: tars[shard])
        self.num_clips = int(counts.sum())
        self._windows: OrderedDict[tuple[int, int], _Rows] = OrderedDict()
        self._tables: OrderedDict[int, pyarrow.Table] = OrderedDict()
        self._require_usable()

    @property
    def num_shards(self) -> int:
        """Shards that have clips of the split."""
        return len(self._shards)

    @property
    def num_windows(self) -> int:
        """Windows of an epoch."""
        return -(-len(self._shards) // self.config.window_shards)

    def window(self, epoch: int, window: int) -> _Rows:
        """The usable clips of a window, in their order."""
        if (epoch, window) not in self._windows:
            while len(self._windows) >= _WINDOWS:
                self._windows.popitem(last=False)
            self._windows[epoch, window] = self._read_window(epoch, window)
        self._windows.move_to_end((epoch, window))
        return self._windows[epoch, window]

    def packed(self, state: PlanState) -> Packed[Clip]:
        """What the clips of the window of `state`, and those carried into it, fill; steps are not permuted. Needs buckets."""
        assert self.buckets is not None
        clips = _Numbered(state.carry, self.window(state.epoch, state.window))
        buckets = list(map(self.bucket_of, chain(clips.carry, clips.rows.each())))
        packed = self.buckets.pack(range(len(buckets)), buckets.__getitem__)
        rest = clips.at(packed.rest)
        return Packed(_Steps(packed.steps, clips), [rest[number] for number in packed.rest])

    def next_window(self, state: PlanState, carry: Sequence[Clip]) -> PlanState:
        """The position at the start of the window after that of `state`."""
        last = state.window + 1 >= self.num_windows
        return PlanState(state.step, state.epoch + last, 0 if last else state.window + 1, carry=tuple(carry))

    def bucket_of(self, clip: Clip) -> Bucket:
        """The bucket of a clip in an epoch: a share of the videos, others in each epoch, are images."""
        assert self.buckets is not None
        place = self.buckets.place(clip.shape)
        assert isinstance(place, Placement), f"{clip} is in no bucket"
        if place.image is not None and uniform(*self.key, "image", clip.epoch, clip.key) < self._drawn_as_images:
            return place.image
        return place.bucket

    def record(self, shard: int, key: str) -> ClipRecord:
        """All that the index says about a clip."""
        table = self._whole_table(shard)
        row = pyarrow.compute.index(table["key"], key).as_py()
        assert row >= 0, f"{self.dataset.tars[shard]} has no clip {key}"
        return records_of(table.slice(row, 1))[0]

    def spares(self, draw: Draw, avoid: Collection[str]) -> Iterator[Clip]:
        """Clips that can take the place of `draw`, in an order that is a function of it: of the same bucket, from its own shard
        first; those with keys in `avoid` come last, after all others of the dataset."""
        start = self._shards.index(draw.shard)
        shards = self._shards[start:] + self._shards[:start]
        for wanted in (False, True):
            for shard in shards:
                rows = self._usable(shard, draw.epoch)
                for row in generator(*self.key, "spare", draw.epoch, draw.key, shard).permutation(len(rows)).tolist():
                    (clip,) = rows.clips(row, row + 1)
                    if clip.key != draw.key and (clip.key in avoid) is wanted and self._fits(clip.shape, draw):
                        yield clip

    def survey(self, num_shards: int | None = None) -> Survey:
        """Read the first `num_shards` shards (None: all) and count their clips."""
        shards = self._shards[:num_shards]
        seen: Counter[Shape] = Counter()
        for shard in shards:
            seen += self._seen(shard)
        used = Counter({shape: count for shape, count in seen.items() if self._refusal(shape) is None})
        left_out: Counter[str] = Counter()
        for shape, count in seen.items():
            if (reason := self._refusal(shape)) is not None:
                left_out[reason] += count
        return Survey(len(shards), used, left_out)

    def num_usable(self, at_most: int) -> int:
        """How many clips can be used; counting ends at `at_most`."""
        found = 0
        for shard in self._shards:
            found += len(self._usable(shard, 0))
            if found >= at_most:
                return at_most
        return found

    def _require_usable(self) -> None:
        """See that an epoch has a clip: mostly one shard is read."""
        seen: Counter[Shape] = Counter()
        for shard in self._shards:
            found = self._seen(shard)
            if any(self._refusal(shape) is None for shape in found):
                return
            seen += found
        at = f" of data.mix source {self.name}" if self.name else ""
        if self.view is not None and not seen and self.num_clips:
            raise DataError(
                f"the view drops all {self.num_clips:,} clips of split {self.split!r}{at}; "
                "see which rule with `videofm data view`, and loosen it"
            )
        if self.buckets is None:
            raise DataError(no_clip(seen, self.config, self.split) + (f" (data.mix source {self.name})" if self.name else ""))
        left_out: Counter[str] = Counter()
        for shape, count in seen.items():
            left_out[str(self._refusal(shape))] += count
        reasons = "; ".join(f"{count}: {reason}" for reason, count in left_out.most_common()) or "there is none"
        raise DataError(
            f"no clip of split {self.split!r}{at} falls into a bucket ({reasons}). "
            "Add smaller or shorter sizes to data.buckets.sizes, or curate other clips."
        )

    def _fits(self, shape: Shape, draw: Draw) -> bool:
        if self.buckets is None:
            return True
        place = self.buckets.place(shape)
        assert isinstance(place, Placement)
        size = f"{draw.num_frames}x{draw.height}x{draw.width}"
        return size in (str(place.bucket), str(place.image))

    def _refusal(self, shape: Shape) -> str | None:
        """Why clips of a shape are not used; None where they are."""
        if self.buckets is None:
            return refusal(shape, self.config)
        place = self.buckets.place(shape)
        return place if isinstance(place, str) else None

    def _read_window(self, epoch: int, window: int) -> _Rows:
        order = generator(*self.key, "shards", epoch).permutation(len(self._shards))
        size = self.config.window_shards
        parts = [self._read(self._shards[index]) for index in order[window * size : (window + 1) * size]]
        rows = self._join(parts, epoch)
        shuffled = generator(*self.key, "clips", epoch, window).permutation(len(rows))
        return replace(rows, keys=rows.keys.take(shuffled), parts=rows.parts[shuffled], codes=rows.codes[shuffled])

    def _usable(self, shard: int, epoch: int) -> _Rows:
        return self._join([self._read(shard)], epoch)

    def _seen(self, shard: int) -> Counter[Shape]:
        """The clips of a shard that pass the view, by shape, usable or not."""
        shapes, counts = np.unique(_shape_codes(self._read(shard)[1]), return_counts=True)
        return Counter(dict(zip(map(_shape, shapes.tolist()), counts.tolist(), strict=True)))

    def _join(self, parts: Sequence[tuple[int, pyarrow.Table]], epoch: int) -> _Rows:
        """The usable clips of several shards, one after the other, each by key."""
        numbers = np.repeat(np.arange(len(parts), dtype=np.int32), [len(table) for _, table in parts])
        packed, codes = np.unique(np.concatenate([_shape_codes(table) for _, table in parts]), return_inverse=True)
        shapes = [_shape(value) for value in packed.tolist()]
        usable = np.array([self._refusal(shape) is None for shape in shapes], bool)[codes]
        keys = pyarrow.chunked_array([chunk for _, table in parts for chunk in table["key"].chunks], pyarrow.string())
        # One chunk: `take` and `slice` of many would copy and search each time.
        keys = pyarrow.chunked_array([keys.filter(pyarrow.array(usable)).combine_chunks()], pyarrow.string())
        return _Rows(keys, numbers[usable], codes[usable].astype(np.int32), [shard for shard, _ in parts], shapes, epoch)

    def _read(self, shard: int) -> tuple[int, pyarrow.Table]:
        """The clips of a shard that pass split and view, by key: its row, and their keys and shapes."""
        wanted = ["key", *Shape._fields]
        table = self.dataset.read_shard(shard, [*wanted, "split", *(self.view.columns if self.view is not None else [])])
        table = table.filter(pyarrow.compute.equal(table["split"], self.split))
        if self.view is not None:
            table = table.filter(pyarrow.array(self.view.keep(table)))
        return shard, table.select(wanted).sort_by("key")

    def _whole_table(self, shard: int) -> pyarrow.Table:
        """All of a shard's index, from memory where it was read lately."""
        if shard not in self._tables:
            self._tables[shard] = self.dataset.read_shard(shard)
            while len(self._tables) > 1 and sum(table.nbytes for table in self._tables.values()) > _RECORD_BYTES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(shard)
        return self._tables[shard]


class ClipStream:
    """The clips of a source one after the other, from a position on whose `step` counts clips."""

    def __init__(self, source: ClipSource, position: PlanState) -> None:
        self._source, self.position = source, position

    def take(self) -> Clip:
        """The next clip; `position` is then after it."""
        position = self.position
        while position.step_in_window >= len(rows := self._source.window(position.epoch, position.window)):
            position = self._source.next_window(position, ())
        (clip,) = rows.clips(position.step_in_window, position.step_in_window + 1)
        self.position = PlanState(position.step + 1, position.epoch, position.window, position.step_in_window + 1)
        return clip


def _shape_codes(table: pyarrow.Table) -> Indices:
    """The shape of each row in one number."""
    columns = [np.asarray(table[name].to_numpy(), np.int64) for name in Shape._fields]
    return columns[0] << 40 | columns[1] << 20 | columns[2]


def _shape(code: int) -> Shape:
    return Shape(code >> 40, code >> 20 & 0xFFFFF, code & 0xFFFFF)
