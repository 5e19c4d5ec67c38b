"""A folder of preferences comes back as it was written, is whole or refused, and a record that makes no sense is told apart."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.data.preferred import candidates, neighbours, pair_of, side
from videofm.data import preferences as module
from videofm.data.preferences import (
    PreferencePair,
    Segments,
    describe_pair,
    pair_problem,
    read_preferences,
    write_preferences,
)
from videofm.errors import DataError

RECORDS = candidates(4)
PLAIN = pair_of(RECORDS[0], RECORDS[1])
FULL = replace(
    PLAIN,
    winner=side(RECORDS[0], 0.75),
    loser=replace(side(RECORDS[1], 0.25), origin=None),
    weight=1.5,
    segments=Segments(0.25, (1, 0, -1)),
    axes={"motion": "winner", "text": "tie", "quality": "loser"},
    source="by hand; a café",
    votes=({"annotator": "ann", "choice": "winner"}, {"annotator": "bob", "choice": "both_bad", "seconds": 3.5}),
)


def read_back(folder: Path, pairs: list[PreferencePair]) -> list[PreferencePair]:
    return read_preferences(write_preferences(folder, pairs, "clips")).pairs


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    """Every field, in the order that was given, over several files; also a record that says no more than it must."""
    pairs = [FULL, *neighbours(RECORDS)[1:], replace(PLAIN, pair_id="tie", tie=True)]
    assert read_back(tmp_path, pairs) == pairs
    assert PreferencePair.from_json(PLAIN.to_json()) == PLAIN
    short = {name: value for name, value in PLAIN.to_json().items() if name in ("pair_id", "prompt", "winner", "loser")}
    assert PreferencePair.from_json(short) == PLAIN


def test_many_records_are_spread_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAIRS_A_FILE", 3)
    pairs = neighbours(RECORDS)
    pairs = [replace(pair, pair_id=f"{pair.pair_id}-{n}") for n in range(2) for pair in pairs]
    assert read_back(tmp_path, pairs) == pairs
    header = read_preferences(tmp_path).header
    assert [file["num_pairs"] for file in header["files"]] == [3, 3, 2] and header["num_pairs"] == 8
    # A second, shorter writing leaves nothing of the first.
    assert read_back(tmp_path, pairs[:2]) == pairs[:2]
    assert [path.name for path in (tmp_path / "pairs").iterdir()] == ["pairs-00000.jsonl"]
    assert read_back(tmp_path, []) == []


def test_the_hash_names_the_records_and_nothing_else(tmp_path: Path) -> None:
    pairs = neighbours(RECORDS)
    first = read_preferences(write_preferences(tmp_path / "a", pairs, "clips", {"stage": "rank"}))
    again = read_preferences(write_preferences(tmp_path / "b", pairs, "elsewhere"))
    other = read_preferences(write_preferences(tmp_path / "c", [replace(pairs[0], weight=2.0), *pairs[1:]], "clips"))
    assert first.hash == again.hash != other.hash and first.header["stage"] == "rank"
    turned = read_preferences(write_preferences(tmp_path / "d", pairs[::-1], "clips"))
    assert turned.hash != first.hash, "the order is part of it"


def test_runs_of_a_recipe_can_be_moved_together(tmp_path: Path) -> None:
    """The place of the clips is kept relative to a neighbour's; of clips elsewhere it is kept as given."""
    near, far = tmp_path / "recipe" / "candidates", tmp_path / "elsewhere" / "clips"
    for folder in (near, far):
        folder.mkdir(parents=True)
    runs = tmp_path / "recipe"
    write_preferences(runs / "rank" / "preferences", [PLAIN], near)
    write_preferences(runs / "far" / "preferences", [PLAIN], far)
    write_preferences(runs / "remote" / "preferences", [PLAIN], "s3://bucket/clips")
    assert read_preferences(runs / "rank" / "preferences").clips == str(near)
    shutil.move(runs, tmp_path / "moved")
    moved = tmp_path / "moved"
    assert read_preferences(moved / "rank" / "preferences").clips == str(moved / "candidates")
    assert str(tmp_path) not in (moved / "rank" / "preferences" / "preferences.json").read_text()
    assert read_preferences(moved / "far" / "preferences").clips == str(far)
    assert read_preferences(moved / "remote" / "preferences").clips == "s3://bucket/clips"


def test_clips_elsewhere_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset that is named relative to the writer's working directory is the same one for a reader who stands elsewhere."""
    home, clips = tmp_path / "home", tmp_path / "data" / "clips"
    for folder in (home, clips):
        folder.mkdir(parents=True)
    monkeypatch.chdir(home)
    folder = tmp_path / "runs" / "rank" / "preferences"
    write_preferences(folder, [PLAIN], "../data/clips")
    write_preferences(tmp_path / "runs" / "remote" / "preferences", [PLAIN], "s3://bucket/clips")
    monkeypatch.chdir(tmp_path / "runs")
    found = Path(read_preferences(folder).clips)
    assert found.is_absolute() and found.samefile(clips)
    assert read_preferences(tmp_path / "runs" / "remote" / "preferences").clips == "s3://bucket/clips"


def test_a_writing_that_was_cut_short_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where older preferences stood in the folder: their header goes first."""
    write_preferences(tmp_path, neighbours(RECORDS), "clips")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        write_preferences(tmp_path, [PLAIN], "clips")
    with pytest.raises(DataError, match=r"has no preferences \(preferences.json is missing\).*videofm dpo rank"):
        read_preferences(tmp_path)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"1 pair ids name several pairs \({PLAIN.pair_id}\)"):
        write_preferences(tmp_path, [PLAIN, FULL], "clips")
    with pytest.raises(DataError, match=r"facts cannot have clips, files"):
        write_preferences(tmp_path, [PLAIN], "clips", {"clips": 1, "files": []})
    with pytest.raises(DataError, match=r"a number that is not finite"):
        write_preferences(tmp_path, [replace(PLAIN, weight=math.nan)], "clips")
    assert not (tmp_path / "preferences.json").exists()


def edit_header(folder: Path, **changes: object) -> None:
    path = folder / "preferences.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_schema_is_refused(tmp_path: Path) -> None:
    write_preferences(tmp_path, [PLAIN], "clips")
    edit_header(tmp_path, schema=2)
    with pytest.raises(DataError, match=r"has schema 2, and this version reads 1; update videofm"):
        read_preferences(tmp_path)
    (tmp_path / "preferences.json").write_text("[]")
    with pytest.raises(DataError, match=r"has schema None"):
        read_preferences(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"clips": 3}, {"clips_base": "home"}, {"files": [{"name": "pairs/pairs-00000.jsonl"}]}, {"files": None}],
)
def test_a_damaged_header_is_refused(tmp_path: Path, change: dict) -> None:
    write_preferences(tmp_path, [PLAIN], "clips")
    edit_header(tmp_path, **change)
    with pytest.raises(DataError, match=r"preferences.json is damaged: it needs clips, clips_base and files"):
        read_preferences(tmp_path)


def test_a_header_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    write_preferences(tmp_path, [PLAIN], "clips")
    (file,) = read_preferences(tmp_path).header["files"]
    edit_header(tmp_path, files=[{**file, "name": "../secret.jsonl"}])
    with pytest.raises(DataError, match=r"preferences.json is damaged"):
        read_preferences(tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """A missing file, a lost line, a changed number: with the file, the hashes and what to do; a cut line with its number."""
    write_preferences(tmp_path, neighbours(RECORDS), "clips")
    path = tmp_path / "pairs" / "pairs-00000.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace('"weight": 1.0', '"weight": 9.0', 1))
    with pytest.raises(DataError, match=rf"{path} is damaged: it has 4 records of 4, SHA-256 expected \w+, found \w+; restore"):
        read_preferences(tmp_path)
    path.write_text("".join(whole.splitlines(keepends=True)[:3]))
    with pytest.raises(DataError, match=r"is damaged: it has 3 records of 4"):
        read_preferences(tmp_path)
    path.write_text(whole[:-20])
    with pytest.raises(DataError, match=rf"record 4 of {path} cannot be read: .*the file is damaged: .*write the preferences"):
        read_preferences(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path} is in preferences.json but missing"):
        read_preferences(tmp_path)


def made_by(**changes: object) -> dict:
    """A side whose origin has other values."""
    value = PLAIN.to_json()["loser"]
    return {**value, "origin": {**value["origin"], **changes}}


WRONG: dict[str, dict] = {
    "lacks loser": {"loser": ...},
    "has the unknown losser": {"losser": 1},
    "winner is 3 and should be an object": {"winner": 3},
    "winner lacks sha256": {"winner": {"key": "a", "scores": {}, "origin": None}},
    "winner.key is 3": {"winner": {"key": 3, "sha256": "", "scores": {}, "origin": None}},
    "winner.scores is": {"winner": {"key": "a", "sha256": "", "scores": {"overall": "high"}, "origin": None}},
    "winner.origin lacks policy, sampler, seed": {
        "winner": {"key": "a", "sha256": "", "scores": {}, "origin": {"generator": "g"}}
    },
    "loser.origin.seed is 1.5": {"loser": made_by(seed=1.5)},
    "loser.origin.policy is 3": {"loser": made_by(policy=3)},
    "loser.origin.generator is None": {"loser": made_by(generator=None)},
    "loser.origin.sampler is": {"loser": made_by(sampler=[])},
    "pair_id is 3": {"pair_id": 3},
    "tie is 'yes' and should be true or false": {"tie": "yes"},
    "weight is True and should be a number": {"weight": True},
    "axes is": {"axes": {"motion": 1}},
    "votes is": {"votes": ["left"]},
    "prompt is None and should be a text": {"prompt": None},
    "segments lacks labels": {"segments": {"seconds": 1.0}},
    "segments.labels is": {"segments": {"seconds": 1.0, "labels": [0.5]}},
    "segments.seconds is": {"segments": {"seconds": "1", "labels": [1]}},
}


@pytest.mark.parametrize("told", WRONG)
def test_a_record_of_another_form_is_refused(told: str) -> None:
    changed = {name: value for name, value in {**PLAIN.to_json(), **WRONG[told]}.items() if value is not ...}
    with pytest.raises(DataError, match=re.escape(told)):
        PreferencePair.from_json(changed)


PROBLEMS: dict[str, PreferencePair] = {
    "it has no pair_id": replace(PLAIN, pair_id=""),
    "its pair_id 'x@1~y' has '@NUMBER~', by which replacements are named": replace(PLAIN, pair_id="x@1~y"),
    "a side names no clip": replace(PLAIN, loser=replace(PLAIN.loser, key="")),
    "winner and loser are the same clip 000000-000": pair_of(RECORDS[0], RECORDS[0]),
    "are identical (one SHA-256)": replace(PLAIN, loser=replace(PLAIN.loser, sha256=PLAIN.winner.sha256)),
    "its weight is -1; it must be finite and not negative": replace(PLAIN, weight=-1.0),
    "its weight is inf": replace(PLAIN, weight=math.inf),
    "the loser's score overall is not finite": replace(PLAIN, loser=side(RECORDS[1], math.nan)),
    "segments need a positive length": replace(PLAIN, segments=Segments(0.0, (1,))),
    "and at least one label": replace(PLAIN, segments=Segments(1.0, ())),
    "its segments have the labels [2]; they are -1, 0 or 1": replace(PLAIN, segments=Segments(1.0, (1, 2))),
    "its axis motion says 'left'; it can say winner, loser, tie": replace(PLAIN, axes={"motion": "left"}),
    "contradictory: the overall score of its winner, 0.25, is below that of its loser, 0.75": replace(
        PLAIN, winner=side(RECORDS[0], 0.25), loser=side(RECORDS[1], 0.75)
    ),
    "contradictory: its loser is better on motion, text": replace(PLAIN, axes={"motion": "loser", "text": "loser"}),
    "contradictory votes: 2 for its loser, 1 for its winner": replace(
        PLAIN, votes=tuple({"choice": choice} for choice in ("loser", "winner", "loser", "tie"))
    ),
    "contradictory votes: 1 for its loser, 1 for its winner": replace(PLAIN, votes=({"choice": "loser"}, {"choice": "winner"})),
}


@pytest.mark.parametrize("told", PROBLEMS)
def test_a_record_that_makes_no_sense(told: str) -> None:
    assert told in (pair_problem(PROBLEMS[told]) or "nothing")


def test_a_record_that_makes_sense() -> None:
    """A tie may have any scores and votes; equal scores, and a minority of votes or axes for the loser, contradict nothing."""
    even = replace(PLAIN, winner=side(RECORDS[0], 0.5), loser=side(RECORDS[1], 0.5))
    split = {"axes": {"motion": "loser"}, "votes": ({"choice": "loser"}, {"choice": "winner"})}
    for pair in (PLAIN, FULL, even, replace(even, tie=True, loser=side(RECORDS[1], 0.9), **split), replace(PLAIN, weight=0.0)):
        assert pair_problem(pair) is None
    assert describe_pair(PLAIN) == "pair 000000-000-000000-001 (000000-000 over 000000-001)"
