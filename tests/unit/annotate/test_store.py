"""The store of votes: nothing that was answered is lost, and nothing is taken twice."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from videofm.annotate import store as module
from videofm.annotate.store import Refused, Settings, Store, Vote
from videofm.errors import ConfigError, DataError

SETTINGS = Settings("hash", 0, 0.2, None, ("motion",))
PAIRS = [("a", True), ("b", False), ("c", False)]

KILLED = """
import sys
from pathlib import Path
from tests.unit.annotate.test_store import opened, said
store = opened(Path(sys.argv[1]), [(f"p{i}", True) for i in range(5000)])
store.join("ana", range(5000))
while (shown := store.current("ana")) is not None:
    store.vote(said("ana", f"vote-{shown.number:05d}"), shown.number)
    print(f"vote-{shown.number:05d}", flush=True)
"""
"""Votes as fast as it can, and says each vote once it was taken."""


def opened(path: Path, pairs: list[tuple[str, bool]] = PAIRS, settings: Settings = SETTINGS) -> Store:
    return Store.create(path, settings, pairs)


def said(annotator: str, client_id: str, choice: str = "first", axes: dict[str, str] | None = None) -> Vote:
    return Vote(client_id, annotator, "", choice, axes or {}, "first", 1.0, 2.0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return opened(tmp_path / "votes.sqlite")


def test_every_commit_is_flushed(store: Store) -> None:
    """synchronous = 2 is FULL: SQLite syncs the log at each commit."""
    assert store._rows("PRAGMA journal_mode") == [("wal",)]
    assert store._rows("PRAGMA synchronous") == [(2,)]


def test_votes_outlive_a_kill(tmp_path: Path) -> None:
    """A process is killed while it votes: each vote that it had acknowledged is there, and at most one more."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "votes.sqlite")]
    root = str(Path(__file__).parents[3])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root})
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().strip() for _ in range(40)]
    process.kill()
    acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
    assert process.wait() == -9 and len(acknowledged) >= 40
    store = Store.read(tmp_path / "votes.sqlite")
    found = [vote.client_id for vote in store.votes()]
    assert found[: len(acknowledged)] == acknowledged and len(found) <= len(acknowledged) + 1
    shown = store.current("ana")
    assert shown is not None and shown.number == len(found), "the queue goes on behind the last vote"


def test_a_pair_stays_until_it_is_voted_on(store: Store) -> None:
    store.join("ana", [1, 0, 2])
    first = store.current("ana")
    assert first is not None and first.number == 1 and store.current("ana") == first
    store.vote(said("ana", "v1"), 1)
    second = store.current("ana")
    assert second is not None and second.number == 0
    assert store.progress("ana").num_done == 1 and store.progress("ana").num_pairs == 3


def test_own_pairs_go_to_one_annotator_and_shared_ones_to_all(store: Store) -> None:
    """Both have the order 0, 1, 2 with 0 shared: ana takes 1, so ben is shown 2 next, and then nothing is left for either."""
    seen: dict[str, list[int]] = {"ana": [], "ben": []}
    for name in seen:
        store.join(name, [0, 1, 2])
    for turn in range(3):
        for name, numbers in seen.items():
            if (shown := store.current(name)) is not None:
                numbers.append(shown.number)
                store.vote(said(name, f"{name}-{turn}"), shown.number)
    assert seen == {"ana": [0, 1], "ben": [0, 2]}
    assert store.progress("ana").num_pairs == 2 == store.progress("ana").num_done


def test_a_vote_twice_is_taken_once(store: Store) -> None:
    store.join("ana", [0, 1, 2])
    store.current("ana")
    for _ in range(2):
        store.vote(said("ana", "v1"), 0)
    assert len(store.votes()) == 1
    with pytest.raises(Refused, match="the vote v1 was taken before with other contents"):
        store.vote(said("ana", "v1", "second"), 0)
    with pytest.raises(Refused, match="you voted on it in another window"):
        store.vote(said("ana", "v2"), 0)


def test_undo_brings_the_pair_back_and_keeps_the_trace(store: Store) -> None:
    store.join("ana", [1, 2, 0])
    store.current("ana")
    store.vote(said("ana", "v1", "tie", {"motion": "first"}), 1)
    store.current("ana")
    for _ in range(2):  # the answer may get lost: the same request again changes nothing
        store.undo("ana", "u1")
    shown = store.current("ana")
    assert shown is not None and shown.number == 1 and store.votes() == []
    store.vote(said("ana", "v2", "second"), 1)
    assert [(vote.client_id, vote.choice) for vote in store.votes()] == [("v2", "second")]
    assert store._rows("SELECT client_id, undone IS NULL FROM votes ORDER BY id") == [("v1", 0), ("v2", 1)]


def test_undo_goes_back_step_by_step(store: Store) -> None:
    store.join("ana", [0, 1, 2])
    for turn in range(3):
        store.current("ana")
        store.vote(said("ana", f"v{turn}"), turn)
    assert store.current("ana") is None
    for turn in (2, 1, 0):
        store.undo("ana", f"u{turn}")
        shown = store.current("ana")
        assert shown is not None and shown.number == turn
    with pytest.raises(Refused, match="there is no vote to undo"):
        store.undo("ana", "u3")


def test_a_skipped_pair_is_free_for_others(store: Store) -> None:
    store.join("ana", [1, 2, 0])
    store.join("ben", [1, 2, 0])
    store.current("ana")
    store.vote(said("ana", "s1", "skip"), 1)
    shown = store.current("ben")
    assert shown is not None and shown.number == 1
    with pytest.raises(Refused, match="has gone to another annotator"):
        store.undo("ana", "u1")


def test_threads_and_processes_claim_no_pair_twice(tmp_path: Path) -> None:
    """Four threads, two connections, 200 pairs of one annotator each: every pair is voted on once, by somebody."""
    pairs = [(f"p{i}", False) for i in range(200)]
    stores = [opened(tmp_path / "votes.sqlite", pairs) for _ in range(2)]
    failures: list[BaseException] = []

    def work(name: str, store: Store) -> None:
        try:
            store.join(name, range(200))
            while (shown := store.current(name)) is not None:
                store.vote(said(name, f"{name}-{shown.number:05d}"), shown.number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"n{i}", stores[i % 2])) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(vote.pair_id for vote in stores[0].votes()) == sorted(name for name, _ in pairs)


def test_a_full_disk_costs_the_vote_that_failed_and_nothing_else(store: Store) -> None:
    """SQLite is given no page more than it has, so that a long vote does not fit; with room again, everything goes on."""
    store.join("ana", [0, 1, 2])
    store.current("ana")
    store.vote(said("ana", "v1"), 0)
    pages = store._rows("PRAGMA page_count")[0][0]
    store._rows(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.vote(said("ana", "x" * 20_000), 1)
    store._rows("PRAGMA max_page_count = 100000")
    assert [vote.client_id for vote in store.votes()] == ["v1"]
    store.vote(said("ana", "v2"), 1)
    assert [vote.client_id for vote in store.votes()] == ["v1", "v2"]


def test_who_has_not_joined_is_refused(store: Store) -> None:
    with pytest.raises(Refused, match="'eva' has not joined"):
        store.current("eva")
    with pytest.raises(Refused, match="not the one on your desk"):
        store.vote(said("eva", "v1"), 0)


def test_a_store_is_for_its_settings_and_pairs(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    secret = opened(path).secret()
    assert opened(path).secret() == secret and len(secret) == 32
    with pytest.raises(ConfigError, match=r"begun with other settings: seed 0, asked for 5\. Leave the option away"):
        opened(path, settings=replace(SETTINGS, seed=5))
    with pytest.raises(DataError, match="are not those of these candidates"):
        opened(path, PAIRS[:2])
    with pytest.raises(DataError, match="about other candidates: the dataset has changed since they were begun"):
        opened(path, settings=replace(SETTINGS, dataset="another"))


def test_what_is_no_store_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no votes yet"):
        Store.read(tmp_path / "none.sqlite")
    (tmp_path / "text").write_text("no database, " * 100)
    with pytest.raises(DataError, match="is no file of votes"):
        Store.read(tmp_path / "text")
    with sqlite3.connect(tmp_path / "foreign.sqlite") as foreign:
        foreign.execute("CREATE TABLE mine (x)")
    before = (tmp_path / "foreign.sqlite").read_bytes()
    with pytest.raises(DataError, match="is no file of votes .it holds tables of something else"):
        opened(tmp_path / "foreign.sqlite")
    assert (tmp_path / "foreign.sqlite").read_bytes() == before
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    assert not Store.read(tmp_path / "empty.sqlite").begun and opened(tmp_path / "empty.sqlite").begun
    sqlite3.connect(tmp_path / "empty.sqlite").execute("DELETE FROM settings").connection.commit()
    with pytest.raises(DataError, match="holds no settings"):
        _ = Store.read(tmp_path / "empty.sqlite").settings


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    opened(path).close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {len(module.MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(DataError, match="has schema version 2, and this videofm reads up to 1; use the newer one"):
        Store.read(path)


def test_a_migration_is_done_once_and_keeps_the_votes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of this version is opened by one that knows a step more; a step that fails leaves the file as it was."""
    path = tmp_path / "votes.sqlite"
    before = opened(path)
    before.join("ana", [0, 1, 2])
    before.current("ana")
    before.vote(said("ana", "v1"), 0)
    before.close()
    with monkeypatch.context() as patch:
        patch.setattr(module, "MIGRATIONS", (*module.MIGRATIONS, "CREATE TABLE extra (x); SELECT broken FROM nowhere"))
        with pytest.raises(DataError, match="could not be brought from schema version 1 to 2"):
            Store.read(path)
    assert opened(path)._rows("SELECT name FROM sqlite_master WHERE name = 'extra'") == []
    monkeypatch.setattr(module, "MIGRATIONS", (*module.MIGRATIONS, "ALTER TABLE votes ADD COLUMN note TEXT"))
    for _ in range(2):
        after = Store.read(path)
        assert after._rows("SELECT client_id, note FROM votes") == [("v1", None)]
        assert after._rows("PRAGMA user_version") == [(2,)]
