"""Stage `dpo_rank`: from shards of rendered candidates to preferences, with damage, a stop, and what the report shows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.demo import render_shot
from tests.unit.data.preferred import data_config
from videofm import media
from videofm.cli import main
from videofm.config.rank import RankConfig
from videofm.data.manifest import Manifest
from videofm.data.pairs import PairPlan
from videofm.data.preferences import Origin, read_preferences
from videofm.data.shards import ShardWriter
from videofm.errors import ConfigError, DataError, Interrupted
from videofm.report.page import build
from videofm.run_dir import RunDirectory, read_json, read_jsonl
from videofm.shapes import motifs
from videofm.stages import rank

NUM_FRAMES, SIZE = 9, 32
PROMPTS = [motifs()[0], motifs()[13], motifs()[30]]
KINDS = ("right", "backwards", "jumpy", "still")
"""What the candidates of each prompt show, from best to worst."""
ORIGIN = Origin("dit", "b" * 64, 3, {"num_steps": 4})


def frames_of(prompt: int, kind: str) -> media.Frames:
    motif = PROMPTS[prompt]
    frames = render_shot(motif.colour, motif.shape, motif.direction, NUM_FRAMES, SIZE, np.random.default_rng(prompt))
    order = {"right": range(9), "backwards": range(9)[::-1], "jumpy": [8, 2, 7, 1, 6, 0, 5, 1, 0], "still": [0] * 9}[kind]
    return frames[list(order)]


def write_candidates(
    folder: Path, replaced: dict[str, bytes | media.Frames] | None = None, captions: Sequence[str] = ()
) -> Path:
    """Four candidates of each prompt, one of each kind; `replaced` has other content for some keys."""
    with ShardWriter(folder, "00000", "test") as writer:
        for prompt, motif in enumerate(PROMPTS):
            for candidate, kind in enumerate(KINDS):
                key = f"{prompt:06d}-{candidate:03d}"
                content = (replaced or {}).get(key, frames_of(prompt, kind))
                if not isinstance(content, bytes):
                    media.write_video(folder / "clip.mp4", content, 8)
                    content = (folder / "clip.mp4").read_bytes()
                writer.add(
                    key, content, num_frames=NUM_FRAMES, fps=8.0, height=SIZE, width=SIZE, split="train",
                    caption=captions[prompt] if captions else motif.caption, source_id=f"{prompt:06d}",
                    metadata={"origin": asdict(ORIGIN)},
                )  # fmt: skip
        writer.commit()
    return folder


def ranked(tmp_path: Path, name: str = "rank", **fields: Any) -> tuple[RunDirectory, dict[str, Any]]:
    config = config_of(tmp_path, **fields)
    folder = RunDirectory.create(tmp_path / name, config)
    return folder, rank.run(config, folder)


def config_of(tmp_path: Path, **fields: Any) -> RankConfig:
    value = {"kind": "dpo_rank", "manifest": str(tmp_path / "candidates"), "reward": {"kind": "moving_shapes"}, "batch_size": 5}
    return RankConfig.model_validate({**value, **fields})


@pytest.fixture
def candidates(tmp_path: Path) -> Path:
    return write_candidates(tmp_path / "candidates")


def test_the_right_one_wins_and_the_still_one_loses(tmp_path: Path, candidates: Path) -> None:
    """Of each prompt four candidates whose order is known; all six pairs of each agree with it."""
    folder, results = ranked(tmp_path, pairs="all")
    preferences = read_preferences(folder.path / "preferences")
    assert Path(preferences.clips) == candidates and len(preferences.pairs) == 18
    place = {f"{prompt:06d}-{number:03d}": number for prompt in range(3) for number in range(4)}
    assert all(place[pair.winner.key] < place[pair.loser.key] for pair in preferences.pairs)
    assert all(pair.winner.key[:6] == pair.loser.key[:6] and not pair.tie for pair in preferences.pairs)
    assert preferences.pairs[0].winner.origin == ORIGIN
    assert preferences.header["reward"]["kind"] == "moving_shapes"
    section = {"policies": [ORIGIN.policy]}
    plan = PairPlan([Manifest.load(preferences.clips)], data_config(folder.path / "preferences", section), 0)
    assert plan.num_pairs == 18 and plan.left_out() == []
    rows = list(read_jsonl(folder.path / "scores.jsonl"))
    assert [row["key"] for row in rows] == sorted(place) and not (folder.path / "scores.partial.jsonl").exists()
    assert results["counts"] == {"prompts": 3, "candidates": 12, "scored": 12, "pairs": 18, "ties": 0}
    assert results["preferences"] == str(folder.path / "preferences")


def test_the_numbers_are_those_of_the_rows(tmp_path: Path, candidates: Path) -> None:
    """Recomputed from scores.jsonl; direction decides best against worst in every pair, colour in none."""
    folder, results = ranked(tmp_path)
    scores = {row["key"]: row["scores"] for row in read_jsonl(folder.path / "scores.jsonl")}
    by_axis = {row["axis"]: row for row in results["rows"]}
    for axis, row in by_axis.items():
        assert row["mean"] == pytest.approx(np.mean([one[axis] for one in scores.values()]))
        assert row["mean_of_winners"] == pytest.approx(np.mean([scores[f"{n:06d}-000"][axis] for n in range(3)]))
        assert row["mean_of_losers"] == pytest.approx(np.mean([scores[f"{n:06d}-003"][axis] for n in range(3)]))
    assert [by_axis["direction"][name] for name in ("winner_better", "loser_better", "equal")] == [3, 0, 0]
    assert [by_axis["colour"][name] for name in ("winner_better", "loser_better", "equal")] == [0, 0, 3]
    best = [max(scores[f"{n:06d}-{m:03d}"]["overall"] for m in range(4)) for n in range(3)]
    assert results["mean_by_place"][0] == pytest.approx(np.mean(best)) and len(results["mean_by_place"]) == 4
    (metric,) = read_json(folder.path / "evaluation.json")["metrics"]
    assert {name: metric[name] for name in results if name != "preferences"} == {
        name: value for name, value in results.items() if name != "preferences"
    }


def test_a_stop_keeps_the_scores_and_the_end_is_the_same(
    tmp_path: Path, candidates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after two batches of five, with a last line that was cut: what is left is scored, and nothing twice."""
    whole, _ = ranked(tmp_path, "whole")
    config = config_of(tmp_path)
    folder = RunDirectory.create(tmp_path / "rank", config)
    seen: list[str] = []
    frames = rank._frames

    def watched(manifest: Any, candidate: Any, decoder: Any) -> media.Frames:
        seen.append(candidate.key)
        if len(seen) == 10:
            folder.request_stop()
        return frames(manifest, candidate, decoder)

    with monkeypatch.context() as patch:
        patch.setattr(rank, "_frames", watched)
        with pytest.raises(Interrupted, match="stopped on request with 10 of 12 candidates scored"):
            rank.run(config, folder)
    assert not (folder.path / "preferences").exists()
    partial = folder.path / "scores.partial.jsonl"
    partial.write_text(partial.read_text()[:-20])
    folder.start_attempt()
    with monkeypatch.context() as patch:
        patch.setattr(rank, "_frames", watched)
        patch.setattr(rank, "_write_sheet", lambda *_: None)
        rank.run(config, folder)
    assert seen[10:] == ["000002-001", "000002-002", "000002-003"]
    for name in ("scores.jsonl", "preferences/pairs/pairs-00000.jsonl", "preferences/preferences.json"):
        assert (folder.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_the_size_of_a_batch_changes_nothing(tmp_path: Path, candidates: Path) -> None:
    one, _ = ranked(tmp_path, "one", batch_size=1)
    many, _ = ranked(tmp_path, "many", batch_size=64)
    assert (one.path / "scores.jsonl").read_bytes() == (many.path / "scores.jsonl").read_bytes()


def test_bad_candidates_are_told_and_skipped_only_where_asked(tmp_path: Path) -> None:
    """One file that is no video, one that has fewer frames than its index says, one that is another's copy, and no more pairs
    of any of them."""
    motif_frames = frames_of(1, "right")
    write_candidates(
        tmp_path / "candidates",
        {"000000-001": b"no video at all", "000001-002": motif_frames[:4], "000002-003": frames_of(2, "right")},
    )
    with pytest.raises(DataError, match=r"candidate 000002-003 .*same file: it is the file of 000002-000.*on_bad: skip"):
        ranked(tmp_path)
    folder, results = ranked(tmp_path, "skip", on_bad="skip", pairs="all")
    problems = {row["key"]: row["problem"] for row in read_jsonl(folder.path / "scores.jsonl") if "problem" in row}
    assert sorted(problems) == ["000000-001", "000001-002", "000002-003"]
    assert results["problems"] == {"does not decode": 2, "same file": 1}
    assert results["counts"] == {"prompts": 3, "candidates": 12, "scored": 9, "pairs": 9, "ties": 0}
    named = {side.key for pair in read_preferences(folder.path / "preferences").pairs for side in (pair.winner, pair.loser)}
    assert not named & set(problems) and len(named) == 9


def test_a_video_that_does_not_decode_stops_by_default(tmp_path: Path) -> None:
    write_candidates(tmp_path / "candidates", {"000000-001": b"no video at all"})
    with pytest.raises(DataError, match=r"candidate 000000-001 of .* does not decode: .*Make it again, or leave"):
        ranked(tmp_path)


def test_a_caption_that_cannot_be_judged_costs_its_own_candidates_only(tmp_path: Path) -> None:
    write_candidates(tmp_path / "candidates", captions=[PROMPTS[0].caption, "a dog", PROMPTS[2].caption])
    with pytest.raises(DataError, match=r"candidate 000001-000 .*cannot be judged: caption 'a dog' must name one colour"):
        ranked(tmp_path)
    _, results = ranked(tmp_path, "skip", on_bad="skip")
    assert results["problems"] == {"cannot be judged": 4} and results["counts"]["pairs"] == 2
    assert results["left_out"] == {"more than num_pairs of a prompt": 2, "prompts with fewer than two candidates": 1}


def test_scores_that_are_not_finite_are_bad(tmp_path: Path, candidates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        def score(self, videos: Sequence[media.Frames], captions: Sequence[str]) -> list[dict[str, float]]:
            return [{"overall": float("nan") if "left" in text else 1.0 + number} for number, text in enumerate(captions)]

    monkeypatch.setattr(rank, "reward_of", lambda _: Odd())
    with pytest.raises(DataError, match="score not finite: overall"):
        ranked(tmp_path)

    class Wrong:
        def score(self, videos: Sequence[media.Frames], captions: Sequence[str]) -> list[dict[str, float]]:
            return [{"motion": 1.0} for _ in videos]

    monkeypatch.setattr(rank, "reward_of", lambda _: Wrong())
    with pytest.raises(ConfigError, match="each with 'overall'"):
        ranked(tmp_path)


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        ranked(tmp_path, manifest=str(tmp_path / "nothing"))
    same = frames_of(0, "right")
    write_candidates(tmp_path / "candidates", {f"{p:06d}-{c:03d}": same for p in range(3) for c in range(4)})
    with pytest.raises(DataError, match=r"no pair is left of 12 candidates of 3 prompts \(3 prompts with fewer than two"):
        ranked(tmp_path, "skip", on_bad="skip")


def test_the_report_shows_the_ranking(tmp_path: Path, candidates: Path) -> None:
    folder, _ = ranked(tmp_path)
    page = build(folder.path)
    assert "winners_vs_losers.png" in page and "data:image/png;base64," in page
    assert "mean_by_place by place among the candidates of a prompt" in page
    for text in ("<h3>dpo_rank: ", "winner better", "counts.pairs <b>3</b>", "smoothness"):
        assert text in page
    json.dumps(read_json(folder.path / "evaluation.json"))


def test_through_the_command_line(tmp_path: Path, candidates: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A YAML and overrides; once more there is nothing to do; a wrong key is told with the nearest."""
    path = tmp_path / "rank.yaml"
    path.write_text(f"manifest: {candidates}\nreward: {{kind: moving_shapes, weights: {{direction: 2.0}}}}\n")
    command = ["dpo", "rank", str(path), "--run-dir", str(tmp_path / "run"), "pairs=all", "num_pairs=2"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["results"]["counts"]["pairs"] == 6
    assert len(read_preferences(tmp_path / "run" / "preferences").pairs) == 6
    assert main(command) == 0 and "nothing to do" in capsys.readouterr().out
    assert main([*command, "--dry-run"]) == 0
    assert main(["dpo", "rank", str(path), "marginn=0.1"]) == 2
    assert "margin" in capsys.readouterr().err
    assert main(["dpo", "rank", str(path), "reward={kind: movin_shapes}"]) == 2
    assert "moving_shapes" in capsys.readouterr().err
