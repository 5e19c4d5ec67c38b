"""What a run directory holds, read tolerantly: a report about a broken or running job is worth most of all."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from videofm.errors import DataError
from videofm.run_dir import RunDirectory, read_json, read_jsonl

IMAGE_LIMIT, IMAGE_BYTES = 8, 8 << 20
VIDEO_LIMIT, VIDEO_BYTES = 12, 6 << 20
FUNNEL_COUNTS = {"stage", "num_in", "num_out", "num_made"}
SKIPPED_FOLDERS = (
    "attempts",
    "checkpoints",
    "wandb",
    "control",
    "shards",
    "index",
    "manifest",
    "work",
    "tmp",
    "stale",
    "stages",
    "groups",
    "sources",
)


@dataclass
class Stage:
    """A stage as the report shows it. `seconds` is the time of the newest attempt, None when it did not finish; `curation` is
    what funnel.json holds besides the funnel."""

    name: str
    path: Path
    kind: str = "?"
    state: str = "not started"
    seconds: float | None = None
    message: str = ""
    num_attempts: int = 0
    fingerprint: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    code: str = ""
    created: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    goodput: dict[str, Any] = field(default_factory=dict)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    funnel: list[dict[str, Any]] = field(default_factory=list)
    curation: dict[str, Any] = field(default_factory=dict)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)
    videos: list[tuple[Path, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass
class Run:
    """A recipe's run, or a single stage's, with its stages in order."""

    path: Path
    name: str
    code: str
    time: str
    recipe: dict[str, Any] | None
    stages: list[Stage]


def collect(path: Path, writing: Path | None = None) -> Run:
    """Everything about the run at `path`; `writing` is the run directory of the stage that writes this report.

    Raises:
        DataError: `path` is neither the run directory of a recipe nor that of a stage.
    """
    if (path / "recipe.json").exists():
        recipe = read_json(path / "recipe.json")
        stages = [read_stage(name, path / "stages" / name, recipe["stages"][name]) for name in recipe["order"]]
        for stage in stages:
            if writing is not None and stage.path.resolve() == writing.resolve():
                stage.state = "this page"
        return Run(path, recipe["name"], recipe["code"], recipe["time"], recipe["config"], stages)
    if (path / "lineage.json").exists():
        stage = read_stage(path.name, path, {})
        if writing is not None and path.resolve() == writing.resolve():
            stage.state = "finished"  # its page is the last thing that a stage does
        return Run(path, path.name, stage.code, stage.created, None, [stage])
    raise DataError(
        f"{path} is no run directory: it has neither recipe.json (made by `videofm run`) nor lineage.json (made by a stage)"
    )


def read_stage(name: str, path: Path, planned: dict[str, Any]) -> Stage:
    """What the run directory at `path` tells; what cannot be read is listed in `problems`."""
    stage = Stage(name, path, kind=planned.get("kind", "?"))
    run = RunDirectory(path)
    if not (path / "lineage.json").exists():
        return stage
    lineage = _tolerant(stage, lambda: read_json(path / "lineage.json"), {})
    stage.fingerprint, stage.inputs = lineage.get("fingerprint", ""), lineage.get("inputs", {})
    stage.code, stage.created = lineage.get("code", ""), lineage.get("created", "")
    stage.config = _tolerant(stage, lambda: run.config, {})
    stage.kind = stage.config.get("kind", stage.kind)
    stage.environment = _tolerant(stage, lambda: read_json(path / "env.json"), {})
    stage.num_attempts = len(list((path / "attempts").glob("[0-9]*")))
    _read_outcome(stage, _tolerant(stage, lambda: run.outcome, None))
    stage.metrics = _tolerant(stage, run.metrics, [])
    stage.goodput = _tolerant(stage, lambda: _first_json(path, "goodput.json"), None) or {}
    stage.held_out = _tolerant(stage, lambda: list(read_jsonl(path / "held_out.jsonl")), [])
    funnel = _tolerant(stage, lambda: _first_json(path, "funnel.json"), None) or {}
    stage.funnel = [step for step in funnel.get("funnel", []) if step.keys() >= FUNNEL_COUNTS]
    stage.curation = {name: value for name, value in funnel.items() if name != "funnel"}
    evaluation = _tolerant(stage, lambda: _first_json(path, "evaluation.json"), None) or {}
    stage.evaluation = [metric for metric in evaluation.get("metrics", []) if isinstance(metric, dict)]
    stage.images = images_of(path)
    stage.videos = _tolerant(stage, lambda: videos_of(path), [])
    return stage


def _read_outcome(stage: Stage, outcome: dict[str, Any] | None) -> None:
    if outcome is None:
        stage.state = "running, or cut off" if stage.num_attempts else "not started"
        return
    stage.state, stage.message = outcome["state"], outcome.get("message", "")
    stage.results = dict(outcome.get("results", {}))
    stage.seconds = stage.results.pop("seconds", None)


def images_of(path: Path) -> list[Path]:
    """PNG files of a run, newest names last, small enough to embed."""
    found = [
        image
        for image in sorted(path.rglob("*.png"))
        if not set(image.relative_to(path).parts[:-1]) & set(SKIPPED_FOLDERS) and image.stat().st_size <= IMAGE_BYTES
    ]
    return found[-IMAGE_LIMIT:]


def videos_of(path: Path) -> list[tuple[Path, str]]:
    """The first sampled videos, as long as they are small together, each with its caption or the prompts of its windows."""
    videos: list[tuple[Path, str]] = []
    total = 0
    for row in read_jsonl(path / "samples.jsonl"):
        video = path / str(row.get("file", ""))
        if not video.resolve().is_relative_to(path.resolve()) or video.suffix != ".mp4" or not video.is_file():
            continue
        total += video.stat().st_size
        if len(videos) == VIDEO_LIMIT or total > VIDEO_BYTES:
            break
        videos.append((video, _told(row)))
    return videos


def _told(row: dict[str, Any]) -> str:
    """The caption of a row; of a video of several prompts all of them, each once, in their order."""
    windows = row.get("windows")
    spans = [span for span in windows if isinstance(span, dict)] if isinstance(windows, list) else []
    prompts = dict.fromkeys(str(span["prompt"]) for span in spans if "prompt" in span)
    return " -> ".join(prompts) or str(row.get("caption", ""))


def _first_json(path: Path, name: str) -> dict[str, Any] | None:
    return read_json(path / name) if (path / name).exists() else None


def _tolerant(stage: Stage, read: Any, otherwise: Any) -> Any:
    """What `read()` returns; a damaged file becomes a line in `problems`, which the page shows."""
    try:
        return read()
    except (DataError, json.JSONDecodeError, KeyError, OSError, UnicodeDecodeError) as error:
        stage.problems.append(str(error))
        return otherwise
