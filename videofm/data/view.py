"""Views: the clips of a dataset that rules over scores and facts keep.

A rule's quantiles become absolute thresholds by one pass over the index. They are stored in the dataset, in
`views/NAME-HASH.json`, under a hash of the rules and of the manifest, so that a trainer reads them and scans nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute

from videofm.config.load import load
from videofm.config.view import ViewConfig, ViewRuleConfig
from videofm.data import storage
from videofm.data.manifest import SPLITS, Manifest
from videofm.data.quantiles import NUM_EXACT, Columns, RowSample, lower_bound, upper_bound
from videofm.errors import DataError, MissingError

VERSION = 1
SCAN_LIMIT = 1_000_000
"""Clips up to which `View.resolve` looks at the index by itself; beyond, `videofm data view` does it once for all."""

Bounds = dict[str, tuple[float | None, float | None]]
"""Lower and upper threshold of each rule."""

FACT_COLUMNS = {
    "num_frames": ("num_frames",),
    "fps": ("fps",),
    "height": ("height",),
    "width": ("width",),
    "duration": ("num_frames", "fps"),
    "aspect": ("height", "width"),
    "pixels": ("height", "width"),
    "bytes": ("size",),
    "caption_length": ("caption",),
}
"""The index columns that each fact is made of."""


@dataclass(frozen=True)
class ResolvedRule:
    """A rule with absolute bounds, in the unit of its score or fact; None is no bound."""

    name: str
    score: str | None
    field: str | None
    min: float | None
    max: float | None
    missing: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The index columns that it reads."""
        return (f"score_{self.score}",) if self.score is not None else FACT_COLUMNS[str(self.field)]

    def keep(self, table: pyarrow.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which rows stay.

        Raises:
            DataError: a row lacks the score, and the rule says that this is an error.
        """
        values = number(table, self.score, self.field)
        absent = np.isnan(values)
        if self.missing == "error" and absent.any():
            raise DataError(missing_message(self.name, str(self.score), int(absent.sum()), len(values)))
        kept = absent if self.missing == "keep" else np.zeros(len(values), bool)
        inside = ~absent
        if self.min is not None:
            inside &= values >= self.min
        if self.max is not None:
            inside &= values <= self.max
        return kept | inside


@dataclass(frozen=True)
class ResolvedView:
    """A view whose thresholds are absolute. `rank_error` is the share of the clips by which a quantile may be off."""

    name: str
    splits: tuple[str, ...]
    rules: tuple[ResolvedRule, ...]
    rank_error: float

    @property
    def columns(self) -> list[str]:
        """The index columns that `keep` reads."""
        return sorted({"split", *(column for rule in self.rules for column in rule.columns)})

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of what decides about a clip: rules with their thresholds, and splits. Names do not matter."""
        rules = sorted(
            json.dumps({k: v for k, v in asdict(rule).items() if k != "name"}, sort_keys=True) for rule in self.rules
        )
        return _sha256({"version": VERSION, "splits": sorted(self.splits), "rules": rules})

    def keep(self, table: pyarrow.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which rows of an index table with at least `columns` stay: bool `(rows,)`.

        Raises:
            DataError: a score that must not be missing is.
        """
        kept = in_splits(table, self.splits)
        table = table.filter(pyarrow.array(kept))
        inside = np.ones(len(table), bool)
        for rule in self.rules:
            inside &= rule.keep(table)
        kept[np.flatnonzero(kept)] = inside
        return kept


@dataclass(frozen=True)
class View:
    """A view as written."""

    name: str
    config: ViewConfig

    @classmethod
    def load(cls, path: str | Path) -> View:
        """The view in a YAML file; its name is that of the file.

        Raises:
            ConfigError: the file is missing or not a valid view.
        """
        return cls(re.sub(r"[^A-Za-z0-9_-]", "_", Path(path).stem), load(path, [], ViewConfig, {"kind": "view"}))

    @property
    def rules(self) -> dict[str, ViewRuleConfig]:
        """The rules that count, by name."""
        return {name: rule for name, rule in self.config.rules.items() if rule is not None}

    def stored_place(self, manifest: Manifest) -> str:
        """Where the thresholds for a dataset are kept, in it."""
        rules = {name: rule.model_dump() for name, rule in self.rules.items()}
        value = {"version": VERSION, "splits": self.config.splits, "rules": rules, "manifest": manifest.hash}
        return storage.join(manifest.place, f"views/{self.name}-{_sha256(value)[:16]}.json")

    def resolve(self, manifest: Manifest, scan: bool | None = None) -> ResolvedView:
        """The view with absolute thresholds for a dataset: as stored in it, or from its index, and stored then.

        Args:
            manifest: the dataset.
            scan: whether the index may be read for thresholds, which must be stored then; None: up to `SCAN_LIMIT` clips,
                and a dataset that cannot be written stays as it is.

        Raises:
            DataError: a score is missing where it must not be, no clip has it, or the dataset is too large to be scanned here.
        """
        if all(rule.min_quantile is None and rule.max_quantile is None for rule in self.rules.values()):
            return self._resolved({name: (rule.min, rule.max) for name, rule in self.rules.items()}, 0.0)
        place = self.stored_place(manifest)
        stored = _read_stored(place, list(self.rules))
        if stored is not None:
            return self._resolved(*stored)
        num_clips = int(sum(manifest.num_clips(split).sum() for split in SPLITS))
        if scan is False or (scan is None and num_clips > SCAN_LIMIT):
            at = storage.redacted(manifest.place)
            raise DataError(
                f"the view {self.name!r} has quantiles, and its thresholds for {at} ({num_clips:,} clips) are not stored yet; "
                f"compute them once with `videofm data view {self.name}.yaml {at}`"
            )
        sample = self.sample(manifest)
        bounds = {name: self._bounds(name, rule, sample.values(name)) for name, rule in self.rules.items()}
        value = {
            "version": VERSION, "view": self.name, "manifest": manifest.hash, "splits": self.config.splits,
            "num_clips": sample.num_rows, "rank_error": sample.rank_error, "bounds": bounds,
        }  # fmt: skip
        try:
            storage.put_new(place, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
        # The thresholds are a function of the dataset: where they cannot be kept, each reader computes the same.
        except DataError:
            if scan is True:
                raise
        except OSError as error:
            if scan is True:
                raise DataError(
                    f"the thresholds of view {self.name!r} cannot be stored in {storage.redacted(place)}: {error.strerror}; "
                    "make the dataset writable, with room on its disk"
                ) from None
        return self._resolved(bounds, sample.rank_error)

    def sample(self, manifest: Manifest, size: int = NUM_EXACT) -> RowSample:
        """The numbers of all rules over the clips of the view's splits, a column a rule."""
        sample = RowSample(list(self.rules), size)
        plain = self._resolved(dict.fromkeys(self.rules, (None, None)), 0.0)
        absent = dict.fromkeys(self.rules, 0)
        for table in tables(manifest, ["key", *plain.columns]):
            table = table.filter(pyarrow.array(in_splits(table, plain.splits)))
            columns: Columns = {rule.name: number(table, rule.score, rule.field) for rule in plain.rules}
            for name, values in columns.items():
                absent[name] += int(np.isnan(values).sum())
            sample.add(table["key"].to_pylist(), columns)
        for name, rule in self.rules.items():
            if rule.missing == "error" and absent[name]:
                raise DataError(missing_message(name, rule.about, absent[name], sample.num_rows))
        return sample

    def _bounds(
        self, name: str, rule: ViewRuleConfig, values: np.ndarray[Any, np.dtype[np.float64]]
    ) -> tuple[float | None, float | None]:
        if not len(values):
            raise DataError(
                f"rule {name!r} of view {self.name!r} takes a quantile of {rule.about!r}, but no clip of the splits "
                f"{', '.join(self.config.splits)} has that score; measure it in curation, or leave the rule out"
            )
        low = rule.min if rule.min_quantile is None else lower_bound(values, rule.min_quantile)
        high = rule.max if rule.max_quantile is None else upper_bound(values, rule.max_quantile)
        return low, high

    def _resolved(self, bounds: Bounds, rank_error: float) -> ResolvedView:
        rules = tuple(ResolvedRule(n, rule.score, rule.field, *bounds[n], rule.missing) for n, rule in self.rules.items())
        return ResolvedView(self.name, tuple(self.config.splits), rules, rank_error)


def tables(manifest: Manifest, columns: Sequence[str]) -> Iterator[pyarrow.Table]:
    """The index of a dataset, a shard at a time: the named columns; a score that a shard does not have is absent."""
    for shard in range(len(manifest.table)):
        yield manifest.read_shard(shard, columns)


def _read_stored(place: str, rules: list[str]) -> tuple[Bounds, float] | None:
    """Thresholds and rank error as stored at `place`; None where nothing is."""
    try:
        content = storage.read_bytes(place)
    except MissingError:
        return None
    try:
        value = json.loads(content)
        bounds = {name: (_bound(value["bounds"][name][0]), _bound(value["bounds"][name][1])) for name in rules}
        return bounds, float(value["rank_error"])
    except (ValueError, TypeError, KeyError, IndexError):
        raise DataError(f"{storage.redacted(place)} is damaged; delete it, it is computed again") from None


def _bound(value: Any) -> float | None:
    return None if value is None else float(value)


def number(table: pyarrow.Table, score: str | None, field: str | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A score or a fact of each row, float64 `(rows,)`; NaN where there is none."""
    if score is not None:
        name = f"score_{score}"
        return _floats(table[name]) if name in table.column_names else np.full(len(table), np.nan)
    if field == "duration":
        return _floats(table["num_frames"]) / _floats(table["fps"])
    if field == "aspect":
        return _floats(table["width"]) / _floats(table["height"])
    if field == "pixels":
        return _floats(table["width"]) * _floats(table["height"])
    if field == "caption_length":
        return _floats(pyarrow.compute.utf8_length(table["caption"]))
    return _floats(table[FACT_COLUMNS[str(field)][0]])


def in_splits(table: pyarrow.Table, splits: Sequence[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows belong to one of `splits`."""
    found = pyarrow.compute.is_in(table["split"], value_set=pyarrow.array(list(splits), pyarrow.string()))
    return np.array(found.to_numpy(zero_copy_only=False), bool)


def missing_message(rule: str, score: str, num_missing: int, num_clips: int) -> str:
    """What to do about clips without a score."""
    return (
        f"rule {rule!r} of the view: {num_missing:,} of {num_clips:,} clips have no score {score!r}. A missing score never "
        "passes by itself: measure it in curation, or set `missing: drop` or `missing: keep` in the rule"
    )


def _floats(column: pyarrow.ChunkedArray) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(column.cast(pyarrow.float64()).to_numpy(zero_copy_only=False), np.float64)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
