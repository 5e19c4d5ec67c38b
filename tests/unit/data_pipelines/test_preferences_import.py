"""Stage `dpo_import` and `videofm dpo export`: sound videos only are stored, and what is exported comes back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.isolate import Failure, Result
from data_pipelines.preferences import videos as videos_module
from data_pipelines.preferences.export import export_preferences
from data_pipelines.preferences.run import clip_key, run
from data_pipelines.rows import Row
from tests.unit.data.preferred import data_config
from tests.unit.data_pipelines.foreign_pairs import PROMPT, Direct, config_of, imported, make_clips, put, write_lines
from videofm.cli import main
from videofm.data.manifest import Manifest
from videofm.data.pairs import PairPlan
from videofm.data.preferences import Origin, PreferencePair, Segments, read_preferences, write_preferences
from videofm.data.shards import read_clip
from videofm.errors import ConfigError, DataError, Interrupted
from videofm.files import sha256_of
from videofm.run_dir import RunDirectory, read_json, read_jsonl


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos_module, "Isolate", Direct)


def test_a_video_of_many_pairs_is_stored_once_and_as_it_is(tmp_path: Path, clips: list[Path]) -> None:
    """With a child that decodes, as users have it."""
    write_lines(tmp_path / "in", clips, [(0, 1), (0, 2), (3, 0)])
    folder, results = imported(tmp_path / "in", tmp_path / "run", "jsonl", clips_a_shard=3)
    assert results["counts"] == {"records": 3, "pairs": 3, "ties": 0, "bad": 0, "videos": 4, "clips": 4}
    preferences, manifest = read_preferences(folder.path / "preferences"), Manifest.load(folder.path)
    assert Path(preferences.clips) == folder.path and len(manifest.tars) == 2
    records = {record.key: record for record in manifest.records("train")}
    for number in range(4):
        sha256 = sha256_of(clips[number])
        record = records[clip_key(PROMPT, sha256)]
        assert read_clip(folder.path, record) == clips[number].read_bytes() and record.sha256 == sha256
        assert (record.num_frames, record.fps, record.height, record.width, record.caption) == (9, 8.0, 32, 32, PROMPT)
    assert len({record.source_id for record in records.values()}) == 1
    assert manifest.entries[0].config_hash.startswith("foreign:")
    first = preferences.pairs[0]
    assert first.pair_id == f"{first.winner.key}_{first.loser.key}" and first.winner.sha256 == sha256_of(clips[0])
    plan = PairPlan([manifest], data_config(folder.path / "preferences"), 0)
    assert plan.num_pairs == 3 and plan.left_out() == []
    assert not (folder.path / "work").exists() and (folder.path / "bad.jsonl").read_text() == ""


@pytest.mark.usefixtures("direct")
def test_bad_records_are_told_and_skipped_only_where_asked(tmp_path: Path, clips: list[Path]) -> None:
    """Identical, another shape, no video, listed twice, contradictory, a wrong hash, a missing file: each by its reason."""
    pairs = [(0, 1), (2, 6), (3, 7), (0, 1), (1, 0), (4, 5)]
    write_lines(tmp_path / "in", clips, pairs)
    source = tmp_path / "in" / "pairs.jsonl"
    put(clips[2], tmp_path, "in", "copy.mp4")
    line = {"prompt": PROMPT, "chosen": "2.mp4", "rejected": "copy.mp4"}
    more = [line, {**line, "rejected": "3.mp4", "sha256": {"chosen": "0" * 64}}, {**line, "rejected": "gone.mp4"}]
    more += [{**line, "rejected": "4.mp4", "axes": {"motion": "rejected"}}, {**line, "rejected": "5.mp4", "weight": -1}]
    with source.open("a") as file:
        file.write("".join(f"{json.dumps(item)}\n" for item in more))
    with pytest.raises(DataError, match=r"1 bad records in .* \(1 missing file\); the first:\n  pairs.jsonl:9: missing file: "):
        imported(tmp_path / "in", tmp_path / "first", "jsonl")
    source.write_text("".join(source.read_text().splitlines(True)[:8]))
    with pytest.raises(DataError, match=r"(?s)6 bad records .*Mend them, or leave them out with on_bad: skip"):
        imported(tmp_path / "in", tmp_path / "second", "jsonl")
    with source.open("a") as file:
        file.write("".join(f"{json.dumps(item)}\n" for item in more[2:]))
    folder, results = imported(tmp_path / "in", tmp_path / "run", "jsonl", on_bad="skip", num_workers=2)
    reasons = {row["where"]: row["reason"] for row in read_jsonl(folder.path / "bad.jsonl")}
    assert reasons == {
        "pairs.jsonl:2": "different shape",
        "pairs.jsonl:3": "video: not_video",
        "pairs.jsonl:4": "listed twice",
        "pairs.jsonl:5": "contradictory votes",
        "pairs.jsonl:7": "identical",
        "pairs.jsonl:8": "checksum",
        "pairs.jsonl:9": "missing file",
        "pairs.jsonl:10": "contradictory",
        "pairs.jsonl:11": "not a pair",
    }
    assert results["counts"] == {"records": 11, "pairs": 2, "ties": 0, "bad": 9, "videos": 9, "clips": 4}
    assert sum(results["problems"].values()) == 9
    assert read_json(folder.path / "evaluation.json")["metrics"][0]["counts"] == results["counts"]


@pytest.mark.usefixtures("direct")
def test_nothing_left_is_an_error(tmp_path: Path, clips: list[Path]) -> None:
    write_lines(tmp_path / "in", clips, [(2, 7)])
    with pytest.raises(DataError, match=r"no pair is left of 1 records of .* \(1 video: not_video\)"):
        imported(tmp_path / "in", tmp_path / "run", "jsonl", on_bad="skip")


def test_videos_of_another_size_and_rate_are_re_encoded(tmp_path: Path, clips: list[Path]) -> None:
    """In a child: 9 frames at 8 a second become 4 at 4."""
    write_lines(tmp_path / "in", clips, [(0, 1)])
    size = {"kind": "transcode", "height": 16, "width": 24, "fps": 4, "min_frames": 2}
    folder, _ = imported(tmp_path / "in", tmp_path / "run", "jsonl", transcode=size)
    manifest = Manifest.load(folder.path)
    assert {(r.num_frames, r.fps, r.height, r.width) for r in manifest.records("train")} == {(4, 4.0, 16, 24)}
    assert not manifest.entries[0].config_hash.startswith("foreign:")
    stored = {record.sha256 for record in manifest.records("train")}
    pair = read_preferences(folder.path / "preferences").pairs[0]
    assert {pair.winner.sha256, pair.loser.sha256} == stored and sha256_of(clips[0]) not in stored


@pytest.mark.usefixtures("direct")
def test_a_stop_keeps_what_was_decoded(tmp_path: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "in", clips, [(0, 1), (2, 3)])
    config = config_of(tmp_path / "in", "jsonl")
    folder, seen = RunDirectory.create(tmp_path / "run", config), []
    read_one = videos_module.VideoReader._read_one

    def watched(self: Any, file: Path, isolate: Any) -> Any:
        seen.append(file.name)
        if len(seen) == 2:
            folder.request_stop()
        return read_one(self, file, isolate)

    monkeypatch.setattr(videos_module.VideoReader, "_read_one", watched)
    with pytest.raises(Interrupted, match="stopped on request with 2 of 4 videos read"):
        run(config, folder)
    with (folder.path / "work" / "videos.jsonl").open("a") as file:
        file.write('{"stamp": [1')  # as a kill in the middle of a line leaves it
    folder.start_attempt()
    assert run(config, folder)["counts"]["pairs"] == 2 and seen == ["0.mp4", "1.mp4", "2.mp4", "3.mp4"]
    whole, _ = imported(tmp_path / "in", tmp_path / "whole", "jsonl")
    for path in ("shards/shard-00000.tar", "preferences/pairs/pairs-00000.jsonl"):
        assert (folder.path / path).read_bytes() == (whole.path / path).read_bytes()


@pytest.mark.usefixtures("direct")
def test_a_video_that_kills_its_decoder_costs_its_own_pairs(
    tmp_path: Path, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tries each; a full disk is nobody's fault and ends the work."""
    write_lines(tmp_path / "in", clips, [(0, 1), (2, 3)])
    run_one, tries, kind = Direct.run, [], "timeout"

    def failing(self: Direct, row: Row) -> Result:
        if row.name != "3.mp4":
            return run_one(self, row)
        tries.append(row.name)
        return Result([], [], Failure(kind, "probe", "no answer within 1 s", 1))

    monkeypatch.setattr(Direct, "run", failing)
    folder, results = imported(tmp_path / "in", tmp_path / "run", "jsonl", on_bad="skip")
    assert results["problems"] == {"video: timeout": 1} and results["counts"]["pairs"] == 1 and len(tries) == 2
    (row,) = read_jsonl(folder.path / "bad.jsonl")
    assert row["where"] == "pairs.jsonl:2" and "failed 2 times; no answer within 1 s" in row["detail"]
    with pytest.raises(DataError, match="1 bad records"):
        imported(tmp_path / "in", tmp_path / "stopped", "jsonl")
    monkeypatch.setattr(Direct, "run", run_one)  # another limit, or a machine with less to do: the same run goes on
    _, results = imported(tmp_path / "in", tmp_path / "stopped", "jsonl")
    assert results["counts"]["pairs"] == 2
    monkeypatch.setattr(Direct, "run", failing)
    kind = "fatal"
    with pytest.raises(DataError, match=r"3\.mp4 cannot go on: no answer within 1 s"):
        imported(tmp_path / "in", tmp_path / "other", "jsonl", on_bad="skip")


@pytest.mark.usefixtures("direct")
def test_rare_differences_weigh_more(tmp_path: Path, clips: list[Path]) -> None:
    """Differences 0.1, 0.1, 0.1 and 1.0 in two bins, alpha 1: 0.72 / 0.75 = 0.96 and 0.72 / 0.25 = 2.88."""
    write_lines(tmp_path / "in", clips, [(0, 1), (0, 2), (0, 3), (0, 4)])
    path = tmp_path / "in" / "pairs.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, low in zip(lines, (0.9, 0.9, 0.9, 0.0), strict=True):
        line["scores"] = {"chosen": {"overall": 1.0}, "rejected": {"overall": low}}
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    folder, _ = imported(tmp_path / "in", tmp_path / "run", "jsonl", rarity_alpha=1.0, rarity_bins=2)
    weights = [pair.weight for pair in read_preferences(folder.path / "preferences").pairs]
    assert weights == pytest.approx([0.96, 0.96, 0.96, 2.88])
    write_lines(tmp_path / "plain", clips, [(0, 1)])
    with pytest.raises(DataError, match="no pair of the list has any; set it to 0"):
        imported(tmp_path / "plain", tmp_path / "other", "jsonl", rarity_alpha=1.0)


# -- there and back


@pytest.mark.usefixtures("direct")
def test_what_is_exported_comes_back(tmp_path: Path, clips: list[Path]) -> None:
    """F-C 10: everything that a pair of ours can hold, through JSON lines and files; once more gives the same bytes."""
    write_lines(
        tmp_path / "in", clips, [(0, 1), (2, 3), (4, 5)], scores={"chosen": {"overall": 2.0}, "rejected": {"overall": 1}}
    )
    first, _ = imported(tmp_path / "in", tmp_path / "first", "jsonl")
    plain, tied, voted = read_preferences(first.path / "preferences").pairs
    origin = Origin("dit", "a" * 64, 5, {"num_steps": 30, "guidance": [1.0, 3.0]})
    vote, segments = {"annotator": "é", "choice": "winner", "side": "left"}, Segments(0.5, (1, 0, -1))
    rich = [
        replace(plain, pair_id="first", weight=0.25, segments=segments, axes={"motion": "loser", "x": "winner"}),
        replace(tied, tie=True, winner=replace(tied.winner, origin=origin)),
        replace(voted, votes=(vote,), source="by hand", axes={"motion": "tie"}),
    ]
    write_preferences(first.path / "rich", rich, first.path)
    assert export_preferences(first.path / "rich", tmp_path / "out") == 3
    second, _ = imported(tmp_path / "out", tmp_path / "second", "jsonl")
    assert read_preferences(second.path / "preferences").pairs == rich
    assert (second.path / "shards/shard-00000.tar").stat().st_size == (first.path / "shards/shard-00000.tar").stat().st_size
    export_preferences(second.path / "preferences", tmp_path / "again")
    assert (tmp_path / "again/pairs.jsonl").read_bytes() == (tmp_path / "out/pairs.jsonl").read_bytes()
    line = json.loads((tmp_path / "out/pairs.jsonl").read_text().splitlines()[0])
    assert (line["prompt"], line["axes"]) == (PROMPT, {"motion": "rejected", "x": "chosen"})
    assert (tmp_path / "out" / line["chosen"]).read_bytes() == clips[0].read_bytes()


@pytest.mark.usefixtures("direct")
def test_exports_that_cannot_be(tmp_path: Path, clips: list[Path]) -> None:
    write_lines(tmp_path / "in", clips, [(0, 1)])
    folder, _ = imported(tmp_path / "in", tmp_path / "run", "jsonl")
    (pair,) = read_preferences(folder.path / "preferences").pairs
    with pytest.raises(ConfigError, match="is not empty; export into a folder that is new"):
        export_preferences(folder.path / "preferences", tmp_path / "in")

    def wrong(name: str, changed: PreferencePair, clips: str | Path) -> Path:
        return write_preferences(tmp_path / name, [changed], clips)

    other = replace(pair, winner=replace(pair.winner, sha256="0" * 64))
    with pytest.raises(DataError, match=r"pair .* has the SHA-256 .*, the pair says 000.*another one than was judged"):
        export_preferences(wrong("hash", other, folder.path), tmp_path / "a")
    absent = replace(pair, loser=replace(pair.loser, key="nobody"))
    with pytest.raises(DataError, match="has no clip nobody; give the preferences their dataset"):
        export_preferences(wrong("key", absent, folder.path), tmp_path / "b")
    with pytest.raises(ConfigError, match="copy them to this machine first"):
        export_preferences(wrong("far", pair, "https://host.invalid/clips"), tmp_path / "c")


@pytest.mark.usefixtures("direct")
def test_through_the_command_line(tmp_path: Path, clips: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "in", clips, [(0, 1), (2, 3)])
    path = tmp_path / "import.yaml"
    path.write_text(f"source: {tmp_path / 'in'}\nformat: {{kind: jsonl}}\n")
    command = ["dpo", "import", str(path), "--run-dir", str(tmp_path / "run")]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["results"]["counts"]["pairs"] == 2
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().out
    assert main(["dpo", "export", str(tmp_path / "run" / "preferences"), str(tmp_path / "out")]) == 0
    assert "2 pairs in" in capsys.readouterr().out and len(list((tmp_path / "out/videos").iterdir())) == 4
    assert main(["dpo", "export", str(tmp_path / "run"), str(tmp_path / "other")]) == 1
    assert "has no preferences" in capsys.readouterr().err
    assert main(["dpo", "import", str(path), "format={kind: jsnl}"]) == 2
    assert "jsonl" in capsys.readouterr().err
