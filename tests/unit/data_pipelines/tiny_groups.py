"""A group of tiny sources for tests of what a task does, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import demo
from data_pipelines.groups import Job
from data_pipelines.reports import Summary, read_losses
from data_pipelines.rows import Row

STAGES = [{"kind": "scores"}, {"kind": "transcode", "height": 32, "width": 32, "fps": 25.0}]


def make_rows(folder: Path, *names: str) -> list[Row]:
    """Real files of 12 frames of 32x32, and rows for them."""
    rng = np.random.default_rng(0)
    made = []
    for number, name in enumerate(names):
        path = folder / f"{name}.mp4"
        demo.write_video(path, demo.render_shot("red", "circle", "left", 12, 32, rng), 25)
        made.append(Row(f"{number:024d}", path.name, str(path), path.stat().st_size))
    return made


def job(folder: Path, rows: list[Row], **changes: Any) -> Job:
    """A job on one group of `rows` in `folder`/out; `changes` are fields of a `Job` or of its limits."""
    sources = folder / "out" / "sources" / "00000.jsonl"
    sources.parent.mkdir(parents=True, exist_ok=True)
    sources.write_text("".join(json.dumps(row.to_json()) + "\n" for row in sorted(rows, key=lambda row: row.source_id)))
    fields = set(Job.__dataclass_fields__)
    limits = {"task_memory_mib": 512, "task_timeout": 120.0} | {k: v for k, v in changes.items() if k not in fields}
    facts: dict[str, Any] = {
        "folder": str(folder / "out"), "group": "00000", "step": 0, "stages": STAGES, "names": ["scores", "transcode"],
        "config_hash": "c", "inputs_hash": "i", "pack": True, "limits": limits,
    }  # fmt: skip
    return Job(**facts | {k: v for k, v in changes.items() if k in fields})


def report(folder: Path, step: int = 0, group: str = "00000") -> tuple[Summary, list[dict[str, Any]]]:
    """The summary of a group, and its losses."""
    summary = Summary.load(folder / "out", step, group)
    assert summary is not None
    return summary, list(read_losses(folder / "out", step, group))
