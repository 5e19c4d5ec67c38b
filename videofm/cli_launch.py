"""`videofm launch ...`: the same verb on a cluster, and its jobs. What a part needs is imported when it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from videofm.cli_verb import OVERRIDES, Verb, about
from videofm.errors import ConfigError, VideofmError

if TYPE_CHECKING:
    from launch.submission import Launch, Launcher, Work

LAUNCHERS = {
    "local": "launch.foreground:Local",
    "slurm": "launch.slurm:Slurm",
    "ray": "launch.ray_jobs:RayLauncher",
}
"""Kind of a cluster -> its class (`launch.submission.Launcher`)."""


def verb(run_verb: Callable[[list[str]], int]) -> Verb:
    """The verb `launch`; `run_verb` runs a verb in this process, for `--on local`."""

    def launch(arguments: argparse.Namespace) -> int:
        return _launch(arguments, run_verb)

    width = max(map(len, _PARTS))
    lines = "\n".join(f"  {name.ljust(width)}  {part.summary}" for name, part in _PARTS.items())
    text = about(
        "Run a recipe or a single stage where the machines are. What is launched is the verb that a laptop runs,\n"
        "`videofm run` or `videofm train`, with the same YAML; where it runs stands in a YAML of its own (--cluster), so\n"
        "that a training config does not change from place to place.\n\n"
        f"parts:\n{lines}",
        "videofm launch --on slurm --cluster cluster.yaml configs/vae/ltx.yaml --dry-run     # the script, nothing else\n"
        "videofm launch --on slurm --cluster cluster.yaml configs/vae/ltx.yaml trainer.max_steps=1000\n"
        "videofm launch --cluster cluster.yaml recipe.yaml cluster.nodes=4 cluster.stages=separate\n"
        "videofm launch --on local configs/quickstart.yaml                                   # here, as `videofm run` does\n"
        "videofm launch status runs/ltx",
        "clusters:\n  `kind: slurm`, `kind: ray` or `kind: local`; docs/launch.md explains the fields.\n"
        "  `cluster.key=value` changes one.",
        OVERRIDES,
    )
    return Verb("the same on Slurm, on Ray or here; its jobs", text, _launch_arguments, launch, parts=_PARTS, alone=True)


def _launch(arguments: argparse.Namespace, run_verb: Callable[[list[str]], int]) -> int:
    from launch.config import load_cluster
    from launch.submission import work_of

    mine = [text for text in arguments.overrides if not text.startswith("cluster.")]
    theirs = [text.removeprefix("cluster.") for text in arguments.overrides if text.startswith("cluster.")]
    cluster: Any = load_cluster(arguments.cluster, arguments.on, theirs)
    work = work_of(arguments.config, mine, arguments.run_dir, arguments.until)
    if not arguments.dry_run:
        _check_idle(work.run)
    if cluster.kind == "local":
        return _here(work, run_verb, arguments.dry_run)
    launcher = _launcher(cluster)
    if arguments.dry_run:
        print(launcher.render(work))
        return 0
    launch = launcher.submit(work)
    for job in launch.jobs:
        print(
            f"{launch.launcher} job {job.id}{f' for stage {job.stage}' if job.stage else ''}, log {work.run / (job.log or '')}"
        )
    print(f"`videofm launch status {work.run}` tells how it goes; logs and cancel likewise", file=sys.stderr)
    return 0


def _check_idle(run: Path) -> None:
    """Before anything is written: see that no job of the launch before works in `run`, wherever it was launched.

    Raises:
        ConfigError: one does, or nobody answers who knows.
    """
    from launch.submission import Launch, check_idle

    if not (run / "launch.json").is_file():
        return
    launch = Launch.read(run)
    try:
        states = _launcher_of(launch).states(launch)
    except VideofmError as error:
        jobs = ", ".join(job.id for job in launch.jobs)
        raise ConfigError(
            f"{run} was launched on {launch.launcher} (job {jobs}), and whether that still works cannot be asked: {error}. "
            f"Once you know that it has ended, remove {run / 'launch.json'}"
        ) from error
    check_idle(launch, states)


def _here(work: Work, run_verb: Callable[[list[str]], int], dry_run: bool) -> int:
    """`--on local`: this process runs the verb."""
    from launch.submission import Launch
    from videofm.run_dir import now

    if dry_run:
        return run_verb([*work.verb, "--dry-run"])
    work.run.mkdir(parents=True, exist_ok=True)
    Launch(work.run, "local", (), work.verb, str(Path.cwd()), time=now()).write()
    before = os.environ.get("VIDEOFM_RANKS")
    os.environ["VIDEOFM_RANKS"] = "local"
    try:
        return run_verb(list(work.verb))
    finally:
        if before is None:
            del os.environ["VIDEOFM_RANKS"]
        else:
            os.environ["VIDEOFM_RANKS"] = before


def _status(arguments: argparse.Namespace) -> int:
    from launch import jobs
    from launch.submission import Launch

    launch = Launch.read(Path(arguments.run))
    states = _launcher_of(launch).states(launch)
    print(json.dumps(jobs.as_json(launch, states), indent=2) if arguments.json else jobs.as_text(launch, states))
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from launch import jobs
    from launch.submission import Launch

    launch = Launch.read(Path(arguments.run))
    if launch.launcher == "ray" and arguments.rank is None and arguments.stage is None:
        # What a job of Ray printed is kept by its cluster, not in a file of the run directory.
        for text in _launcher_of(launch).printed(launch, arguments.lines):  # type: ignore[attr-defined]
            print(text)
    print(jobs.logs(launch, arguments.stage, arguments.rank, arguments.lines))
    return 0


def _manifest(arguments: argparse.Namespace) -> int:
    from launch.config import load_cluster
    from launch.ray_jobs import RayLauncher
    from launch.submission import work_of

    mine = [text for text in arguments.overrides if not text.startswith("cluster.")]
    theirs = [text.removeprefix("cluster.") for text in arguments.overrides if text.startswith("cluster.")]
    cluster: Any = load_cluster(arguments.cluster, "ray", theirs)
    if mine and arguments.config is None:
        raise ConfigError(f"{mine[0]} changes a config, and none is given (--config FILE)")
    work = work_of(arguments.config, mine, arguments.run_dir) if arguments.config is not None else None
    print(RayLauncher(cluster).manifest(arguments.kind, work), end="")
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    from launch.submission import Launch

    launch = Launch.read(Path(arguments.run))
    print(_launcher_of(launch).cancel(launch, arguments.now))
    return 0


def _launcher(cluster: Any) -> Launcher:
    from videofm.registry import lookup

    launcher: Launcher = lookup(LAUNCHERS, cluster.kind, "launcher")(cluster)
    return launcher


def _launcher_of(launch: Launch) -> Launcher:
    """The launcher of a launch, with the cluster that it was made for."""
    from launch.config import CLUSTERS

    if launch.launcher not in CLUSTERS:
        raise ConfigError(
            f"{launch.run / 'launch.json'} names the launcher {launch.launcher!r}; there are: {', '.join(CLUSTERS)}"
        )
    return _launcher(CLUSTERS[launch.launcher].model_validate(launch.cluster or {"kind": launch.launcher}))


# -- declarations


def _launch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "videofm launch [--on PLACE] [--cluster FILE] CONFIG [key=value ...]   or   videofm launch PART RUN"
    parser.add_argument("config", metavar="CONFIG", help="a recipe, or the YAML of a single stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it; cluster.key=value to the cluster")
    parser.add_argument("--on", metavar="PLACE", help="local, slurm or ray; default the `kind` of --cluster")
    parser.add_argument("--cluster", metavar="FILE", help="YAML of the cluster")
    parser.add_argument("--run-dir", metavar="DIR", help="run directory, as of the verb that is launched; default runs/CONFIG")
    parser.add_argument("--until", metavar="NAME", help="of a recipe: stop after this stage")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted; submit nothing")


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory that was launched")


def _status_arguments(parser: argparse.ArgumentParser) -> None:
    _run_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _logs_arguments(parser: argparse.ArgumentParser) -> None:
    _run_argument(parser)
    parser.add_argument("--stage", metavar="NAME", help="of a recipe: this stage; default the one that worked last")
    parser.add_argument(
        "--rank", type=int, metavar="N", help="what this rank wrote in the newest attempt; default the log of all"
    )
    parser.add_argument("--lines", type=int, default=40, metavar="N", help="lines from the end of each file (40)")


def _manifest_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", metavar="KIND", help="ray_cluster (for `ray up`), raycluster or rayjob (for Kubernetes)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to CONFIG; cluster.key=value to the cluster")
    parser.add_argument("--cluster", metavar="FILE", required=True, help="YAML of the cluster, with a section `nodes`")
    parser.add_argument("--config", metavar="CONFIG", help="rayjob: the recipe or stage that it runs")
    parser.add_argument("--run-dir", metavar="DIR", help="rayjob: run directory, as of the verb; default runs/CONFIG")


def _cancel_arguments(parser: argparse.ArgumentParser) -> None:
    _run_argument(parser)
    parser.add_argument("--now", action="store_true", help="end at once; without it a running job saves first")


_PARTS = {
    "status": Verb(
        "jobs of a launch, and how far it is",
        about(
            "Each job of the newest launch of a run directory: its state, where it runs or why it waits; and the stages, with\n"
            "their newest step.",
            "videofm launch status runs/ltx\nvideofm launch status runs/ltx --json",
        ),
        _status_arguments,
        _status,
    ),
    "logs": Verb(
        "what a launch has written",
        about(
            "The end of the log of a run, of what its job printed, and of a rank.",
            "videofm launch logs runs/ltx\nvideofm launch logs runs/ltx --rank 3 --lines 200",
        ),
        _logs_arguments,
        _logs,
    ),
    "cancel": Verb(
        "end a launch; a running job saves first",
        about(
            "Take waiting jobs away, and have a running one save and stop. It does not go back into the queue; launching\n"
            "again goes on where it stopped.",
            "videofm launch cancel runs/ltx\nvideofm launch cancel runs/ltx --now",
        ),
        _cancel_arguments,
        _cancel,
    ),
    "manifest": Verb(
        "the description of a Ray cluster that is yet to be made",
        about(
            "A file for `ray up` (machines that answer to ssh) or for the KubeRay operator (a cluster, or a run on one of its\n"
            "own), filled in from the section `nodes` of a cluster's YAML. It is printed; save it and edit it.",
            "videofm launch manifest ray_cluster --cluster cluster.yaml > ray.yaml; ray up ray.yaml\n"
            "videofm launch manifest raycluster --cluster cluster.yaml | kubectl apply -f -\n"
            "videofm launch manifest rayjob --cluster cluster.yaml --config recipe.yaml | kubectl apply -f -",
        ),
        _manifest_arguments,
        _manifest,
    ),
}
