"""Batch scripts of Slurm from `templates/slurm.sh`: what each stage of a launch needs, and how it is written down.

Nothing of a config reaches a shell unquoted: values of `#SBATCH` lines by sbatch's own rules, all else by `shlex.quote`. What
such a script cannot carry (line ends, text that is not Unicode) is refused.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from launch.config import SlurmConfig
from launch.submission import StageWork, Work, num_nodes
from videofm.errors import ConfigError

TEMPLATE = Path(__file__).parent / "templates" / "slurm.sh"
ALWAYS_PASSED = ("HOME", "PATH", "USER", "LANG")
"""Variables that every job takes from where the launch runs."""

_PLAIN = re.compile(r"^[A-Za-z0-9_.,:=@%/+\[\]-]+$")


@dataclass(frozen=True)
class Script:
    """A batch script that is ready to submit."""

    stage: str | None
    """Of a recipe, where stages have jobs of their own."""
    path: Path
    text: str

    def log(self, job: str) -> Path:
        """Where the job of this number prints."""
        return self.path.with_name(f"{self.path.stem}_{job}.log")


def scripts(work: Work, config: SlurmConfig, folder: Path) -> list[Script]:
    """The batch scripts of `work`, to be kept in `folder`: one, or one a stage.

    Raises:
        ConfigError: the work does not fit the cluster, or holds text that Slurm cannot carry; or there is nothing to do.
    """
    if not work.stages:
        raise ConfigError(f"{work.run} is finished with this config already; there is nothing to launch")
    if config.stages == "separate" and len(work.stages) > 1:
        return [_script(work, (stage,), config, folder, stage.name) for stage in work.stages]
    outside = [stage.name or stage.config.kind for stage in work.stages if not stage.trains]
    if config.container is not None and len(work.stages) > 1 and outside:
        raise ConfigError(
            f"a container holds the ranks of a training; in one job, {', '.join(outside)} would run outside of it. Say "
            "`stages: separate`"
        )
    return [_script(work, work.stages, config, folder, None)]


def resources(stages: Sequence[StageWork], config: SlurmConfig) -> dict[str, str]:
    """Options of sbatch for what the neediest of `stages` needs.

    Raises:
        ConfigError: it does not fit the cluster.
    """
    trained = [stage for stage in stages if stage.trains]
    per_node = config.num_ranks_per_node
    gpus = config.gpus_per_node if any(stage.wants_gpu for stage in stages) else 0
    if not trained and not gpus:
        small = config.cpu_jobs
        found = {"nodes": 1, "ntasks-per-node": 1, "cpus-per-task": small.cpus, "mem": small.memory}
        return _given({**found, "partition": small.partition or config.partition, "time": small.time or config.time})
    nodes = max((num_nodes(stage, per_node, config.nodes) for stage in trained), default=1)
    tasks = min(per_node, max(stage.world_size for stage in trained)) if trained else 1
    return _given(
        {
            "nodes": nodes,
            "ntasks-per-node": tasks,
            # Without ranks, one process has what the ranks of a node would share.
            "cpus-per-task": config.cpus_per_rank if trained else config.cpus_per_rank * per_node,
            "gpus-per-node": (f"{config.gpu_type}:{gpus}" if config.gpu_type else gpus) if gpus else None,
            "mem": config.memory,
            "partition": config.partition,
            "time": config.time,
        }
    )


def directive(key: str, value: str = "") -> str:
    """A line `#SBATCH --key="value"`. sbatch reads it by rules of its own: in quotes, backslash and quote are escaped.

    Raises:
        ConfigError: a value that no such line can hold.
    """
    if not value:
        return f"#SBATCH --{key}"
    _check(value, f"sbatch --{key}")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f"#SBATCH --{key}={value}" if _PLAIN.match(value) else f'#SBATCH --{key}="{escaped}"'


def _script(work: Work, stages: Sequence[StageWork], config: SlurmConfig, folder: Path, stage: str | None) -> Script:
    """The script of a job that does `stages`; `stage` names the one of a job of its own."""
    name, run, here = stage or "job", str(work.run.absolute()), str(Path.cwd())
    verb = work.verb if stage is None else work.until(stages[0])
    for text in (run, here, *verb):
        _check(text, "the launch")
    needs = resources(stages, config)
    own = config.python or sys.executable
    container = [*config.container.command, config.container.python] if config.container is not None else []
    inside = bool(container) and not stages[0].trains
    options = ["--run", run, "--folder", str(folder.absolute())]
    options += ["--max-requeues", str(config.max_requeues if config.requeue else 0), *(["--stop-by-file"] if inside else [])]
    # Since Slurm 22.05 srun no longer takes over how many CPUs a task of its job has.
    srun = [f"--{key}={needs[key]}" for key in ("cpus-per-task", "gpus-per-node") if key in needs] + config.srun_options
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        directives="\n".join(_directives(work, needs, config, folder, stage)),
        folder=shlex.quote(here),
        modules="".join(f"module load {shlex.quote(module)}\n" for module in config.modules),
        environment="".join(f"export {key}={shlex.quote(value)}\n" for key, value in config.environment.items()),
        srun=shlex.quote(shlex.join(srun)),
        container=shlex.quote(shlex.join(container)),
        python=shlex.quote(own),
        options=shlex.join(options),
        command=shlex.join([*(container if inside else [own]), "-P", "-m", "videofm", *verb]),
    )
    return Script(stage, folder / f"{name}.sh", text)


def _directives(work: Work, needs: dict[str, str], config: SlurmConfig, folder: Path, stage: str | None) -> list[str]:
    """The `#SBATCH` lines."""
    known = {
        "job-name": f"{work.name}-{stage}" if stage else work.name,
        **needs,
        **_given({key: getattr(config, key) for key in ("account", "qos", "reservation", "constraint", "exclude")}),
        "output": _pattern(f"{folder.absolute()}/{stage or 'job'}_") + "%j.log",
        "open-mode": "append",
        "signal": f"B:USR1@{config.stop_before}",
        "export": ",".join(dict.fromkeys((*ALWAYS_PASSED, *config.pass_environment))),
    }
    flags = ["requeue" if config.requeue else "no-requeue", *(["exclusive"] if config.exclusive else [])]
    own = [option.removeprefix("--").partition("=") for option in config.sbatch_options]
    return [
        *(directive(key, value) for key, value in known.items()),
        *(directive(flag) for flag in flags),
        *(directive(key, value) for key, _, value in own),
    ]


def _check(text: str, what: str) -> None:
    bad = next((character for character in text if ord(character) < 32 or ord(character) == 127), None)
    if bad is not None:
        raise ConfigError(
            f"{what}: {text!r} has the character {bad!r}, which a batch script of Slurm cannot carry; leave it out"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{what}: {text!r} is not valid Unicode, which a batch script must be; rename it") from None


def _pattern(path: str) -> str:
    """`path` for an option in which Slurm replaces `%j` and the like."""
    if "\\" in path:
        raise ConfigError(
            f"{path} has a backslash, with which Slurm does not fill in the number of the job; take another --run-dir"
        )
    return path.replace("%", "%%")


def _given(options: dict[str, Any]) -> dict[str, str]:
    """Options that are not None, as text."""
    return {key: str(value) for key, value in options.items() if value is not None}
