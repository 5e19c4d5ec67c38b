"""Readers of foreign preferences: each format is read as it says, and a record that makes no pair is told with its place."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.preferences.records import BadRecord, ForeignPair, read_json_lines
from data_pipelines.preferences.run import read_pairs
from tests.unit.data_pipelines.foreign_pairs import PROMPT, config_of, make_clips, put
from videofm.data.preferences import Origin
from videofm.errors import DataError


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_clips(tmp_path_factory.mktemp("clips"))


def listed(source: Path, kind: str, **fields: Any) -> tuple[list[ForeignPair], dict[str, str]]:
    """The pairs of a list, and its bad records: place -> reason."""
    found = list(read_pairs(config_of(source, kind, **fields)))
    bad = {record.where: record.reason for record in found if isinstance(record, BadRecord)}
    return [record for record in found if isinstance(record, ForeignPair)], bad


def names(pairs: Sequence[ForeignPair]) -> list[tuple[str, str]]:
    return [(pair.winner.name, pair.loser.name) for pair in pairs]


def test_videodpo(tmp_path: Path, clips: list[Path]) -> None:
    """Clips as VideoDPO writes them, and as its older lists do; label 1 turns a pair around."""
    for number in range(4):
        put(clips[number], tmp_path, "videos", f"{number}.mp4")
    metadata: list[Any] = [
        {"basic": {"clip_path": f"videos/{n}.mp4", "score": 0.1 * n, "globalidx": n}, "misc": {"frame_caption": [PROMPT]}}
        for n in range(3)
    ]
    metadata += [{"video": "videos/3.mp4", "caption": "another"}, {"basic": {"clip_path": "videos/none.mp4"}}, "odd"]
    pairs: list[Any] = [
        {"video1": 1, "video2": 0, "label": 0, "frame_caption": PROMPT, "score": 0.4},
        {"video1": 1, "video2": 2, "label": 1},
        {"video1": 0, "video2": 3},
        {"video1": 0, "video2": 4, "frame_caption": PROMPT},
        {"video1": 0, "video2": 9, "frame_caption": PROMPT},
        {"video1": 0, "video2": 1, "label": 2},
        {"video1": 0, "video2": 5, "frame_caption": PROMPT},
        [0, 1],
    ]
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    (tmp_path / "pair.json").write_text(json.dumps(pairs))
    found, bad = listed(tmp_path, "videodpo", generator="vc2")
    assert names(found) == [("1.mp4", "0.mp4"), ("2.mp4", "1.mp4")]
    first = found[0].pair
    assert (first.prompt, first.winner.scores, first.loser.scores) == (PROMPT, {"overall": 0.1}, {"overall": 0.0})
    assert found[1].pair.prompt == PROMPT and first.winner.origin == Origin("vc2", None, None, {})
    assert bad == {
        "pair.json: record 2": "two prompts",
        "pair.json: record 3": "missing file",
        "pair.json: record 4": "no such clip",
        "pair.json: record 5": "bad label",
        "pair.json: record 6": "no path",
        "pair.json: record 7": "not a record",
    }


def test_video_reward(tmp_path: Path, clips: list[Path]) -> None:
    """Three axes vote: A wins 2 of 3; B 2 of 2; 1 to 1 is a tie; `judged_by` takes one column in their place."""
    for name in "AB":
        put(clips["AB".index(name)], tmp_path, "videos", f"{name}.mp4")
    head = ["path_A", "path_B", "A_model", "B_model", "prompt", "VQ", "MQ", "TA", "Overall", "VQ_A", "VQ_B"]
    paths = ["./videos/A.mp4", "videos/B.mp4", "one", "two"]
    rows = [
        [*paths, PROMPT, "A", "A", "B", "B", "4", "3.5"],
        [*paths, f"{PROMPT},\nquickly", "B", "same", "B", "tie", "", ""],
        [*paths, PROMPT, "A", "b", "tie", "A", "5", "x"],
        [*paths, PROMPT, "", "", "", "A", "", ""],
        [*paths, PROMPT, "C", "A", "A", "", "", ""],
        [*paths, "  ", "A", "A", "A", "A", "", ""],
    ]
    with (tmp_path / "data.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([head, *rows])
    found, bad = listed(tmp_path, "video_reward")
    assert names(found) == [("A.mp4", "B.mp4"), ("B.mp4", "A.mp4"), ("A.mp4", "B.mp4")]
    pairs = [one.pair for one in found]
    assert [pair.tie for pair in pairs] == [False, False, True]
    assert pairs[0].axes == {"quality": "winner", "motion": "winner", "text": "loser"}
    assert pairs[1].axes == {"quality": "winner", "motion": "tie", "text": "winner"}
    assert pairs[2].axes == {"quality": "winner", "motion": "loser", "text": "tie"}
    assert (pairs[0].winner.scores, pairs[0].loser.scores) == ({"quality": 4.0}, {"quality": 3.5})
    assert [pair.winner.origin and pair.winner.origin.generator for pair in pairs] == ["one", "two", "one"]
    assert pairs[1].prompt == f"{PROMPT}, quickly"
    assert bad == {"data.csv:6": "no judgement", "data.csv:7": "bad label", "data.csv:8": "no prompt"}
    by_overall = {"format": {"judged_by": "Overall"}}
    assert names(listed(tmp_path, "video_reward", **by_overall)[0])[0] == ("B.mp4", "A.mp4")
    lines = [dict(zip(head, row, strict=True)) for row in rows[:3]]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{no json\n")
    again, bad = listed(tmp_path, "video_reward", format={"file": "data.jsonl"})
    assert [one.pair for one in again] == pairs and bad == {"data.jsonl:4": "not a record"}


def test_folder_pairs(tmp_path: Path, clips: list[Path]) -> None:
    """The nearest prompt counts: of the video, of the folder, of the text file beside the folder."""
    for name in ("dog", "cat", "fox"):
        for side, number in (("w", 0), ("l", 1)):
            put(clips[number], tmp_path, name, side, "one.mp4")
    put(clips[2], tmp_path, "dog", "w", "two.mp4")
    put(clips[2], tmp_path, "cat", "w", "two.mp4"), put(clips[3], tmp_path, "cat", "l", "two.webm")
    put(clips[4], tmp_path, "cat", "l", "two.mp4")
    (tmp_path / "dog.txt").write_text("a dog\n")
    (tmp_path / "cat.txt").write_text("unused")
    (tmp_path / "cat" / "prompt.txt").write_text("a  cat ")
    found, bad = listed(tmp_path, "folder_pairs")
    assert [(one.where, one.pair.prompt) for one in found] == [("cat/one", "a cat"), ("dog/one", "a dog")]
    assert found[0].winner == tmp_path / "cat" / "w" / "one.mp4" and found[0].pair.loser.key == "l/one.mp4"
    assert bad == {"cat/two": "several files", "dog/two": "no partner", "fox/one": "no prompt"}
    (tmp_path / "fox" / "w" / "one.txt").write_text("a fox")
    assert listed(tmp_path, "folder_pairs")[0][-1].pair.prompt == "a fox"
    (tmp_path / "fox" / "w" / "one.txt").unlink(), (tmp_path / "fox" / "prompt.txt").write_text("this fox")
    alone, _ = listed(tmp_path / "fox", "folder_pairs")
    assert [(one.where, one.pair.prompt) for one in alone] == [("one", "this fox")]


def test_chosen_and_rejected_folders(tmp_path: Path, clips: list[Path]) -> None:
    for stem, number in (("x", 0), ("y", 2)):
        put(clips[number], tmp_path, "better", f"{stem}.mp4"), put(clips[number + 1], tmp_path, "rejected", f"{stem}.mp4")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "better" / "x.txt").write_text(PROMPT), (tmp_path / "prompts" / "y.txt").write_text("another")
    found, bad = listed(tmp_path, "chosen_rejected", format={"chosen": "better"})
    assert [(one.pair.prompt, one.winner.parent.name, one.loser.parent.name) for one in found] == [
        (PROMPT, "better", "rejected"),
        ("another", "better", "rejected"),
    ]
    assert not bad
    with pytest.raises(DataError, match=r"chosen is missing: format\.chosen and format\.rejected are folders"):
        listed(tmp_path, "chosen_rejected")


def test_json_lines_of_others(tmp_path: Path, clips: list[Path]) -> None:
    """Three fields are enough; whatever else a line has must be what it should be."""
    for number in range(2):
        put(clips[number], tmp_path, f"{number}.mp4")
    plain = {"prompt": PROMPT, "chosen": "0.mp4", "rejected": "1.mp4"}
    lines = [
        plain,
        {**plain, "version": 2},
        {**plain, "format": "something.else"},
        {**plain, "weight": "much"},
        {**plain, "chosen": "../0.mp4"},
        {**plain, "chosen": 3},
        {**plain, "prompt": None},
        {**plain, "axes": ["motion"]},
        {**plain, "scores": {"chosen": {"motion": "good"}}},
        {**plain, "segments": {"seconds": 1.0}},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '"text"\n')
    found, bad = listed(tmp_path, "jsonl", generator="them")
    assert names(found) == [("0.mp4", "1.mp4")] and found[0].pair.winner.origin == Origin("them", None, None, {})
    assert list(bad.values()) == [
        *("unknown version", "unknown version", "not a pair", "outside", "no path", "no prompt"),
        *("not a record", "not a pair", "not a pair", "not a record"),
    ]
    (tmp_path / "link.mp4").symlink_to(clips[0])
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**plain, "chosen": "link.mp4"}))
    assert listed(tmp_path, "jsonl")[1] == {"pairs.jsonl:1": "outside"}
    assert listed(tmp_path, "jsonl", videos="/")[1] == {"pairs.jsonl:1": "missing file"}


def test_lists_that_are_none(tmp_path: Path) -> None:
    for kind, message in (
        ("videodpo", r"metadata\.json is missing: give the folder"),
        ("video_reward", r"data\.csv is missing"),
        ("jsonl", r"pairs\.jsonl is missing"),
        ("folder_pairs", r"has no folder with 'w' and 'l' in it"),
    ):
        with pytest.raises(DataError, match=message):
            listed(tmp_path, kind)
    (tmp_path / "metadata.json").write_text("{")
    with pytest.raises(DataError, match=r"metadata\.json is not valid JSON"):
        listed(tmp_path, "videodpo")
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(DataError, match="holds dict, and a list of records is wanted"):
        listed(tmp_path, "videodpo")
    (tmp_path / "data.csv").write_text("prompt,left,right\n")
    with pytest.raises(DataError, match=r"no column path_A, path_B \(it has prompt, left, right\)"):
        listed(tmp_path, "video_reward")
    (tmp_path / "data.csv").write_text('prompt,path_A,path_B\n"' + "x" * 200_000)
    with pytest.raises(DataError, match=r"data\.csv: no CSV near line 1 .*is a quote left open there"):
        listed(tmp_path, "video_reward")
    (tmp_path / "lines.jsonl").write_text('{"a": "one\u2028line"}\n\n{"b": "\x85"}\n', encoding="utf-8")
    read = [("lines.jsonl:1", {"a": "one\u2028line"}), ("lines.jsonl:3", {"b": "\x85"})]
    assert list(read_json_lines(tmp_path / "lines.jsonl")) == read
    (tmp_path / "pairs.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        listed(tmp_path, "jsonl")
    with pytest.raises(DataError, match="is no folder"):
        listed(tmp_path / "pairs.jsonl", "folder_pairs")
