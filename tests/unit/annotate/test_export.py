"""Votes to preferences: majorities, ties, contradictions, and everything that was said."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.annotate_candidates import PROMPTS, write_candidates
from videofm.annotate.export import decided, export
from videofm.annotate.pool import Wishes, open_store
from videofm.annotate.queue import Pool
from videofm.annotate.store import Store, Vote
from videofm.data.preferences import read_preferences
from videofm.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts with two candidates each: three pairs."""
    return write_candidates(tmp_path_factory.mktemp("run") / "candidates", num_candidates=2)


@pytest.fixture
def opened(candidates: Path, tmp_path: Path) -> tuple[Pool, Store]:
    return open_store(candidates, tmp_path / "votes.sqlite", Wishes(overlap=1.0, axes=("motion", "text")))


def cast(opened: tuple[Pool, Store], annotator: str, pair: int, choice: str, **axes: str) -> None:
    """A vote on the pair of prompt number `pair`."""
    pool, store = opened
    number = next(n for n, p in enumerate(pool.pairs) if p.prompt == PROMPTS[pair])
    name = f"{annotator}-{pair}"
    store.join(name, [number])  # a name for each vote: whoever joins is shown this pair
    assert store.current(name) is not None
    store.vote(Vote(f"vote-{name}", name, "", choice, axes, "second", 1000.0, 1002.5), number)


@pytest.mark.parametrize(
    ("answers", "outcome"),
    [
        (["first"], "first"),
        (["second", "second", "first"], "second"),
        (["first", "tie"], "tie"),
        (["first", "first", "tie"], "first"),
        (["tie", "both_bad"], "tie"),
        (["first", "second"], None),
        (["first", "second", "tie"], None),
        (["first", "first", "second", "second", "tie"], None),
        (["first", "first", "second", "tie"], None),
    ],
)
def test_what_votes_say_together(answers: list[str], outcome: str | None) -> None:
    assert decided(answers) == outcome == decided(answers[::-1])


def test_everything_that_was_said_is_in_the_records(opened: tuple[Pool, Store], candidates: Path, tmp_path: Path) -> None:
    cast(opened, "ana", 0, "second", motion="second", text="tie")
    cast(opened, "ben", 0, "second", motion="first")
    cast(opened, "eva", 0, "first")
    cast(opened, "ana", 1, "both_bad")
    cast(opened, "ben", 1, "skip")
    report = export(tmp_path / "votes", candidates, *opened)
    found = read_preferences(tmp_path / "votes")
    assert Path(found.clips) == candidates.resolve()
    by_prompt = {pair.prompt: pair for pair in found.pairs}
    assert set(by_prompt) == {PROMPTS[0], PROMPTS[1]}
    won, bad = by_prompt[PROMPTS[0]], by_prompt[PROMPTS[1]]
    assert (won.winner.key, won.loser.key, won.tie) == ("000000-001", "000000-000", False)
    assert won.winner.origin is not None and won.winner.origin.seed == 1 and won.winner.sha256 != won.loser.sha256
    assert won.axes == {"text": "tie"}, "the votes on motion contradict each other"
    assert won.votes[0] == {
        "annotator": "ana-0",
        "choice": "winner",
        "axes": {"motion": "winner", "text": "tie"},
        "left": "winner",
        "shown": "1970-01-01T00:16:40.000+00:00",
        "voted": "1970-01-01T00:16:42.500+00:00",
        "id": "vote-ana-0",
    }
    assert [vote["choice"] for vote in won.votes] == ["winner", "winner", "loser"]
    assert bad.tie and [vote["choice"] for vote in bad.votes] == ["both_bad"]
    counts = (report.num_pairs, report.num_ties, report.num_both_bad, report.num_without_votes, report.num_skips)
    assert counts == (2, 1, 1, 1, 1) and report.num_axes_left_out == 1
    said = found.header["annotation"]
    assert said["settings"]["axes"] == ["motion", "text"] and said["settings"]["overlap"] == 1.0
    assert said["report"]["num_votes"] == 4 and said["on_contradiction"] == "fail"


def test_contradictions_fail_are_left_out_or_become_ties(opened: tuple[Pool, Store], candidates: Path, tmp_path: Path) -> None:
    """Pair 0: one vote for each. Pair 1: a winner that is worse on every axis. Pair 2: fine."""
    cast(opened, "ana", 0, "first")
    cast(opened, "ben", 0, "second")
    cast(opened, "ana", 1, "first", motion="second", text="second")
    cast(opened, "ana", 2, "first")
    with pytest.raises(DataError, match="the votes on 2 pairs contradict each other; decide with --on-contradiction") as caught:
        export(tmp_path / "fail", candidates, *opened)
    assert "its votes name both candidates: 1 first, 1 second" in str(caught.value)
    assert "its loser is better on motion, text" in str(caught.value)
    assert not (tmp_path / "fail").exists()
    report = export(tmp_path / "skip", candidates, *opened, "skip")
    assert [pair.prompt for pair in read_preferences(tmp_path / "skip").pairs] == [PROMPTS[2]]
    assert len(report.contradictions) == 2 and "2 contradictory pairs left out" in report.as_text("skip")
    export(tmp_path / "tie", candidates, *opened, "tie")
    assert [pair.tie for pair in read_preferences(tmp_path / "tie").pairs] == [True, True, False]


def test_nothing_to_export(opened: tuple[Pool, Store], candidates: Path, tmp_path: Path) -> None:
    cast(opened, "ana", 0, "skip")
    with pytest.raises(DataError, match="holds no vote besides 1 skips"):
        export(tmp_path / "votes", candidates, *opened)


def test_wishes_are_kept_and_checked(candidates: Path, tmp_path: Path) -> None:
    path = tmp_path / "votes.sqlite"
    for wishes, match in [
        (Wishes(overlap=1.5), "--overlap is 1.5; it is a share"),
        (Wishes(num_pairs=0), "--num-pairs is 0; it is at least 1"),
        (Wishes(axes=("Motion!",)), "--axes has 'Motion!'"),
        (Wishes(axes=("text", "text")), "--axes has one name twice"),
    ]:
        with pytest.raises(ConfigError, match=match):
            open_store(candidates, path, wishes)
        assert not path.exists()
    open_store(candidates, path, Wishes(seed=3, num_pairs=2))[1].close()
    pool, store = open_store(candidates, path)
    assert len(pool.pairs) == 2 and store.settings.seed == 3
    with pytest.raises(ConfigError, match="num_pairs 2, asked for 1"):
        open_store(candidates, path, Wishes(num_pairs=1))
