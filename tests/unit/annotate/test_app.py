"""The page over HTTP: who gets in, what a desk shows, what is taken as a vote, and videos in ranges."""

from __future__ import annotations

import json
import logging
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.annotate_candidates import write_candidates
from videofm.annotate import desk as desk_module
from videofm.annotate.access import Access, is_loopback
from videofm.annotate.app import HEADERS, application, ranged
from videofm.annotate.desk import Desk
from videofm.annotate.pool import Wishes, open_store
from videofm.annotate.store import Store
from videofm.data.shards import read_clip
from videofm.errors import ConfigError, DataError

TOKEN = "a-token-of-our-own"


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_candidates(tmp_path_factory.mktemp("candidates"))


@pytest.fixture
def desk(candidates: Path, tmp_path: Path) -> Desk:
    pool, store = open_store(candidates, tmp_path / "votes.sqlite", Wishes(overlap=0.5, axes=("motion",)))
    return Desk(candidates, pool, store, store.secret())


def browser(desk: Desk, token: str | None = None, host: str = "127.0.0.1") -> TestClient:
    access = Access(desk.store.secret(), token, host)
    return TestClient(application(desk, access), base_url="http://127.0.0.1:8000", raise_server_exceptions=False)


def post(client: TestClient, path: str, state: dict[str, Any], **body: Any) -> Any:
    body = {"annotator": state["annotator"], **body}
    return client.post(path, content=json.dumps(body), headers={"x-videofm-change": state["change"]})


def begin(client: TestClient, name: str = "ana") -> dict[str, Any]:
    """The first state of an annotator."""
    found: dict[str, Any] = post(client, "/api/name", client.get("/api/state").json(), name=name).json()
    return found


def vote(client: TestClient, state: dict[str, Any], choice: str, client_id: str, **more: Any) -> Any:
    return post(client, "/api/vote", state, pair=state["pair"]["id"], choice=choice, client_id=client_id, **more)


# -- what is shown


def test_a_name_is_asked_once_and_kept(desk: Desk) -> None:
    client = browser(desk)
    assert client.get("/api/state").json()["annotator"] is None
    state = begin(client)
    assert state["annotator"] == "ana" and client.get("/api/state").json()["pair"] == state["pair"]
    assert browser(desk).get("/api/state").json()["annotator"] is None, "another browser is asked"
    named = browser(desk)
    assert named.get("/?annotator=ben").status_code == 200
    assert named.get("/api/state").json()["annotator"] == "ben"
    led = browser(desk)  # by a link of another site: it may not choose who votes
    led.get("/?annotator=ben", headers={"sec-fetch-site": "cross-site"})
    assert led.get("/api/state").json()["annotator"] is None


def test_a_refused_name_in_the_address_leaves_nobody(desk: Desk) -> None:
    """Who opens the address of one who cannot vote is asked, also where somebody voted in this browser before: the next votes
    are not for him. Nor do votes of a page that was open before go on."""
    client = browser(desk)
    state = begin(client, "ana")
    assert client.get("/", params={"annotator": "<b>"}).status_code == 200
    assert client.get("/api/state").json()["annotator"] is None
    late = vote(client, state, "left", "client-00001")
    assert late.status_code == 403 and "nobody has said a name in this session" in late.json()["error"]
    assert desk.store.votes() == []
    begin(client, "ana")
    client.get("/", params={"annotator": "<b>"}, headers={"sec-fetch-site": "cross-site"})
    assert client.get("/api/state").json()["annotator"] == "ana", "a link of another site takes no name away"


def test_the_page_is_blind(desk: Desk) -> None:
    """Neither keys, hashes, sources nor seeds of any clip are in what the page is told."""
    client = browser(desk)
    text = json.dumps(begin(client))
    for candidate in [side for pair in desk.pool.pairs for side in (pair.first, pair.second)]:
        assert candidate.key not in text and candidate.record.sha256 not in text and candidate.record.source_id not in text
    assert "seed" not in text and str(desk.store.path) not in text and "first" not in text


def test_the_same_video_has_another_name_in_each_pair(desk: Desk) -> None:
    """All pairs of three candidates are seen: twice each, in names that are all different."""
    client = browser(desk)
    state, names = begin(client), []
    while state["pair"] is not None:
        names += state["pair"]["videos"]
        state = vote(client, state, "tie", f"client-{len(names):05d}").json()
    assert len(names) == 18 == len(set(names)) and state["num_done"] == 9


def test_votes_reach_the_store_as_candidates(desk: Desk) -> None:
    """Whatever is said to be better on a side is the candidate whose video that side played."""
    client = browser(desk)
    state, expected = begin(client), {}
    for turn in range(9):
        contents = [client.get(address).content for address in state["pair"]["videos"]]
        choice = ("left", "right")[turn % 2]
        expected[f"client-{turn:05d}"] = contents[turn % 2]
        state = vote(client, state, choice, f"client-{turn:05d}", axes={"motion": "left"}).json()
    pairs = {pair.pair_id: pair for pair in desk.pool.pairs}
    for taken in desk.store.votes():
        pair = pairs[taken.pair_id]
        better = pair.first if taken.choice == "first" else pair.second
        assert expected[taken.client_id] == desk._read(desk.pool.pairs.index(pair), taken.choice)
        assert better.record.size == len(expected[taken.client_id])
        assert taken.axes["motion"] == taken.left and taken.voted >= taken.opened


# -- what is refused


def test_a_vote_twice_is_one(desk: Desk) -> None:
    client = browser(desk)
    state = begin(client)
    first = vote(client, state, "left", "client-00001").json()
    assert vote(client, state, "left", "client-00001").json() == first
    assert len(desk.store.votes()) == 1
    other = vote(client, state, "right", "client-00001")
    assert other.status_code == 409 and "taken before with other contents" in other.json()["error"]
    late = vote(client, state, "right", "client-00002")
    assert late.status_code == 409 and "you voted on it in another window" in late.json()["error"]


@pytest.mark.parametrize(
    ("change", "status", "match"),
    [
        ({"pair": "0" * 32}, 404, "no pair on your desk has this id"),
        ({"pair": 7}, 404, "no pair on your desk has this id"),
        ({"pair": "\u00e9\ud800"}, 404, "no pair on your desk has this id"),
        ({"choice": ["left"]}, 400, "choice is ['left']"),
        ({"axes": {"motion": ["left"]}}, 400, "an axis says ['left']"),
        ({"choice": "first"}, 400, "choice is 'first'; it is one of left, right"),
        ({"axes": {"style": "left"}}, 400, "the axes here are motion"),
        ({"axes": {"motion": "up"}}, 400, "an axis says 'up'"),
        ({"axes": [1]}, 400, "axes is"),
        ({"client_id": "x"}, 400, "client_id is 'x'"),
        ({"annotator": "ben"}, 403, "this page was opened by 'ben', and the browser now votes as 'ana'"),
    ],
)
def test_what_is_no_vote_is_told(desk: Desk, change: dict[str, Any], status: int, match: str) -> None:
    client = browser(desk)
    state = begin(client)
    body = {"pair": state["pair"]["id"], "choice": "left", "client_id": "client-00001", "axes": {}} | change
    answer = post(client, "/api/vote", state, **body)
    assert (answer.status_code, match in answer.json()["error"]) == (status, True), answer.text
    assert desk.store.votes() == []


def test_a_pair_of_another_annotator_is_unknown(desk: Desk) -> None:
    ana, ben = browser(desk), browser(desk)
    of_ana, of_ben = begin(ana, "ana"), begin(ben, "ben")
    answer = post(ben, "/api/vote", of_ben, pair=of_ana["pair"]["id"], choice="left", client_id="client-00001")
    assert answer.status_code == 404
    assert ben.get(of_ana["pair"]["videos"][0]).status_code == 404, "nor are its videos"
    assert ana.get(of_ana["pair"]["videos"][0]).status_code == 200


def test_changes_need_the_key_of_the_session(desk: Desk) -> None:
    client = browser(desk)
    state = begin(client)
    for headers in ({}, {"x-videofm-change": "0" * 64}, {"x-videofm-change": begin(browser(desk))["change"]}):
        answer = client.post("/api/vote", json={}, headers=headers)
        assert answer.status_code == 403 and "does not come from the page of this session" in answer.json()["error"]
    bare = browser(desk).post("/api/vote", json={}, headers={"x-videofm-change": state["change"]})
    assert bare.status_code == 403, "the key without its cookie"
    other = browser(desk)
    state_of_other = other.get("/api/state").json()
    answer = other.post("/api/undo", json={}, headers={"x-videofm-change": state_of_other["change"]})
    assert answer.status_code == 403 and "nobody has said a name" in answer.json()["error"]


def test_bodies_are_small_json_objects(desk: Desk) -> None:
    client = browser(desk)
    headers = {"x-videofm-change": begin(client)["change"]}
    long = b'{"a": "' + b"x" * 20_000 + b'"}'
    for content, status in ((b"[1]", 400), (b"{", 400), (b"[" * 8000, 400), (b"\xff", 400), (long, 413)):
        assert client.post("/api/vote", content=content, headers=headers).status_code == status


@pytest.mark.parametrize("name", ["", "   ", "x" * 41, "<b>", "a\0b", "../x", "-x"])
def test_what_cannot_be_a_name(desk: Desk, name: str) -> None:
    client = browser(desk)
    answer = post(client, "/api/name", client.get("/api/state").json(), name=name)
    assert answer.status_code == 400 and "cannot be a name" in answer.json()["error"]
    assert client.get("/", params={"annotator": name}).status_code == 200, "the page then asks"
    assert client.get("/api/state").json()["annotator"] is None


def test_only_named_annotators_where_some_are_named(candidates: Path, desk: Desk) -> None:
    closed = Desk(candidates, desk.pool, desk.store, desk.store.secret(), ["Ana ", "ben"])
    client = browser(closed)
    state = client.get("/api/state").json()
    assert state["names"] == ["Ana", "ben"]
    answer = post(client, "/api/name", state, name="eva")
    assert answer.status_code == 403 and "'eva' is not one of the annotators here: Ana, ben" in answer.json()["error"]


def test_a_browser_that_voted_under_another_name_is_asked_again(candidates: Path, desk: Desk) -> None:
    """Its cookie is of an earlier start of the same votes, which anybody could join."""
    before, closed = browser(desk), Desk(candidates, desk.pool, desk.store, desk.store.secret(), ["ana", "ben"])
    state = begin(before, "eva")
    client = browser(closed)
    client.cookies = before.cookies
    refused = vote(client, state, "left", "client-00001")
    assert refused.status_code == 403 and "nobody has said a name in this session" in refused.json()["error"]
    assert client.get(state["pair"]["videos"][0]).status_code == 403 and desk.store.votes() == []
    client.get("/")
    asked = client.get("/api/state").json()
    assert (asked["annotator"], asked["names"], "pair" in asked) == (None, ["ana", "ben"], False)
    assert begin(client, "ben")["annotator"] == "ben" == client.get("/api/state").json()["annotator"]


def test_undo_over_http(desk: Desk) -> None:
    client = browser(desk)
    first = begin(client)
    assert not first["can_undo"]
    second = vote(client, first, "left", "client-00001").json()
    assert second["can_undo"] and second["pair"] != first["pair"] and second["num_done"] == 1
    back = post(client, "/api/undo", second, client_id="client-00002").json()
    assert back["pair"] == first["pair"] and back["num_done"] == 0, "the same pair on the same sides"
    answer = post(client, "/api/undo", back, client_id="client-00003")
    assert answer.status_code == 409 and "there is no vote to undo" in answer.json()["error"]


# -- who gets in


def test_a_token_is_needed_once(desk: Desk) -> None:
    client = browser(desk, TOKEN)
    for path in ("/", "/api/state", "/page/annotate.js", "/video/" + "0" * 32):
        answer = client.get(path)
        assert answer.status_code == 401 and "This page needs a token" in answer.text
        assert "set-cookie" not in answer.headers
    for wrong in ("wrong", TOKEN + "x", TOKEN[:-1], "\u00e9"):
        answer = client.get("/", params={"token": wrong})
        assert answer.status_code == 401 and "The token in this address is wrong" in answer.text
    answer = client.get("/", params={"token": TOKEN})
    cookie = answer.headers["set-cookie"].lower()
    assert answer.status_code == 200 and "httponly" in cookie and "samesite=strict" in cookie
    assert client.get("/api/state").status_code == 200
    assert client.get("/", params={"token": "wrong"}).status_code == 401, "even for a browser that is in"


def test_cookies_end_with_their_token_and_cannot_be_made(desk: Desk) -> None:
    client = browser(desk, TOKEN)
    client.get("/", params={"token": TOKEN})
    access = Access(desk.store.secret(), "another token, as long", "127.0.0.1")
    name, value = access.cookie, client.cookies[access.cookie]
    assert access.opened(value) is None
    own = Access(desk.store.secret(), TOKEN, "127.0.0.1")
    session = own.opened(value)
    assert session is not None and session.annotator is None
    parts = value.split(".")
    for forged in (f"{parts[0]}.YW5h.{parts[2]}", f"..{parts[2]}", "a.b.c", "", value[:-1], value + "0"):
        assert own.opened(forged) is None
    assert name.startswith("videofm-")


@pytest.mark.parametrize(
    ("listens", "header", "fits"),
    [
        ("127.0.0.1", "127.0.0.1:8000", True),
        ("127.0.0.1", "localhost:8000", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("::1", "[::1]:8000", True),
        ("127.0.0.1", "evil.example:8000", False),
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "10.0.0.7:8000", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", None, False),
        ("0.0.0.0", "10.0.0.7:8000", True),
        ("0.0.0.0", "evil.example", False),
        ("0.0.0.0", "gpu7.example.org:8000", True),
        ("gpu8.example.org", "gpu8.example.org", True),
    ],
)
def test_names_of_hosts(listens: str, header: str | None, fits: bool) -> None:
    assert Access(b"secret", TOKEN, listens, ["gpu7.example.org"]).host_fits(header) is fits


def test_a_foreign_host_is_refused_before_anything_else(desk: Desk) -> None:
    answer = browser(desk).get("/api/state", headers={"host": "evil.example"})
    assert answer.status_code == 421 and "is not called 'evil.example'" in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff" and "set-cookie" not in answer.headers


def test_short_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="--token has 3 characters; it needs 16 or more"):
        Access(b"secret", "abc", "0.0.0.0")


@pytest.mark.parametrize(
    ("host", "loopback"), [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
                           ("10.0.0.7", False), ("gpu7", False), ("", False)],
)  # fmt: skip
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_every_answer_has_the_headers(desk: Desk) -> None:
    client = browser(desk)
    for path, status in (("/", 200), ("/page/annotate.css", 200), ("/api/state", 200), ("/nothing", 404), ("/video/x", 403)):
        answer = client.get(path)
        assert answer.status_code == status
        assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    policy = HEADERS["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy and "default-src 'none'" in policy
    page = client.get("/").text
    assert "<style" not in page and "style=" not in page and " onclick" not in page and "http" not in page


def test_nothing_else_is_served(desk: Desk) -> None:
    client = browser(desk)
    begin(client)
    tries = ("/page/../app.py", "/page/%2e%2e/app.py", "/page/index.html", "/video/..%2f..%2fvotes.sqlite", "/shards/x")
    for path in tries:
        assert client.get(path).status_code == 404, path
    assert client.get("/api/vote").status_code == 405


# -- videos


def test_videos_come_whole_and_in_ranges(desk: Desk, candidates: Path) -> None:
    client = browser(desk)
    address = begin(client)["pair"]["videos"][0]
    whole = client.get(address)
    contents = {read_clip(candidates, side.record) for pair in desk.pool.pairs for side in (pair.first, pair.second)}
    assert whole.content in contents and whole.headers["content-type"] == "video/mp4"
    assert whole.headers["accept-ranges"] == "bytes" and "private" in whole.headers["cache-control"]
    part = client.get(address, headers={"range": "bytes=0-1"})  # what Safari asks first
    assert part.status_code == 206 and part.content == whole.content[:2]
    assert part.headers["content-range"] == f"bytes 0-1/{len(whole.content)}"
    for unknown in ("0" * 32, "%C3%A9", "%00", "x" * 2000):
        assert client.get(f"/video/{unknown}").status_code == 404


@pytest.mark.parametrize(
    ("asked", "status", "content"),
    [
        (None, 200, b"0123456789"),
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-3", 206, b"789"),
        ("bytes=0-99", 206, b"0123456789"),
        ("bytes=-99", 206, b"0123456789"),
        ("bytes=10-", 416, b""),
        ("bytes=-0", 416, b""),
        ("bytes=4-2", 416, b""),
        ("bytes=-", 200, b"0123456789"),
        ("lines=1-2", 200, b"0123456789"),
        ("bytes=0-" + "9" * 5000, 200, b"0123456789"),
        ("bytes=0-1,4-5", 200, b"0123456789"),
    ],
)
def test_ranges(asked: str | None, status: int, content: bytes) -> None:
    """RFC 9110: what is not understood is answered with the whole, what lies outside with 416."""
    answer = ranged(b"0123456789", asked)
    assert (answer.status_code, answer.body) == (status, content)
    if status == 416:
        assert answer.headers["content-range"] == "bytes */10"


def test_a_damaged_clip_is_told_in_the_log_and_not_on_the_page(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(desk_module, "read_clip", lambda folder, record: b"other bytes")
    client = browser(desk)
    state = begin(client)
    with caplog.at_level(logging.ERROR, "videofm"):
        answer = client.get(state["pair"]["videos"][0])
    assert answer.status_code == 500 and "damaged" not in answer.text and "000000" not in answer.text
    assert "is damaged: SHA-256 expected" in caplog.text
    with pytest.raises(DataError, match=r"clip .* is damaged"):
        desk.video("ana", state["pair"]["videos"][0].rpartition("/")[2])
    assert vote(client, state, "skip", "client-00001").status_code == 200, "such a pair can be skipped"


def test_a_full_disk_is_no_vote(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    client = browser(desk)
    state = begin(client)

    def full(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Store, "vote", full)
    answer = vote(client, state, "left", "client-00001")
    assert answer.status_code == 503 and "not saved: database or disk is full" in answer.json()["error"]
