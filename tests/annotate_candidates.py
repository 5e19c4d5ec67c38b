"""Small datasets of candidate videos for tests and benchmarks: several rendered clips of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from videofm.data.shards import ShardWriter
from videofm.media import Frames, write_video
from videofm.shapes import COLOURS

PROMPTS = ("a red circle moving left", "a green square moving up", "a blue circle moving down")
FPS = 12.0


def moving_frames(colour: str, number: int, num_frames: int = 9, size: int = 32) -> Frames:
    """A square of `colour`, uint8 (T, H, W, 3): candidates of a prompt differ in its speed, and many also in the background."""
    frames = np.full((num_frames, size, size, 3), 40 + number // 16 * 8, np.uint8)
    for index in range(num_frames):
        at = (index * (number % 16 + 1)) % (size - 8)
        frames[index, size // 2 - 4 : size // 2 + 4, at : at + 8] = COLOURS[colour]
    return frames


def write_candidates(
    folder: Path, prompts: Sequence[str] = PROMPTS, num_candidates: int = 3, size: int = 32, num_frames: int = 9
) -> Path:
    """A dataset with `num_candidates` clips of each prompt, keys PROMPT-CANDIDATE, with origins."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = list(COLOURS)
    with ShardWriter(folder, "00000", "test") as writer:
        for prompt_number, prompt in enumerate(prompts):
            for number in range(num_candidates):
                frames = moving_frames(colours[prompt_number % len(colours)], number, num_frames, size)
                path = folder / "clip.mp4"
                write_video(path, frames, FPS)
                origin = {"generator": "test", "policy": "0" * 64, "seed": number, "sampler": {"num_steps": 4}}
                writer.add(
                    f"{prompt_number:06d}-{number:03d}",
                    path.read_bytes(),
                    num_frames=num_frames,
                    fps=FPS,
                    height=size,
                    width=size,
                    caption=prompt,
                    source_id=f"prompt-{prompt_number:06d}",
                    split="train",
                    metadata={"origin": origin},
                )
                path.unlink()
        writer.commit()
    return folder
