"""A chain of stages: what is done, what is stale, what runs next.

A stage depends on every stage whose run directory (or exported folder) its config names, and on all earlier ones where it names
the whole run, `${run}`. Its fingerprint covers its resolved config and the fingerprints of what it depends on, so that a change
anywhere re-runs exactly what follows from it. Nothing finished is deleted: a stale stage moves to `RUN/stale/NAME-NNNN`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from videofm.config.recipe import ExportConfig, RecipeConfig, StageConfig
from videofm.config.source import interpolate
from videofm.errors import ConfigError, Interrupted
from videofm.lineage import outside_inputs
from videofm.progress import LOG, setup_logging
from videofm.registry import nearest, resolve
from videofm.run_dir import RunDirectory, code_version, fingerprint, now, write_json
from videofm.stages.execute import StopSignals, execute, locked

DRY_RUNS = {
    "train": "videofm.train.build:dry_run",
    "curate": "data_pipelines.curate:dry_run",
    "encode": "data_pipelines.encode.run:dry_run",
    "dpo_generate": "data_pipelines.candidates.run:dry_run",
}
"""Kind -> what builds a stage of it without running it. These need neither weights nor data."""


@dataclass
class PlannedStage:
    """A stage of a recipe, resolved. `state` is done, resume, new or stale (its directory is of another config)."""

    name: str
    config: Any
    path: Path
    inputs: dict[str, str]
    fingerprint: str
    state: str = "new"
    reason: str = ""


@dataclass
class Plan:
    """A resolved recipe: its directory and its stages, in order."""

    recipe: RecipeConfig
    path: Path
    stages: list[PlannedStage] = field(default_factory=list)

    def stage(self, name: str) -> PlannedStage:
        """The stage called `name`.

        Raises:
            ConfigError: there is none; the nearest is offered.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise ConfigError(
            f"the recipe {self.recipe.name} has no stage {name!r}{nearest(name, names)}. Stages: {', '.join(names)}."
        )

    def table(self) -> str:
        """Stages and states as text."""
        rows = [("stage", "kind", "state", "reads", "why")]
        rows += [(s.name, s.config.kind, s.state, _few(list(s.inputs)), s.reason) for s in self.stages]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def plan(recipe: RecipeConfig, force: str | None = None) -> Plan:
    """Resolve `recipe` and look at its run directory; `force` names a stage to run again with all that depends on it.

    Raises:
        ConfigError: a `${...}` that does not exist, or that names a later stage.
    """
    result = Plan(recipe, Path(recipe.run))
    for name in recipe.stages:
        result.stages.append(_planned(name, recipe, result))
    if force is not None:
        result.stage(force).reason = "asked for"
    again: set[str] = set()
    for stage in result.stages:
        _set_state(stage, again)
        if stage.state != "done":
            again.add(stage.name)
    return result


def _planned(name: str, recipe: RecipeConfig, before: Plan) -> PlannedStage:
    """Stage `name` with its placeholders filled and its inputs found; the stages in `before` come earlier."""
    if not name or set(name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") or name.startswith("."):
        raise ConfigError(f"stages.{name}: a name of a stage has letters, digits, `.`, `_` and `-`; it becomes a folder")
    raw = recipe.stages[name].model_dump(mode="json")
    mapping = {"run": str(before.path)} | {f"stage.{stage.name}": str(stage.path) for stage in before.stages}
    if recipe.source is not None:
        mapping["source"] = recipe.source
    later = {other for other in recipe.stages if f"stage.{other}" not in mapping}
    for key, text in _strings(raw):
        if "${source}" in text and recipe.source is None:
            raise ConfigError(f"stages.{name}.{key} = {text!r}: the recipe has no `source`; give one, `source=FOLDER`")
        for other in later:
            if f"${{stage.{other}}}" in text:
                raise ConfigError(f"stages.{name}.{key} = {text!r}: stage {other!r} does not come before {name!r}; move it up")
    try:
        resolved: Any = TypeAdapter(StageConfig).validate_python(interpolate(raw, mapping))
    except ConfigError as error:
        raise ConfigError(f"stages.{name}: {error}") from None
    inputs = {stage.name: stage.fingerprint for stage in before.stages if _reads(resolved, stage, before.path)}
    inputs |= outside_inputs(resolved, before.path)
    return PlannedStage(name, resolved, before.path / "stages" / name, inputs, fingerprint(resolved, inputs))


def _reads(config: BaseModel, stage: PlannedStage, run: Path) -> bool:
    """Whether a string of `config` is the whole run, or lies in what `stage` writes."""
    written = [stage.path] + ([Path(stage.config.output)] if isinstance(stage.config, ExportConfig) else [])
    folders = [Path(os.path.normpath(folder)) for folder in written]
    for _, text in _strings(config.model_dump(mode="json")):
        path = Path(os.path.normpath(text)) if text else None
        if path is not None and (path == Path(os.path.normpath(run)) or any(path.is_relative_to(folder) for folder in folders)):
            return True
    return False


def _strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in `value` with its dotted key."""
    if isinstance(value, str):
        yield key, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from _strings(item, f"{key}.{name}" if key else str(name))


def _set_state(stage: PlannedStage, again: set[str]) -> None:
    """Fill `state` and `reason`; `again` holds the earlier stages that will run."""
    run, forced = RunDirectory(stage.path), bool(stage.reason)
    known = run.fingerprint
    first = next((name for name in stage.inputs if name in again), None)
    if known is None:
        stage.state, stage.reason = "new", ""
    elif known != stage.fingerprint:
        stage.state, stage.reason = "stale", f"{first} runs again" if first else "its config or what it reads has changed"
    elif forced:
        stage.state = "stale"
    elif first is not None:
        stage.state, stage.reason = "stale", f"{first} runs again"
    elif run.finished:
        stage.state = "done"
    else:
        outcome = run.outcome
        stage.state, stage.reason = "resume", outcome["state"] if outcome else "its last attempt was cut off"


def run_recipe(recipe: RecipeConfig, until: str | None = None, force: str | None = None) -> dict[str, Any]:
    """Run what is not done, in order, up to and including stage `until`. Returns stage name -> results.

    Raises:
        Interrupted: stopped on request, resumable.
        VideofmError: a stage failed; later stages did not start.
    """
    chain = plan(recipe, force)
    last = chain.stage(until).name if until is not None else None
    results: dict[str, Any] = {}
    setup_logging(None)
    with locked(chain.path), StopSignals() as signals:
        save_plan(chain)
        for number, stage in enumerate(chain.stages, 1):
            heading = f"[{number}/{len(chain.stages)}] {stage.name}"
            if stage.state == "done":
                LOG.info("%s: done already, skipped", heading)
            else:
                LOG.info("%s: %s%s", heading, stage.state, f" ({stage.reason})" if stage.reason else "")
                if signals.requested:
                    raise Interrupted(f"stopped before stage {stage.name}. The same command goes on from there.")
                if stage.state == "stale":
                    _move_aside(stage, chain.path)
                results[stage.name] = execute(stage.config, stage.path, stage.inputs, signals)
            if stage.name == last:
                break
    return results


def _move_aside(stage: PlannedStage, run: Path) -> None:
    """Keep an outdated run directory under `stale/`; what was finished is not lost."""
    folder = run / "stale"
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + max(
        (int(path.name.rpartition("-")[2]) for path in folder.glob(f"{stage.name}-[0-9][0-9][0-9][0-9]")), default=0
    )
    target = folder / f"{stage.name}-{number:04d}"
    stage.path.rename(target)
    LOG.info("%s: the old run directory is kept as %s", stage.name, target)


def _few(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "-"


def save_plan(chain: Plan) -> None:
    """`RUN/recipe.json`: what the report needs to know about the chain."""
    stages = {
        stage.name: {"kind": stage.config.kind, "fingerprint": stage.fingerprint, "inputs": stage.inputs}
        for stage in chain.stages
    }
    value = {
        "name": chain.recipe.name,
        "config": chain.recipe.model_dump(mode="json"),
        "stages": stages,
        "order": list(stages),
        "code": code_version(),
        "time": now(),
    }
    write_json(chain.path / "recipe.json", value)


def dry_run(recipe: RecipeConfig, force: str | None = None) -> str:
    """Resolve and check everything, build what can be built, run nothing. Returns the table and one remark a stage."""
    chain = plan(recipe, force)
    checks = {stage.name: check_stage(stage.config, _absent(stage, chain)) for stage in chain.stages}
    remarks = [f"{name}: {text}".replace("\n", "\n    ") for name, text in checks.items()]
    return "\n".join([chain.table(), "", *remarks, "", f"run directory: {chain.path}; nothing was run"])


def _absent(stage: PlannedStage, chain: Plan) -> list[str]:
    return [other.name for other in chain.stages if other.name in stage.inputs and other.state != "done"]


def check_stage(config: Any, absent: list[str] | None = None) -> str:
    """Build what stage `config` would build without its inputs, of which `absent` are not there yet; say what was checked."""
    if config.kind == "curate":  # the one check that can tell whether its source is there; an earlier stage may make it yet
        checked = str(resolve(DRY_RUNS["curate"])(config, source_exists=not absent))
    else:
        checked = str(resolve(DRY_RUNS[config.kind])(config)) if config.kind in DRY_RUNS else "schema checked"
    return f"{checked}\nit reads {_few(absent)}, not finished yet" if absent else checked
