"""What a launch is about: the verb that runs on the cluster, its stages, and what the run directory keeps of it.

```
RUN/launch.json            the newest launch: launcher, jobs, when, and who asked it to end
RUN/launch/0001/           what the first launch handed over (scripts), and logs of its jobs
```
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from videofm.checkpoint.listing import places_of
from videofm.cli_verb import spoken
from videofm.config.describe import schema_of
from videofm.config.load import load
from videofm.config.recipe import RecipeConfig
from videofm.config.source import override, read_file
from videofm.config.train import TrainConfig
from videofm.errors import ConfigError
from videofm.parallel.layout import layout_of
from videofm.recipe import plan
from videofm.run_dir import RunDirectory, now, read_json, write_json

_USES_GPU = ("sample", "evaluate", "dpo_generate")
"""Kinds of stages that compute on a GPU where there is one, besides training; others say so in a field `num_gpus`."""


@dataclass(frozen=True)
class StageWork:
    """A stage that is not done."""

    name: str | None
    """In its recipe; None of a stage that is launched by itself."""
    config: Any
    path: Path
    """Its run directory."""

    @property
    def trains(self) -> bool:
        """Whether it has ranks."""
        return isinstance(self.config, TrainConfig)

    @property
    def world_size(self) -> int:
        """Number of its ranks; 1 of a stage without."""
        return layout_of(self.config.parallel).world_size if self.trains else 1

    @property
    def wants_gpu(self) -> bool:
        """Whether it would use a GPU."""
        if self.trains:
            return self.config.trainer.device != "cpu"
        return self.config.kind in _USES_GPU or any(_num_gpus(self.config.model_dump(mode="json")))


@dataclass(frozen=True)
class Work:
    """What is launched."""

    verb: tuple[str, ...]
    """What stands behind `videofm`, as on a laptop."""
    name: str
    run: Path
    """Run directory, as it was asked for: relative to the current folder, in which the verb starts."""
    stages: tuple[StageWork, ...]
    """What is not done, in order."""

    def until(self, stage: StageWork) -> tuple[str, ...]:
        """The verb for one stage; what comes before it is done by then."""
        if stage.name is None:
            return self.verb
        last = self.verb.index("--until") if "--until" in self.verb else len(self.verb)
        return (*self.verb[:last], "--until", stage.name)


@dataclass(frozen=True)
class Job:
    """A job that was submitted."""

    id: str
    stage: str | None
    """Of a recipe whose stages have jobs of their own."""
    script: str | None = None
    """What was handed over, below the run directory."""
    log: str | None = None
    """What the job prints, below the run directory."""


@dataclass(frozen=True)
class JobState:
    """How a job is at this moment."""

    job: Job
    state: str
    """`pending`, `running`, `finished`, `interrupted` (saved; launching again goes on), `failed` or `cancelled`."""
    detail: str = ""
    """In the launcher's own words: nodes, why it waits, how it ended."""

    @property
    def alive(self) -> bool:
        """Whether it runs, or will."""
        return self.state in ("pending", "running")


@dataclass(frozen=True)
class Launch:
    """`launch.json`: the newest launch of a run directory."""

    run: Path
    launcher: str
    jobs: tuple[Job, ...]
    verb: tuple[str, ...]
    folder: str
    """Where the verb starts."""
    cluster: Mapping[str, Any] = field(default_factory=dict)
    time: str = ""
    cancelled: str | None = None
    """When it was asked to end, if it was."""

    def write(self) -> None:
        """Keep it, so that `status`, `logs` and `cancel` find the jobs."""
        values = asdict(self)
        del values["run"]
        write_json(self.run / "launch.json", values)

    @classmethod
    def read(cls, run: Path) -> Launch:
        """The newest launch of `run`.

        Raises:
            ConfigError: there was none.
        """
        path = run / "launch.json"
        if not path.is_file():
            raise ConfigError(
                f"{run} was not launched: it has no launch.json. `videofm launch --on slurm CONFIG --run-dir {run}` does that"
            )
        values = read_json(path)
        jobs = tuple(Job(**job) for job in values.pop("jobs"))
        return cls(run=run, jobs=jobs, **{**values, "verb": tuple(values["verb"])})


class Launcher(Protocol):
    """A place where verbs run. One class each, made with its section of a cluster's file."""

    def render(self, work: Work) -> str:
        """What `submit` would hand over, as text; starts nothing."""
        ...

    def submit(self, work: Work) -> Launch:
        """Hand `work` over and write `launch.json`."""
        ...

    def states(self, launch: Launch) -> list[JobState]:
        """How its jobs are."""
        ...

    def cancel(self, launch: Launch, now: bool) -> str:
        """End its jobs: they save first, unless it is to be `now`. Returns what was done, in words."""
        ...


def work_of(path: str, overrides: Sequence[str], run_dir: str | None = None, until: str | None = None) -> Work:
    """What `videofm run PATH` (a recipe) or the verb of a single stage would do, checked as that verb would.

    Raises:
        ConfigError: the config is wrong, or has no stage `until`.
    """
    source = read_file(path)
    override(source, overrides)
    said = (*overrides, *(["--run-dir", run_dir] if run_dir is not None else []))
    if isinstance(source.values.get("stages"), dict):
        return _recipe(path, overrides, run_dir, until, said)
    if until is not None:
        raise ConfigError(f"--until {until}: {path} is a single stage, not a recipe")
    kind = str(source.values.get("kind", "train"))
    if kind == "demo_data":
        raise ConfigError(f"{path}: a stage of kind 'demo_data' has no verb of its own; launch a recipe that has it")
    config = load(path, overrides, schema_of(kind), {"kind": kind})
    run = Path(run_dir) if run_dir is not None else Path("runs") / Path(path).stem
    return Work((*spoken(kind).split(), path, *said), run.name, run, (StageWork(None, config, run),))


def _recipe(path: str, overrides: Sequence[str], run_dir: str | None, until: str | None, said: tuple[str, ...]) -> Work:
    stem = Path(path).stem
    place = [f"run={json.dumps(run_dir)}"] if run_dir is not None else []
    recipe = load(path, [*overrides, *place], RecipeConfig, {"run": f"runs/{stem}", "name": stem})
    chain = plan(recipe)
    last = chain.stages.index(chain.stage(until)) + 1 if until is not None else len(chain.stages)
    stages = tuple(StageWork(stage.name, stage.config, stage.path) for stage in chain.stages[:last] if stage.state != "done")
    verb = ("run", path, *said, *(["--until", until] if until is not None else []))
    return Work(verb, recipe.name, Path(recipe.run), stages)


def next_folder(run: Path) -> Path:
    """`RUN/launch/NNNN` of the next launch; it is not made."""
    last = max((int(path.name) for path in (run / "launch").glob("[0-9]*")), default=0)
    return run / "launch" / f"{last + 1:04d}"


def new_folder(run: Path) -> Path:
    """The folder of the next launch, made."""
    folder = next_folder(run)
    folder.mkdir(parents=True)
    return folder


def mark_cancelled(launch: Launch) -> Launch:
    """Note in `launch.json` that it was asked to end: a job that saved then does not go back into the queue."""
    marked = Launch(**{**vars(launch), "cancelled": now()})
    marked.write()
    return marked


def check_idle(launch: Launch, states: Sequence[JobState]) -> None:
    """Two verbs in one run directory would wait for each other.

    Raises:
        ConfigError: jobs of `launch`, whose states these are, still work or wait.
    """
    alive = ", ".join(f"{state.job.id} ({state.state})" for state in states if state.alive)
    if alive:
        raise ConfigError(
            f"job {alive} works for {launch.run} already: wait for it, or `videofm launch cancel {launch.run}` first"
        )


def stage_folders(run: Path) -> list[Path]:
    """Folders of `run` in which stages work: itself, or those of a recipe."""
    return [folder for folder in (run, *sorted((run / "stages").glob("*"))) if (folder / "attempts").is_dir()]


def progress(run: Path) -> dict[str, list[Any]]:
    """How far `run` is, as something to compare: of each stage how its newest attempt ended, its newest checkpoint and, where
    it has none, number and bytes of the files that it made."""
    found = {}
    for folder in stage_folders(run):
        outcome, checkpoint = RunDirectory(folder).outcome, _newest_checkpoint(folder)
        state = "finished" if outcome is not None and outcome["state"] == "finished" else "unfinished"
        found[str(folder.relative_to(run))] = [state, *([checkpoint.name] if checkpoint is not None else _made(folder))]
    return found


def spared(run: Path) -> dict[Path, Path]:
    """Stage -> its newest checkpoint, where that lies in `trainer.spare_checkpoints`: its own folder could not take it."""
    newest = {folder: _newest_checkpoint(folder) for folder in stage_folders(run)}
    return {folder: path for folder, path in newest.items() if path is not None and path.parent != folder / "checkpoints"}


def _newest_checkpoint(folder: Path) -> Path | None:
    return max((path for place in places_of(folder) for path in place.glob("step_*")), key=lambda path: path.name, default=None)


def _made(folder: Path) -> list[int]:
    """Number and bytes of the files that a stage made; what every attempt writes does not count (a folder of wandb), nor what
    is not finished (hidden, as all that is written aside)."""
    sizes = []
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if parts[0] in ("attempts", "control", "launch", "stages", "wandb") or len(parts) == 1:
            continue
        if any(part.startswith(".") for part in parts):
            continue
        if path.is_file():
            sizes.append(path.stat().st_size)
    return [len(sizes), sum(sizes)]


def num_nodes(stage: StageWork, ranks_per_node: int, most: int) -> int:
    """Nodes that the ranks of `stage` fill.

    Raises:
        ConfigError: more than there may be, or they do not fill them evenly.
    """
    ranks = stage.world_size
    needed = math.ceil(ranks / ranks_per_node)
    where = f"stage {stage.name!r}: " if stage.name is not None else ""
    if needed > most:
        raise ConfigError(
            f"{where}{ranks} ranks (data_degree x context_degree x tensor_degree) need {needed} nodes of {ranks_per_node}, and "
            f"cluster.nodes is {most}; raise it, or choose degrees whose product is at most {most * ranks_per_node}"
        )
    if needed > 1 and ranks % ranks_per_node:
        raise ConfigError(
            f"{where}{ranks} ranks do not fill nodes of {ranks_per_node} evenly; choose degrees whose product is a multiple of "
            f"{ranks_per_node}, or another cluster.ranks_per_node"
        )
    return needed


def _num_gpus(values: Any) -> Iterator[bool]:
    """Whether each `num_gpus` in `values` is more than nothing."""
    if isinstance(values, dict):
        if isinstance(values.get("num_gpus"), int | float):
            yield values["num_gpus"] > 0
        for value in values.values():
            yield from _num_gpus(value)
    elif isinstance(values, list):
        for value in values:
            yield from _num_gpus(value)
