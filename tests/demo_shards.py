"""Small datasets of rendered clips for tests, in shards like those of curation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipelines.demo import render_shot
from videofm.data.shards import ShardWriter
from videofm.media import write_video
from videofm.shapes import motifs


def write_demo_shards(
    folder: Path, num_clips: int = 24, num_shards: int = 3, num_frames: int = 11, size: int = 32, held_out: int = 4
) -> Path:
    """`num_clips` clips of `num_frames` frames; the last `held_out` of them are held out."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = motifs()
    for shard in range(num_shards):
        with ShardWriter(folder, f"{shard:05d}", "test") as writer:
            for index in range(shard, num_clips, num_shards):
                motif = shapes[index % len(shapes)]
                rng = np.random.default_rng(index)
                frames = render_shot(motif.colour, motif.shape, motif.direction, num_frames, size, rng)
                path = folder / "clip.mp4"
                write_video(path, frames, 25)
                writer.add(
                    f"clip-{index:05d}",
                    path.read_bytes(),
                    num_frames=num_frames,
                    fps=25.0,
                    height=size,
                    width=size,
                    caption=motif.caption,
                    source_id=f"source-{index}",
                    split="held_out" if index >= num_clips - held_out else "train",
                )
                path.unlink()
            writer.commit()
    return folder


def write_mixed_shards(folder: Path, shapes: Sequence[tuple[int, int, int]], num_shards: int = 2) -> Path:
    """A clip of each of `shapes` (frames, height, width): a square shot, cut to its first rows and columns."""
    folder.mkdir(parents=True, exist_ok=True)
    motifs_ = motifs()
    for shard in range(num_shards):
        with ShardWriter(folder, f"{shard:05d}", "test") as writer:
            for index in range(shard, len(shapes), num_shards):
                num_frames, height, width = shapes[index]
                motif, rng = motifs_[index % len(motifs_)], np.random.default_rng(index)
                shot = render_shot(motif.colour, motif.shape, motif.direction, num_frames, max(height, width), rng)
                path = folder / "clip.mp4"
                write_video(path, shot[:, :height, :width], 25)
                facts = {"num_frames": num_frames, "fps": 25.0, "height": height, "width": width}
                content, source = path.read_bytes(), f"source-{index}"
                writer.add(f"clip-{index:05d}", content, caption=motif.caption, source_id=source, split="train", **facts)
                path.unlink()
            writer.commit()
    return folder
