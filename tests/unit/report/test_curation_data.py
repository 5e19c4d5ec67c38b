"""What the report reads of a curation run: all of a small one, a bounded sample of a large one, the same each time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from videofm.data.shards import ShardWriter
from videofm.report import curation_data
from videofm.report.curation_data import gather, lowest, sampled_lines, thresholds_of

CONFIG = {"stages": [{"kind": "filter", "rules": [{"score": "motion", "min": 0.3, "reason": "static"}]}]}


def write_dataset(path: Path, num_shards: int = 3, num_clips: int = 4) -> list[float]:
    """A dataset of clips that are no videos; the motion of each."""
    motions = []
    for shard in range(num_shards):
        with ShardWriter(path, f"{shard:05d}", "0" * 64) as writer:
            for clip in range(num_clips):
                motion = (shard * num_clips + clip) / (num_shards * num_clips)
                motions.append(motion)
                writer.add(
                    f"s{shard:03d}-{clip:08d}", b"no video", num_frames=10 + clip, fps=25.0, height=32, width=64,
                    caption="x" * shard, source_id=f"s{shard:03d}", split="train", scores={"motion": motion, "blur": 3.0},
                )  # fmt: skip
            writer.commit()
    return motions


def write_losses(path: Path, losses: Sequence[dict[str, Any]], name: str = "dropped.jsonl") -> None:
    (path / name).write_text("".join(json.dumps(loss) + "\n" for loss in losses))


def a_loss(number: int, reason: str = "static", **more: Any) -> dict[str, Any]:
    span = {"start": 10 * number, "stop": 10 * number + 10}
    return {
        "kind": "dropped",
        "stage": "filter",
        "source": f"{number:04d}.mp4",
        "reason": reason,
        "detail": "d",
        **span,
        **more,
    }


def funnel_of(**reasons: int) -> list[dict[str, Any]]:
    num_in = 12 + sum(reasons.values())
    return [{"stage": "filter", "num_in": num_in, "num_out": 12, "num_made": 12, "dropped": reasons}]


def test_a_small_run_is_read_whole(tmp_path: Path) -> None:
    """Scores of kept and lost clips, facts, samples and counts, against those that went in."""
    motions = write_dataset(tmp_path)
    write_losses(tmp_path, [a_loss(i, scores={"motion": -0.01 * i}) for i in range(7)] + [a_loss(9, "late", scores={})])
    broken = {"kind": "quarantined", "stage": "probe", "source": "bad.mp4", "reason": "empty", "detail": "no bytes"}
    write_losses(tmp_path, [broken], "quarantine.jsonl")
    funnel = [{"stage": "probe", "num_in": 9, "num_out": 8, "num_made": 20, "quarantined": {"empty": 1}}]
    data = gather(tmp_path, CONFIG, [*funnel, *funnel_of(static=7, late=1)])
    by_name = {histogram.name: histogram for histogram in data.scores}
    assert list(by_name) == ["blur", "motion"]
    assert (by_name["motion"].num_kept, by_name["motion"].num_lost, by_name["blur"].num_lost) == (12, 7, 0)
    assert by_name["motion"].total == pytest.approx(sum(motions) - 0.21)
    assert by_name["motion"].refused == [7 + sum(motion < 0.3 for motion in motions)]
    assert data.constants == {"fps": 25.0, "height": 32.0, "width": 64.0}
    assert [histogram.name for histogram in data.facts] == ["duration", "frames", "caption length"]
    assert data.facts[0].total == pytest.approx(3 * sum(range(10, 14)) / 25)
    assert len(data.kept) == 12
    assert {reason: len(losses) for reason, losses in data.lost.items()} == {
        ("filter", "dropped", "static"): 7, ("filter", "dropped", "late"): 1, ("probe", "quarantined", "empty"): 1,
    }  # fmt: skip
    assert broken.items() <= data.quarantined[0].items() and data.num_quarantined == len(data.quarantined) == 1
    assert (data.num_read, data.num_shards, data.lists_cut, data.problems) == (3, 3, False, [])


def test_missing_values_are_not_counted(tmp_path: Path) -> None:
    """A score that only some clips of a shard have (null in the index), and one that is not a number."""
    with ShardWriter(tmp_path, "00000", "0" * 64) as writer:
        for clip, scores in enumerate(({"text": 1.0}, {}, {"text": float("nan")}, {"text": 3.0})):
            writer.add(
                f"s-{clip:08d}", b"x", num_frames=9, fps=8.0, height=8, width=8, caption="", source_id="s", split="train",
                scores=scores,
            )  # fmt: skip
        writer.commit()
    (histogram,) = gather(tmp_path, {}, []).scores
    assert (histogram.num_kept, histogram.total) == (2, 4.0)


def test_a_large_run_is_read_in_part_the_same_part_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path, num_shards=6, num_clips=3)
    write_losses(tmp_path, [a_loss(i) for i in range(100)])
    for name, value in (("MAX_SHARDS", 2), ("MAX_KEPT", 4), ("MAX_LOST", 5)):
        monkeypatch.setattr(curation_data, name, value)
    data = gather(tmp_path, CONFIG, funnel_of(static=100))
    assert (data.num_read, data.num_shards, len(data.kept)) == (2, 6, 4)
    assert len({record.shard for record in data.kept}) <= 2
    assert all(histogram.num_kept == 6 for histogram in data.scores)
    (shown,) = data.lost.values()
    assert len(shown) == 5
    write_losses(tmp_path, [a_loss(i) for i in reversed(range(100))])
    again = gather(tmp_path, CONFIG, funnel_of(static=100))
    assert (again.lost, again.kept) == (data.lost, data.kept)


def test_many_reasons_share_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curation_data, "MAX_ALL_LOST", 20)
    write_losses(tmp_path, [a_loss(i, f"reason_{i % 8}") for i in range(200)])
    data = gather(tmp_path, {}, funnel_of())
    assert [len(losses) for losses in data.lost.values()] == [2] * 8


def test_samples_do_not_depend_on_the_order() -> None:
    items = [f"{number}" for number in range(1000)]
    shuffled = list(np.random.default_rng(1).permutation(items))
    assert lowest(items, 10, str) == lowest(shuffled, 10, str)
    assert lowest(items, 10, str) != items[:10]
    assert len(lowest(items[:3], 10, str)) == 3


def test_lines_of_a_large_list_come_whole_and_from_all_over(tmp_path: Path) -> None:
    """Of 10,000 lines about 1 in 10 is read, none twice and none torn; the pieces reach from the first tenth to the last."""
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps({"number": number, "pad": "x" * (number % 50)}) + "\n" for number in range(10_000)))
    size = path.stat().st_size
    numbers = [line["number"] for line in sampled_lines(path, most=size // 10, num_pieces=16)]
    assert numbers == sorted(set(numbers))
    assert 800 < len(numbers) < 1200
    assert {number // 1000 for number in numbers} == set(range(10))
    assert [line["number"] for line in sampled_lines(path, most=size)] == list(range(10_000))
    assert list(sampled_lines(tmp_path / "none.jsonl")) == []


def test_a_piece_that_begins_at_a_line_begins_with_it(tmp_path: Path) -> None:
    """Lines of 8 bytes in pieces of 8: each piece holds exactly the line that begins in it."""
    path = tmp_path / "list.jsonl"
    path.write_text("".join(f'{{"n":{n}}}\n' for n in range(8)))
    assert [line["n"] for line in sampled_lines(path, most=32, num_pieces=4)] == [0, 2, 4, 6]


def test_thresholds_are_those_of_rules_on_known_scores() -> None:
    config = {
        "stages": [
            {"kind": "probe", "min_side": 16},
            {"kind": "filter", "rules": [{"score": "motion", "min": 1, "max": 2.5}, {"score": "other", "min": 0}]},
            {"kind": "filter", "name": "late", "rules": [{"score": "motion", "min": None, "max": 2}]},
        ]
    }
    found = thresholds_of(config, ["motion", "blur"])
    assert [(item.stage, item.side, item.value) for item in found["motion"]] == [
        ("filter", "min", 1.0), ("filter", "max", 2.5), ("late", "max", 2.0),
    ]  # fmt: skip
    assert found["blur"] == []


def test_a_damaged_index_is_told_and_the_others_are_read(tmp_path: Path) -> None:
    write_dataset(tmp_path, num_shards=3)
    (tmp_path / "index" / "shard-00001.parquet").write_bytes(b"garbage")
    (tmp_path / "manifest" / "shard-00002.json").write_text("{}")
    data = gather(tmp_path, CONFIG, [])
    assert (data.num_read, data.num_shards, len(data.problems)) == (1, 3, 2)
    assert {record.source_id for record in data.kept} == {"s000"}
