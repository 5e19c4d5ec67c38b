"""From a folder of candidates to what is judged: the pool of pairs, and the file of votes on it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from videofm.annotate.queue import Pool, pool_of
from videofm.annotate.store import Settings, Store
from videofm.data.candidates import read_candidates
from videofm.data.manifest import Manifest
from videofm.errors import ConfigError, DataError
from videofm.run_dir import RunDirectory

_AXIS = re.compile(r"[a-z][a-z0-9_]{0,23}")
DEFAULT_STORE = "annotations/votes.sqlite"
"""Where votes are kept, below the folder of candidates."""


@dataclass(frozen=True)
class Wishes:
    """What was asked for; None: what the store has, or the default."""

    seed: int | None = None
    overlap: float | None = None
    num_pairs: int | None = None
    axes: tuple[str, ...] | None = None


DEFAULTS = Settings(dataset="", seed=0, overlap=0.2, num_pairs=None, axes=())


def store_path(candidates: Path, given: str | None) -> Path:
    """The file of votes."""
    return Path(given) if given is not None else candidates / DEFAULT_STORE


def open_store(candidates: Path, path: Path, wishes: Wishes = Wishes()) -> tuple[Pool, Store]:
    """The pool of the candidates and the store of votes on it, made or taken up again.

    Raises:
        ConfigError: a wish is out of range, or the store was begun with another.
        DataError: there is nothing to compare, the candidates are not those of the store, or they are still being made and the
            store is new.
    """
    before = None
    if path.is_file():
        opened = Store.read(path)
        before = opened.settings if opened.begun else None  # its making may have been cut short
        opened.close()
    if before is None:
        _refuse_unfinished(candidates)  # before its manifest is read: what is finished now stays as it is
    manifest = Manifest.load(candidates)
    said = {name: value for name, value in vars(wishes).items() if value is not None}
    settings = Settings(**{**vars(before or DEFAULTS), "dataset": manifest.hash, **said})
    if not 0 <= settings.overlap <= 1:
        raise ConfigError(f"--overlap is {settings.overlap}; it is a share of the pairs, 0 to 1")
    if wrong := [axis for axis in settings.axes if not _AXIS.fullmatch(axis)]:
        raise ConfigError(f"--axes has {wrong[0]!r}; a name of an axis has up to 24 small letters, digits and _")
    if len(set(settings.axes)) < len(settings.axes):
        raise ConfigError(f"--axes has one name twice: {', '.join(settings.axes)}")
    if settings.num_pairs is not None and settings.num_pairs < 1:
        raise ConfigError(f"--num-pairs is {settings.num_pairs}; it is at least 1")
    pool = pool_of(read_candidates(manifest), num_pairs=settings.num_pairs, overlap=settings.overlap, seed=settings.seed)
    return pool, Store.create(path, settings, [(pair.pair_id, pair.shared) for pair in pool.pairs])


def _refuse_unfinished(candidates: Path) -> None:
    """Votes are about one state of a dataset. A run that is not finished will commit more shards, and then its votes could
    neither be taken up again nor exported."""
    run = RunDirectory(candidates)
    if run.fingerprint is None or run.finished:
        return
    outcome = run.outcome
    state = "no outcome yet: it is running, or was killed" if outcome is None else outcome["state"]
    raise DataError(
        f"{candidates} is a run that is not finished ({state}); votes that are begun now are lost with its next shard of "
        "candidates. Let it finish first (the same command goes on with a run that was stopped), then vote"
    )
