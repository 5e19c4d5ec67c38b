"""`videofm dpo annotate` from outside: wrong requests are told before anything is served."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.annotate_candidates import write_candidates
from videofm.annotate.pool import open_store
from videofm.annotate.serve import listen
from videofm.annotate.store import Vote
from videofm.cli import main
from videofm.data.preferences import read_preferences


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_candidates(tmp_path_factory.mktemp("run") / "candidates", num_candidates=2)


def annotate(*arguments: object) -> int:
    return main(["dpo", "annotate", *map(str, arguments)])


def test_what_is_told_before_anything_is_served(candidates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single = write_candidates(tmp_path / "single", num_candidates=1)
    store = ("--store", tmp_path / "votes.sqlite")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, code, match in [
            ((tmp_path / "nowhere",), 1, "the folder of shards"),
            ((single, *store), 1, "there is nothing to compare. Make two or more candidates"),
            ((candidates, *store, "--port", port), 2, f"port {port} of 127.0.0.1 is in use by another program"),
            ((candidates, *store, "--port", 70000), 2, "--port is 70000; ports go from 0"),
            ((candidates, *store, "--host", "no such host"), 2, "--host no such host is no address to listen on"),
            ((candidates, *store, "--host", "192.0.2.1"), 2, "cannot listen on 192.0.2.1"),
            ((candidates, *store, "--host", "0.0.0.0", "--token", "short"), 2, "--token has 5 characters; it needs 16"),
            ((candidates, *store, "--annotator", "<b>"), 2, "--annotator: '<b>' cannot be a name"),
            ((candidates, *store, "--overlap", 2), 2, "--overlap is 2.0; it is a share of the pairs, 0 to 1"),
            ((candidates, *store, "--on-contradiction", "tie"), 2, "--on-contradiction is about --export"),
            (
                (candidates, *store, "--export", tmp_path / "out", "--annotator", "ana"),
                2,
                "--annotator: this is about the page",
            ),
            ((candidates, *store, "--agreement", "--port", 80, "--host", "::1"), 2, "--port, --host: this is about the page"),
            ((candidates, "--store", tmp_path / "none.sqlite", "--agreement"), 1, "there are no votes yet"),
            ((candidates, "--store", tmp_path / "none.sqlite", "--export", tmp_path / "out"), 1, "there are no votes yet"),
        ]:
            found = annotate(*arguments)
            assert (found, match in (said := capsys.readouterr().err)) == (code, True), said


def test_missing_packages_are_named(
    candidates: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else real(name))
    assert annotate(candidates) == 2
    assert 'the page needs uvicorn, which is not installed: pip install "videofm[annotate]"' in capsys.readouterr().err


def test_help_is_worth_reading(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        annotate("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "usage: videofm dpo annotate" in text
    assert "examples:" in text and "exit codes:" in text and "--on-contradiction" in text


@pytest.mark.parametrize(
    ("options", "start", "token"),
    [
        ({}, "http://127.0.0.1:", False),
        ({"host": "localhost", "token": "x" * 16}, "http://localhost:", True),
        ({"host": "0.0.0.0"}, f"http://{socket.gethostname()}:", True),
        ({"host": "0.0.0.0", "names": ["gpu7.example.org"]}, "http://gpu7.example.org:", True),
    ],
    ids=["loopback", "token", "all", "named"],
)
def test_addresses(candidates: Path, tmp_path: Path, options: dict[str, Any], start: str, token: bool) -> None:
    """Whoever listens for others has a token, made anew each time, in every address."""
    pool, store = open_store(candidates, tmp_path / "votes.sqlite")
    servers = [listen(candidates, pool, store, annotators=["ana", "Ben B"], **options) for _ in range(2)]
    try:
        for server in servers:
            assert [address.startswith(start) for address in server.addresses] == [True, True]
            assert ["token=" in address for address in server.addresses] == [token, token]
            assert "annotator=ana" in server.addresses[0] and "annotator=Ben+B" in server.addresses[1]
        if token and "token" not in options:
            assert servers[0].access.token != servers[1].access.token
    finally:
        for server in servers:
            server.socket.close()
        store.close()


def test_votes_become_preferences_and_agreement(candidates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Votes lie beside the candidates; one is contradictory, and the command says what became of it."""
    pool, store = open_store(candidates, candidates / "annotations" / "votes.sqlite")
    for name, choice in (("ana", "first"), ("ben", "second")):
        store.join(name, range(len(pool.pairs)))
        shown = store.current(name)
        assert shown is not None
        store.vote(Vote(f"vote-{name}", name, "", choice, {}, "first", 1.0, 2.0), shown.number)
    store.close()
    assert pool.num_shared == 1, "one of three pairs is for all: 0.2 of them, rounded"
    assert annotate(candidates, "--agreement") == 0
    assert "ana and ben: 1 pairs, 0% alike, Cohen's kappa 0.000" in capsys.readouterr().out
    assert annotate(candidates, "--export", tmp_path / "out") == 1
    assert "the votes on 1 pairs contradict each other" in capsys.readouterr().err
    assert annotate(candidates, "--export", tmp_path / "out", "--on-contradiction", "tie") == 0
    assert "1 contradictory pairs written as ties" in capsys.readouterr().out
    assert [pair.tie for pair in read_preferences(tmp_path / "out").pairs] == [True]
