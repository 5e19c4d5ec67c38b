"""Records of candidates, and pairs over them, that the tests of preferences share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.demo import render_shot
from videofm.config.data import DataConfig
from videofm.data.index import ClipRecord
from videofm.data.preferences import Origin, PreferencePair, Side, write_preferences
from videofm.data.shards import ShardWriter
from videofm.media import write_video
from videofm.shapes import motifs

POLICY, OLDER = "a" * 64, "b" * 64


def side(record: ClipRecord, overall: float | None = None, policy: str | None = POLICY) -> Side:
    """A side of a pair as `videofm dpo rank` writes it."""
    scores = {} if overall is None else {"overall": overall}
    return Side(record.key, record.sha256, scores, Origin("base", policy, 7, {"num_steps": 4}))


def pair_of(winner: ClipRecord, loser: ClipRecord, **changes: Any) -> PreferencePair:
    """The pair of two clips, named by them."""
    pair = PreferencePair(f"{winner.key}-{loser.key}", winner.caption, side(winner), side(loser))
    return replace(pair, **changes)


def candidates(num_prompts: int, num_candidates: int = 2, num_shards: int = 2) -> list[ClipRecord]:
    """Candidates of 12 frames of 32x40, as an index has them; file names are their hashes."""
    found = []
    for prompt in range(num_prompts):
        for number in range(num_candidates):
            key = f"{prompt:06d}-{number:03d}"
            shard = f"shards/{prompt % num_shards}.tar"
            facts = (12, 24.0, 32, 40, f"prompt {prompt}", str(prompt), "train", {})
            found.append(ClipRecord(key, shard, 0, 1, f"sha-{key}", *facts))
    return found


def neighbours(records: Sequence[ClipRecord]) -> list[PreferencePair]:
    """Pairs of the first with the second record, the third with the fourth, and so on."""
    return [pair_of(winner, loser) for winner, loser in zip(records[::2], records[1::2], strict=True)]


def data_config(preferences: Path, section: dict[str, Any] | None = None, **changes: Any) -> DataConfig:
    """Two micro-batches of two pairs of 9 x 32 x 32."""
    values: dict[str, Any] = {
        "manifest": "clips", "num_frames": 9, "height": 32, "width": 32, "crop": "random", "micro_batch_size": 2,
        "num_micro_batches": 2, "pairs": {"path": str(preferences), **(section or {})},
    }  # fmt: skip
    return DataConfig.model_validate(values | changes)


def write_candidates(folder: Path, num_prompts: int, num_shards: int = 2, size: int = 32) -> Path:
    """A dataset of two rendered clips of 11 frames for each prompt: the winner `-000` moves as told, the loser backwards."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = motifs()
    for shard in range(num_shards):
        with ShardWriter(folder, f"{shard:05d}", "test") as writer:
            for prompt in range(shard, num_prompts, num_shards):
                motif = shapes[prompt % len(shapes)]
                shot = render_shot(motif.colour, motif.shape, motif.direction, 11, size, np.random.default_rng(prompt))
                for number, frames in enumerate((shot, shot[::-1])):
                    write_video(folder / "clip.mp4", np.ascontiguousarray(frames), 25)
                    content = (folder / "clip.mp4").read_bytes()
                    writer.add(
                        f"{prompt:06d}-{number:03d}", content, num_frames=11, fps=25.0, height=size, width=size,
                        caption=motif.caption, source_id=str(prompt), split="train",
                    )  # fmt: skip
                (folder / "clip.mp4").unlink()
            writer.commit()
    return folder


def write_neighbours(folder: Path, records: Sequence[ClipRecord], clips: Path | str = "clips") -> Path:
    """Preferences of `neighbours`."""
    return write_preferences(folder, neighbours(records), clips)
