"""Jobs of a launch for people and programs: `videofm launch status` and `logs`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.submission import JobState, Launch, stage_folders
from videofm.errors import ConfigError, DataError
from videofm.registry import nearest
from videofm.run_dir import RunDirectory


def as_json(launch: Launch, states: Sequence[JobState]) -> dict[str, Any]:
    """Jobs and stages as plain values."""
    jobs = [{**asdict(state.job), "state": state.state, "detail": state.detail} for state in states]
    return {
        "run": str(launch.run),
        "launcher": launch.launcher,
        "time": launch.time,
        "cancelled": launch.cancelled,
        "jobs": jobs,
        "stages": [_stage(launch, folder) for folder in stage_folders(launch.run)],
    }


def as_text(launch: Launch, states: Sequence[JobState]) -> str:
    """Jobs and stages, a line each."""
    lines = [f"{launch.run}: launched on {launch.launcher}, {launch.time}" + (", cancelled" if launch.cancelled else "")]
    for state in states:
        stage = f" ({state.job.stage})" if state.job.stage else ""
        lines.append(f"  job {state.job.id}{stage}: {state.state}" + (f" ({state.detail})" if state.detail else ""))
    for stage in as_json(launch, ())["stages"]:
        step = (
            "" if stage["step"] is None else f", step {stage['step']}" + _of(stage["max_steps"]) + f", loss {stage['loss']:.4g}"
        )
        message = f": {stage['message']}" if stage["message"] else ""
        lines.append(f"  {stage['stage']}: attempt {stage['attempt']} {stage['state']}{step}{message}")
    return "\n".join(lines)


def logs(launch: Launch, stage: str | None, rank: int | None, num_lines: int) -> str:
    """The last `num_lines` of each file that tells about the launch.

    Args:
        launch: whose.
        stage: of a recipe; None takes the one that worked last.
        rank: of the newest attempt of that stage; None takes the log of the stage and what its job printed.
        num_lines: of each file.

    Raises:
        ConfigError: there is no such stage or rank.
    """
    folder = _folder(launch, stage)
    files: list[Path] = []
    if rank is not None:
        if folder is None:
            raise ConfigError(f"{launch.run} has no attempt yet, so no rank wrote anything; `videofm launch status` tells why")
        attempt = RunDirectory(folder).newest_attempt
        files = sorted(path for path in attempt.glob(f"rank_{rank}[._]*") if path.suffix in (".log", ".out", ".txt"))
        if not files:
            known = sorted({int(path.stem.split("_")[1]) for path in attempt.glob("rank_[0-9]*")})
            raise ConfigError(f"rank {rank} wrote nothing in {attempt}; these did: {', '.join(map(str, known)) or 'none'}")
    else:
        printed = [launch.run / job.log for job in launch.jobs if job.log is not None and stage in (None, job.stage)]
        files = [path for path in printed if path.is_file()]
        files += [path for path in ([folder / "log.txt"] if folder is not None else []) if path.is_file()]
    if not files:
        return f"{launch.run}: nothing was written yet"
    return "\n".join(f"==> {path} <==\n{tail(path, num_lines)}" for path in files)


def tail(path: Path, num_lines: int) -> str:
    """The last lines of a file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return "".join(deque(file, num_lines)).rstrip("\n")


def _folder(launch: Launch, stage: str | None) -> Path | None:
    folders = stage_folders(launch.run)
    if stage is None:
        return max(folders, key=lambda folder: RunDirectory(folder).newest_attempt.stat().st_mtime, default=None)
    named = {folder.name: folder for folder in folders if folder != launch.run}
    if stage not in named:
        raise ConfigError(
            f"{launch.run} has no stage {stage!r} that began{nearest(stage, named) or '.'} It has: {', '.join(named) or 'none'}"
        )
    return named[stage]


def _stage(launch: Launch, folder: Path) -> dict[str, Any]:
    """How far a stage is."""
    run = RunDirectory(folder)
    outcome = run.outcome
    try:
        rows = run.metrics()
    except DataError:
        rows = []
    last = next((row for row in reversed(rows) if row.get("loss") is not None), None)
    trainer = run.config.get("trainer") if (folder / "config.yaml").exists() else None
    return {
        "stage": folder.name,
        "attempt": int(run.newest_attempt.name),
        "state": "unfinished" if outcome is None else outcome["state"],
        "message": "" if outcome is None else outcome["message"],
        "step": None if last is None else last["step"],
        "max_steps": trainer["max_steps"] if isinstance(trainer, dict) else None,
        "loss": None if last is None else last["loss"],
    }


def _of(number: int | None) -> str:
    return "" if number is None else f" of {number}"
