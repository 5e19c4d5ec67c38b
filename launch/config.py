"""The file of a cluster (`videofm launch --cluster FILE`): what differs between places, so that a training YAML does not.

A union by `kind`: `slurm`, `ray`, `local`. Values can be changed on the command line as `cluster.key=value`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from launch.ray_config import RayConfig
from launch.variables import check_name, check_value
from videofm.config.base import Section
from videofm.config.load import validate
from videofm.config.source import Source, override, read_file
from videofm.errors import ConfigError
from videofm.registry import nearest

_LAST_WARNING = 60
"""Seconds by which Slurm may warn a job earlier than it was asked to."""
_TIME = r"^(\d+|\d+:\d{2}(:\d{2})?|\d+-\d{1,2}(:\d{2}){0,2})$"
_MEMORY = r"^\d+[KMGT]?$"
_WORD = r"^[^\s\"'\\#]+$"
_SET_BY = {"SLURM_": "Slurm", "VIDEOFM_": "Videofm"}

_Word = Annotated[str, Field(pattern=_WORD)]


class ContainerConfig(Section):
    """Ranks run in it, and so do stages without ranks that have a job of their own; the verb itself starts them from outside,
    where Slurm's programs are. videofm must be installed in both."""

    command: list[str] = Field(
        [],
        description="What stands before the interpreter, one argument an item: [apptainer, exec, --nv, IMAGE]. Empty where "
        "srun opens the container itself (srun_options: [--container-image=IMAGE] of pyxis).",
    )
    python: str = Field("python", min_length=1, description="Interpreter in the container.")


class CPUJobsConfig(Section):
    """Jobs of stages that compute on CPUs: one node each, no GPU."""

    cpus: int = Field(1, ge=1, description="CPUs of such a job.")
    memory: str | None = Field(None, pattern=_MEMORY, description="Memory of such a job, as 64G; null asks for no amount.")
    partition: _Word | None = Field(None, description="Partition of such jobs; null takes that of the others.")
    time: str | None = Field(None, pattern=_TIME, description="Longest time of such a job; null takes that of the others.")


class SlurmConfig(Section):
    """A Slurm cluster. A job asks for as many nodes as its ranks fill."""

    kind: Literal["slurm"]
    nodes: int = Field(1, ge=1, description="Nodes of a job, at most.")
    gpus_per_node: int = Field(ge=0, description="GPUs of a node, all of which a job takes; 0 trains on CPUs.")
    gpu_type: _Word | None = Field(None, description="Kind of GPU as the cluster calls it (h100); null takes any.")
    ranks_per_node: int | None = Field(None, ge=1, description="Ranks of a node; null: one a GPU, or one without GPUs.")
    cpus_per_rank: int = Field(1, ge=1, description="CPUs of a rank, its data workers included.")
    memory: str | None = Field(
        None, pattern=_MEMORY, description="Memory of a node, as 500G; 0 is all, null asks for no amount."
    )
    partition: _Word | None = Field(None, description="Partition; null takes the cluster's default.")
    account: _Word | None = Field(None, description="Account that pays.")
    qos: _Word | None = Field(None, description="Quality of service.")
    reservation: _Word | None = Field(None, description="Reservation.")
    constraint: _Word | None = Field(None, description="Features that nodes must have.")
    exclude: _Word | None = Field(None, description="Nodes that are not to be used, as n[3,7].")
    exclusive: bool = Field(False, description="Share nodes with nobody.")
    time: str = Field(
        "24:00:00",
        pattern=_TIME,
        description="Longest time of a turn, in quotes, longer than `stop_before` by more than a minute: MINUTES, "
        "MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES or DAYS-HOURS:MINUTES:SECONDS.",
    )
    stop_before: int = Field(
        300,
        ge=30,
        le=65535,
        description="Seconds before that time at which the job saves, stops and asks for another turn; Slurm may come a minute "
        "earlier.",
    )
    requeue: bool = Field(
        True, description="Go on in the queue after preemption, a lost node, or the end of the time; false: the launch ends."
    )
    max_requeues: int = Field(50, ge=0, description="How often a job goes back into the queue, for whatever reason.")
    modules: list[_Word] = Field([], description="Modules to load (`module load`), in order.")
    environment: dict[str, str] = Field(
        {}, description="Variables of the job. They stand in the script: no secrets, those go into `pass_environment`."
    )
    pass_environment: list[str] = Field(
        [], description="Names of variables to take from where the launch runs; their values stand in no file."
    )
    container: ContainerConfig | None = Field(None, description="Container of the ranks; null runs them as the verb runs.")
    stages: Literal["together", "separate"] = Field(
        "together", description="Stages of a recipe: in one job, or one job each, which waits for the one before."
    )
    cpu_jobs: CPUJobsConfig = Field(CPUJobsConfig(), description="Under `stages: separate`, jobs of stages that need no GPU.")
    python: str | None = Field(None, min_length=1, description="Interpreter on the nodes; null: that of this process.")
    sbatch_options: list[str] = Field([], description="More options of sbatch, as --comment=text.")
    srun_options: list[str] = Field([], description="More options of the srun that starts ranks, as --network=sn_all.")

    @property
    def num_ranks_per_node(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @field_validator("environment")
    @classmethod
    def _no_secret(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            check_name(name, _SET_BY)
            seen, instead = "this file's values are written into the script", "add its name to `pass_environment`"
            check_value(name, text, seen, f"set it where you launch and {instead}")
        return value

    @field_validator("pass_environment")
    @classmethod
    def _names(cls, value: list[str]) -> list[str]:
        for name in value:
            check_name(name, _SET_BY)
        return value

    @field_validator("sbatch_options", "srun_options")
    @classmethod
    def _options(cls, value: list[str]) -> list[str]:
        for text in value:
            if not re.match(r"^--[a-z][a-z-]*(=|$)", text):
                raise ValueError(f"{text!r} is no option; write --name or --name=value, one an item")
            name = text.partition("=")[0]
            if name in _OURS:
                raise ValueError(f"{name} is set by the launch{_OURS[name]}")
        return value

    @model_validator(mode="after")
    def _fits(self) -> SlurmConfig:
        if self.gpus_per_node and self.num_ranks_per_node > self.gpus_per_node:
            raise ValueError(
                f"ranks_per_node {self.ranks_per_node} is more than gpus_per_node {self.gpus_per_node}; each rank has a GPU of "
                "its own"
            )
        for name, time in (("time", self.time), ("cpu_jobs.time", self.cpu_jobs.time)):
            if time is not None and seconds_of(time) <= self.stop_before + _LAST_WARNING:
                raise ValueError(
                    f"{name} {time!r} is {seconds_of(time)} s, and a job is warned {self.stop_before} s (stop_before) before "
                    f"that, or up to a minute earlier: it would save and stop at once. Raise {name}, or lower stop_before"
                )
        return self


def seconds_of(time: str) -> int:
    """A time as Slurm writes it, in seconds: minutes, M:S, H:M:S, or behind days H, H:M or H:M:S."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = (0, *parts, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


_OURS = {
    "--nodes": ": give `nodes`",
    "--ntasks": " from the config's degrees",
    "--ntasks-per-node": ": give `ranks_per_node`",
    "--time": ": give `time`",
    "--signal": ": give `stop_before`",
    "--requeue": ": give `requeue`",
    "--no-requeue": ": give `requeue`",
    "--export": ": give `environment` and `pass_environment`",
    "--output": ", below the run directory",
    "--error": ", below the run directory",
    "--open-mode": " to append",
    "--dependency": " under `stages: separate`",
    "--distribution": ": neighbouring ranks share a node",
    "--kill-on-bad-exit": ": it lets ranks say what they saw first",
    "--wait": ": it lets ranks say what they saw first",
    "--array": " to none: ranks of one run are one job",
}
"""Options that the launch sets itself, and what to write instead."""


class LocalConfig(Section):
    """This machine; nothing about it needs to be said."""

    kind: Literal["local"]


CLUSTERS: dict[str, type[SlurmConfig] | type[RayConfig] | type[LocalConfig]] = {
    "slurm": SlurmConfig,
    "ray": RayConfig,
    "local": LocalConfig,
}
"""The kinds of clusters."""

ClusterConfig = Annotated[SlurmConfig | RayConfig | LocalConfig, Field(discriminator="kind")]


def load_cluster(path: str | None, kind: str | None, overrides: Sequence[str]) -> BaseModel:
    """The cluster in the file at `path`, or what `kind` means without one, with `overrides` (`key=value`) on top.

    Args:
        path: YAML file; None where the overrides say everything that has no default.
        kind: `slurm`, `ray` or `local`; None takes the file's.

    Raises:
        ConfigError: neither names a kind, they name different ones, or the file does not fit its kind.
    """
    source = Source({}) if path is None else read_file(path)
    override(source, overrides)
    said = source.values.get("kind")
    if kind is None and said is None:
        raise ConfigError(f"say where to launch: --on {', --on '.join(CLUSTERS)}, or --cluster FILE with a `kind`")
    chosen = kind or said
    if said is not None and said != chosen:
        raise ConfigError(f"--on {kind} and `kind: {said}` of {path or 'the overrides'} disagree; leave one out")
    if chosen not in CLUSTERS:
        raise ConfigError(
            f"no launcher is called {chosen!r}{nearest(str(chosen), CLUSTERS) or '.'} There are: {', '.join(CLUSTERS)}"
        )
    source.values["kind"] = chosen
    return validate(source, CLUSTERS[chosen], path or f"the {chosen} cluster (--cluster FILE, or cluster.key=value)")
