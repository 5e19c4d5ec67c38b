"""The votes: one SQLite file, written ahead and flushed at each commit, so that what was answered outlives a crash.

One table of votes is all the truth about them: an undone vote stays in it, with the time. A pair that not all annotators see
belongs to whoever it was shown to first; a skipped one is free again. All changes of one request are one transaction.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from videofm.errors import ConfigError, DataError

CHOICES = ("first", "second", "tie", "both_bad", "skip")
"""What a vote says about the two candidates of a pair, whatever side they were on."""
AXIS_CHOICES = ("first", "second", "tie")

MIGRATIONS = (
    """
    CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE keys (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE annotators (name TEXT PRIMARY KEY, joined REAL NOT NULL, current INTEGER, opened REAL) WITHOUT ROWID;
    CREATE TABLE pairs (
        number INTEGER PRIMARY KEY, pair_id TEXT NOT NULL UNIQUE, shared INTEGER NOT NULL, owner TEXT REFERENCES annotators
    );
    CREATE TABLE queue (
        annotator TEXT NOT NULL REFERENCES annotators, position INTEGER NOT NULL, pair INTEGER NOT NULL REFERENCES pairs,
        handled INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (annotator, position)
    ) WITHOUT ROWID;
    CREATE UNIQUE INDEX queue_pair ON queue (annotator, pair);
    CREATE INDEX queue_open ON queue (annotator, position) WHERE handled = 0;
    CREATE TABLE votes (
        id INTEGER PRIMARY KEY, client_id TEXT NOT NULL UNIQUE, annotator TEXT NOT NULL REFERENCES annotators,
        pair INTEGER NOT NULL REFERENCES pairs, choice TEXT NOT NULL, axes TEXT NOT NULL, left_side TEXT NOT NULL,
        opened REAL NOT NULL, voted REAL NOT NULL, undone REAL, undone_by TEXT UNIQUE,
        CHECK (choice IN ('first', 'second', 'tie', 'both_bad', 'skip')), CHECK (left_side IN ('first', 'second'))
    );
    CREATE UNIQUE INDEX votes_standing ON votes (annotator, pair) WHERE undone IS NULL;
    """,
)
"""Step n takes a file of schema version n to n + 1. Steps that were released are never changed."""

_OPEN = """FROM queue JOIN pairs ON pairs.number = queue.pair
    WHERE queue.annotator = :name AND handled = 0 AND (shared OR owner IS NULL OR owner = :name)"""


class Refused(DataError):
    """A request of an annotator that cannot be done as things stand. `status` is the code of HTTP for it."""

    def __init__(self, message: str, status: int = 409) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Settings:
    """What a store was made for; it does not change.

    Attributes:
        dataset: hash of the manifest of the candidates.
        seed: of pool, orders and sides.
        overlap: share of pairs that all annotators see.
        num_pairs: at most so many pairs; None: all.
        axes: names of what is judged besides the whole; may be none.
    """

    dataset: str
    seed: int
    overlap: float
    num_pairs: int | None
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Vote:
    """What an annotator said. `axes`: axis -> one of `AXIS_CHOICES`; times are seconds since 1970, UTC."""

    client_id: str
    annotator: str
    pair_id: str
    choice: str
    axes: dict[str, str]
    left: str
    opened: float
    voted: float


@dataclass(frozen=True)
class Shown:
    """The pair that an annotator is to judge now, by its number in the pool."""

    number: int
    opened: float


@dataclass(frozen=True)
class Progress:
    """Pairs that an annotator has dealt with, and those with what is left for him; `last` is his last choice that stands."""

    num_done: int
    num_pairs: int
    last: str | None


class Store:
    """An open store; `create` or `read` open one. It may be used by several threads."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection, self._lock = connection, threading.Lock()

    @classmethod
    def create(cls, path: Path, settings: Settings, pairs: Sequence[tuple[str, bool]]) -> Store:
        """The store at `path`, made or taken up again.

        Args:
            path: the file.
            settings: what it is for.
            pairs: id of each pair of the pool, and whether all annotators see it.

        Raises:
            ConfigError: the file was made with other settings.
            DataError: it is no store, or of a newer version, or of other pairs.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        store = cls(path, _connect(path))
        with store._transaction() as db:
            if not db.execute("SELECT 1 FROM settings").fetchone():
                rows = [(name, json.dumps(value)) for name, value in asdict(settings).items()]
                db.executemany("INSERT INTO settings VALUES (?, ?)", rows)
                db.execute("INSERT INTO keys VALUES ('secret', ?)", (secrets.token_hex(32),))
                db.executemany(
                    "INSERT INTO pairs (number, pair_id, shared) VALUES (?, ?, ?)",
                    [(number, pair_id, shared) for number, (pair_id, shared) in enumerate(pairs)],
                )
        store._check(settings, pairs)
        return store

    @classmethod
    def read(cls, path: Path) -> Store:
        """The store that exists at `path`.

        Raises:
            DataError: there is none, or it is damaged, or of a newer version.
        """
        if not path.is_file():
            raise DataError(f"there are no votes yet: {path} does not exist. `videofm dpo annotate CANDIDATES` collects some")
        return cls(path, _connect(path))

    def close(self) -> None:
        """Close the file; what was answered is on disk already."""
        with self._lock:
            self._connection.close()

    @property
    def settings(self) -> Settings:
        """What the store is for."""
        rows = {name: json.loads(value) for name, value in self._rows("SELECT name, value FROM settings")}
        if set(rows) != set(Settings.__dataclass_fields__):
            raise DataError(f"{self.path} holds no settings of a store of votes; take the file that `dpo annotate` wrote")
        return Settings(**{**rows, "axes": tuple(rows["axes"])})

    def secret(self) -> bytes:
        """A random key that belongs to this file: what it signs stays valid when the server starts again."""
        return bytes.fromhex(self._rows("SELECT value FROM keys WHERE name = 'secret'")[0][0])

    # -- annotators and their queues

    def annotators(self) -> list[str]:
        """The names, in order of their first visit."""
        return [name for (name,) in self._rows("SELECT name FROM annotators ORDER BY joined, name")]

    def join(self, annotator: str, order: Sequence[int]) -> None:
        """Give `annotator` a queue: the numbers of pairs in his order. Nothing happens where he has one."""
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM annotators WHERE name = ?", (annotator,)).fetchone():
                return
            db.execute("INSERT INTO annotators (name, joined) VALUES (?, ?)", (annotator, time.time()))
            rows = [(annotator, position, number) for position, number in enumerate(order)]
            db.executemany("INSERT INTO queue (annotator, position, pair) VALUES (?, ?, ?)", rows)

    def current(self, annotator: str) -> Shown | None:
        """The pair that he is to judge: the same one until he has voted; None when nothing is left."""
        found = self._rows("SELECT current, opened FROM annotators WHERE name = ?", (annotator,))
        if not found:
            raise Refused(f"{annotator!r} has not joined: say the name on the page first", 403)
        if found[0][0] is not None:
            return Shown(*found[0])
        with self._transaction() as db:
            return self._advance(db, annotator)

    def progress(self, annotator: str) -> Progress:
        """How far he is."""
        with self._lock:
            db = self._connection
            done = db.execute("SELECT count(*) FROM votes WHERE annotator = ? AND undone IS NULL", (annotator,)).fetchone()[0]
            left = db.execute(f"SELECT count(*) {_OPEN}", {"name": annotator}).fetchone()[0]
            last = _last(db, annotator)
        return Progress(done, done + left, last["choice"] if last else None)

    # -- votes

    def vote(self, vote: Vote, number: int) -> None:
        """Take a vote on the pair `number` that is shown to the annotator; on disk when this returns. The same one twice (by
        `client_id`) is taken once.

        Raises:
            Refused: the pair is not the one that is shown to him, or the id was used for another vote.
        """
        assert vote.choice in CHOICES and set(vote.axes.values()) <= set(AXIS_CHOICES) and vote.left in ("first", "second")
        axes = json.dumps(vote.axes, sort_keys=True)
        with self._transaction() as db:
            before = db.execute("SELECT * FROM votes WHERE client_id = ?", (vote.client_id,)).fetchone()
            if before is not None:
                same = (before["annotator"], before["pair"], before["choice"], before["axes"])
                if same != (vote.annotator, number, vote.choice, axes):
                    raise Refused(f"the vote {vote.client_id} was taken before with other contents; each vote has its own id")
                return
            shown = db.execute("SELECT current FROM annotators WHERE name = ?", (vote.annotator,)).fetchone()
            if shown is None or shown["current"] != number:
                raise Refused("this pair is not the one on your desk: you voted on it in another window. Here is the next one")
            db.execute(
                "INSERT INTO votes (client_id, annotator, pair, choice, axes, left_side, opened, voted)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (vote.client_id, vote.annotator, number, vote.choice, axes, vote.left, vote.opened, vote.voted),
            )
            db.execute("UPDATE queue SET handled = 1 WHERE annotator = ? AND pair = ?", (vote.annotator, number))
            if vote.choice == "skip":
                db.execute("UPDATE pairs SET owner = NULL WHERE number = ?", (number,))
            self._advance(db, vote.annotator)

    def last_pair(self, annotator: str) -> int | None:
        """The number of the pair that he voted on last, of the votes that stand."""
        with self._lock:
            last = _last(self._connection, annotator)
        return last["pair"] if last else None

    def undo(self, annotator: str, client_id: str) -> None:
        """Take the annotator's last vote back and show its pair to him again. The same request twice does it once.

        Raises:
            Refused: there is nothing to undo, or he skipped the pair and another annotator has it now.
        """
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM votes WHERE undone_by = ?", (client_id,)).fetchone():
                return
            last = _last(db, annotator)
            if last is None:
                raise Refused("there is no vote to undo")
            owner, shared = db.execute("SELECT owner, shared FROM pairs WHERE number = ?", (last["pair"],)).fetchone()
            if not shared and owner not in (None, annotator):
                raise Refused("the pair that you skipped has gone to another annotator; it cannot come back")
            now = time.time()
            db.execute("UPDATE votes SET undone = ?, undone_by = ? WHERE id = ?", (now, client_id, last["id"]))
            db.execute("UPDATE queue SET handled = 0 WHERE annotator = ? AND pair = ?", (annotator, last["pair"]))
            self._show(db, annotator, last["pair"], now)

    def votes(self) -> list[Vote]:
        """All votes that stand, skips too, in the order in which they came."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT votes.*, pair_id FROM votes JOIN pairs ON pairs.number = votes.pair WHERE undone IS NULL ORDER BY id"
            ).fetchall()
        return [
            Vote(
                row["client_id"], row["annotator"], row["pair_id"], row["choice"], json.loads(row["axes"]), row["left_side"],
                row["opened"], row["voted"],
            )
            for row in rows
        ]  # fmt: skip

    # -- inside a transaction

    @staticmethod
    def _show(db: sqlite3.Connection, annotator: str, number: int, now: float) -> None:
        """Put a pair on the annotator's desk; it is his from now on, unless all see it."""
        db.execute("UPDATE annotators SET current = ?, opened = ? WHERE name = ?", (number, now, annotator))
        db.execute("UPDATE pairs SET owner = ? WHERE number = ? AND NOT shared", (annotator, number))

    @classmethod
    def _advance(cls, db: sqlite3.Connection, annotator: str) -> Shown | None:
        """Show the first pair of his queue that is left, if any."""
        found = db.execute(f"SELECT queue.pair {_OPEN} ORDER BY position LIMIT 1", {"name": annotator}).fetchone()
        if found is None:
            db.execute("UPDATE annotators SET current = NULL, opened = NULL WHERE name = ?", (annotator,))
            return None
        now = time.time()
        cls._show(db, annotator, found["pair"], now)
        return Shown(found["pair"], now)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk may have ended it already
                    self._connection.execute("ROLLBACK")
                raise

    def _rows(self, query: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            return [tuple(row) for row in self._connection.execute(query, values).fetchall()]

    @property
    def begun(self) -> bool:
        """Whether it says what it is for."""
        return bool(self._rows("SELECT 1 FROM settings LIMIT 1"))

    def _check(self, settings: Settings, pairs: Sequence[tuple[str, bool]]) -> None:
        """The store is for these settings and pairs."""
        mine, asked = asdict(self.settings), asdict(settings)
        different = [f"{name} {mine[name]!r}, asked for {asked[name]!r}" for name in asked if mine[name] != asked[name]]
        if mine["dataset"] != asked["dataset"]:
            raise DataError(
                f"the votes in {self.path} are about other candidates: the dataset has changed since they were begun. Restore "
                "it, or begin another file of votes with --store FILE"
            )
        if different:
            raise ConfigError(
                f"the votes in {self.path} were begun with other settings: {'; '.join(different)}. Leave the option away to go "
                "on with them, or begin another file of votes with --store FILE"
            )
        stored = [
            (pair_id, bool(shared)) for pair_id, shared in self._rows("SELECT pair_id, shared FROM pairs ORDER BY number")
        ]
        if stored != list(pairs):
            raise DataError(f"the pairs in {self.path} are not those of these candidates; begin another file with --store FILE")


def _last(db: sqlite3.Connection, annotator: str) -> sqlite3.Row | None:
    """The last vote of an annotator that stands."""
    found: sqlite3.Row | None = db.execute(
        "SELECT * FROM votes WHERE annotator = ? AND undone IS NULL ORDER BY id DESC LIMIT 1", (annotator,)
    ).fetchone()
    return found


def _connect(path: Path) -> sqlite3.Connection:
    """An open file of votes of this version's schema; every commit is flushed to disk."""
    try:
        db = sqlite3.connect(path, timeout=30.0, isolation_level=None, check_same_thread=False)
        db.row_factory = sqlite3.Row
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and db.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise sqlite3.DatabaseError("it holds tables of something else")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
    except sqlite3.DatabaseError as error:
        raise DataError(f"{path} is no file of votes ({error}); take another with --store FILE") from None
    if version > len(MIGRATIONS):
        db.close()
        raise DataError(
            f"{path} has schema version {version}, and this videofm reads up to {len(MIGRATIONS)}; use the newer one of it"
        )
    for step in range(version, len(MIGRATIONS)):
        _migrate(db, path, step)
    return db


def _migrate(db: sqlite3.Connection, path: Path, step: int) -> None:
    """Take the file one version further, whole or not at all; another process may have been quicker."""
    try:
        db.execute("BEGIN IMMEDIATE")
        if db.execute("PRAGMA user_version").fetchone()[0] == step:
            for statement in MIGRATIONS[step].split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {step + 1}")
        db.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        db.close()
        raise DataError(f"{path} could not be brought from schema version {step} to {step + 1} ({error})") from None
