"""Stage `dpo_generate`: candidate videos of prompts as a dataset, and some of them to look at.

```
shards/ index/ manifest/   the dataset; header-candidates.json says what made it
samples/KEY.mp4            some candidates of some prompts; samples/contact_sheet.png and samples.jsonl show and list them
```
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from data_pipelines.candidates import run as candidates
from data_pipelines.candidates.clips import choose_clips
from data_pipelines.candidates.shard import Candidate
from videofm import media
from videofm.config.candidates import CandidatesConfig
from videofm.data.manifest import read_entry, read_index
from videofm.data.shards import read_clip
from videofm.run_dir import RunDirectory, write_atomic
from videofm.stages.sample import read_prompts

_SHEET_PROMPTS, _SHEET_CANDIDATES = 12, 4
"""Prompts on the contact sheet, and candidates of each, at most."""


def run(config: CandidatesConfig, run: RunDirectory) -> dict[str, Any]:
    """Make the candidates that are missing, then the sheet.

    Returns:
        What `data_pipelines.candidates.run.run` returns.

    Raises:
        ConfigError: no prompts, or a storyboard in their place.
        DataError: no clip of `from_clips` serves.
        VideofmError: see there.
    """
    clips = choose_clips(config, config.from_clips) if config.from_clips is not None else []
    prompts = [clip.caption for clip in clips] or read_prompts(config)
    result = candidates.run(config, prompts, run, clips)
    _write_samples(config, prompts, run)
    return result


def _write_samples(config: CandidatesConfig, prompts: list[str], run: RunDirectory) -> None:
    """Some prompts, spread over all, and the first candidates of each."""
    shown = np.linspace(0, len(prompts) - 1, min(len(prompts), _SHEET_PROMPTS)).round().astype(int).tolist()
    folder = run.path / "samples"
    folder.mkdir(exist_ok=True)
    rows, stacks = [], []
    for number in shown:
        entry = read_entry(run.path, f"{number // config.prompts_a_shard:05d}")
        records = {record.key: record for record in read_index(run.path, entry)}
        stack = []
        for candidate in range(min(config.num_candidates, _SHEET_CANDIDATES)):
            key = Candidate(number, candidate, prompts[number]).key
            path = folder / f"{key}.mp4"
            path.write_bytes(read_clip(run.path, records[key]))
            rows.append({"file": f"samples/{path.name}", "caption": prompts[number]})
            stack.append(media.spread_frames(path, 5))
        stacks.append(stack)
    media.stacked_sheet(stacks, [prompts[number] for number in shown], folder / "contact_sheet.png", columns=3)
    write_atomic(run.path / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
