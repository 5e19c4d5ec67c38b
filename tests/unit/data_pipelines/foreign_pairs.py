"""Small lists of foreign pairs for tests, and what imports them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.child import build_stages, run_stages
from data_pipelines.demo import render_shot
from data_pipelines.foreign_child import CountStage
from data_pipelines.isolate import Result
from data_pipelines.preferences.run import run
from data_pipelines.rows import Row
from data_pipelines.workspace import Workspace
from videofm.config.import_pairs import ImportPairsConfig
from videofm.media import write_video
from videofm.run_dir import RunDirectory

PROMPT = "a red circle moving left"


def make_clips(folder: Path) -> list[Path]:
    """Six sound videos of one shape, a longer one, and a file that is no video."""
    for number in range(7):
        frames = render_shot("red", "circle", "left", 9 if number < 6 else 13, 32, np.random.default_rng(number))
        write_video(folder / f"{number}.mp4", frames, 8)
    (folder / "7.mp4").write_text("not a video\n")
    return sorted(folder.glob("*.mp4"))


class Direct:
    """In the place of `Isolate`: the same stages in this process, which spares the start of a child."""

    def __init__(self, stages: list[dict[str, Any]], scratch: Path, *_: Any) -> None:
        first, second = stages
        counts = second["kind"] == "decode"
        self.stages = [*build_stages([first]), CountStage(second)] if counts else build_stages(stages)
        self.scratch = scratch

    def __enter__(self) -> Direct:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def run(self, row: Row) -> Result:
        events = list(run_stages(self.stages, [row], Workspace(Path(row.path), self.scratch)))
        rows = [Row.from_json(value) for value in events[-1]["rows"]]
        return Result([event for event in events if "stage" in event], rows, None)


def put(clip: Path, *where: str | Path) -> str:
    """Copy a clip to a path and return its name."""
    path = Path(*where)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(clip.read_bytes())
    return path.name


def config_of(source: Path, kind: str, **fields: Any) -> ImportPairsConfig:
    section = {"kind": kind, **fields.pop("format", {})}
    return ImportPairsConfig.model_validate({"kind": "dpo_import", "source": str(source), "format": section, **fields})


def imported(source: Path, into: Path, kind: str, **fields: Any) -> tuple[RunDirectory, dict[str, Any]]:
    config = config_of(source, kind, **fields)
    folder = RunDirectory.create(into, config)
    return folder, run(config, folder)


def write_lines(source: Path, clips: list[Path], pairs: Sequence[tuple[int, int]], **more: Any) -> None:
    """A list of `pairs` of `clips` by number; `more` goes into every line."""
    source.mkdir(parents=True, exist_ok=True)
    lines = []
    for better, worse in pairs:
        for number in (better, worse):
            put(clips[number], source, f"{number}.mp4")
        lines.append({"prompt": PROMPT, "chosen": f"{better}.mp4", "rejected": f"{worse}.mp4", **more})
    (source / "pairs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
