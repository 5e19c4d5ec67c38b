"""Candidates out of shards: their prompts, and the origins that stand in KEY.json."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.demo_shards import write_demo_shards
from videofm.data.candidates import by_prompt, read_candidates
from videofm.data.manifest import Manifest
from videofm.data.preferences import Origin
from videofm.data.shards import ShardWriter
from videofm.errors import DataError

ORIGIN = Origin("dit", "c" * 64, 7, {"num_steps": 30, "guidance_scale": 3.0})


def write(folder: Path, metadata: list[Any], shard: int = 0) -> Path:
    """Candidates of two prompts in turns; the content of the files does not matter."""
    with ShardWriter(folder, f"{shard:05d}", "test") as writer:
        for number, value in enumerate(metadata):
            prompt, candidate = 10 * shard + number // 2, number % 2
            writer.add(
                f"{prompt:06d}-{candidate:03d}", b"video" * (number + 1), num_frames=9, fps=8.0, height=32, width=32,
                caption=f"prompt {prompt}", source_id=f"group-{prompt}", split="train", metadata=value,
            )  # fmt: skip
        writer.commit()
    return folder


def test_origins_come_back(tmp_path: Path) -> None:
    described = [{"origin": asdict(ORIGIN), "candidate": number} for number in range(4)]
    write(tmp_path, described)
    write(tmp_path, [{}, {"origin": None}], shard=1)
    found = read_candidates(Manifest.load(tmp_path))
    keys = ["000000-000", "000000-001", "000001-000", "000001-001", "000010-000", "000010-001"]
    assert [candidate.key for candidate in found] == keys
    assert [candidate.origin for candidate in found] == [ORIGIN] * 4 + [None] * 2
    assert found[2].prompt == "prompt 1" and found[2].record.size == 15
    groups = by_prompt(reversed(found))
    assert [[candidate.key for candidate in group] for group in groups.values()] == [keys[:2], keys[2:4], keys[4:]]


def test_videos_that_were_begun_from_different_clips_are_no_pair(tmp_path: Path) -> None:
    begun = [replace(ORIGIN, sampler={"from_clip": {"key": str(clip), "sha256": str(clip) * 64}}) for clip in (1, 1, 2, 2)]
    write(tmp_path, [{"origin": asdict(origin)} for origin in begun[1:3]])
    assert [len(group) for group in by_prompt(read_candidates(Manifest.load(tmp_path))).values()] == [1, 1]


def test_any_dataset_serves(tmp_path: Path) -> None:
    write_demo_shards(tmp_path, num_clips=4, num_shards=1, num_frames=3, held_out=1)
    found = read_candidates(Manifest.load(tmp_path))
    assert len(found) == 3 and {candidate.origin for candidate in found} == {None}


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ({"generator": "dit"}, "clip 000000-000: its origin has generator, and generator, policy, sampler, seed are wanted"),
        ("dit", "clip 000000-000: its origin has 'dit', and"),
        ({**asdict(ORIGIN), "mood": 1}, "has generator, mood, policy"),
    ],
)
def test_what_is_no_origin(tmp_path: Path, origin: Any, message: str) -> None:
    write(tmp_path, [{"origin": origin}, {}])
    with pytest.raises(DataError, match=message):
        read_candidates(Manifest.load(tmp_path))
