"""Launches on Slurm: batch scripts from `templates/slurm.sh`, handed to sbatch; how jobs are; ending them.

A script runs the verb on the first node of its job, through `launch.slurm_job`; the stage `train` there starts its ranks with
srun (`launch.srun`). Nothing of a config reaches a shell unquoted, and no value of `pass_environment` is written anywhere.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.config import SlurmConfig
from launch.slurm_script import scripts
from launch.submission import (
    Job,
    JobState,
    Launch,
    Work,
    check_idle,
    mark_cancelled,
    new_folder,
    next_folder,
    stage_folders,
)
from videofm.errors import ConfigError, Interrupted, VideofmError
from videofm.run_dir import RunDirectory, now, read_json, write_atomic

_STATES = {
    "PENDING": "pending", "REQUEUED": "pending", "REQUEUE_HOLD": "pending", "REQUEUE_FED": "pending", "SPECIAL_EXIT": "pending",
    "CONFIGURING": "running", "RUNNING": "running", "COMPLETING": "running", "SUSPENDED": "running", "STOPPED": "running",
    "SIGNALING": "running", "STAGE_OUT": "running", "RESIZING": "running",
    "COMPLETED": "finished", "CANCELLED": "cancelled",
}  # fmt: skip
"""What Slurm calls a state -> what we call it; any other is a failure."""
_WITHOUT_PROCESS = ("CONFIGURING", "COMPLETING")
"""States of jobs whose command does not run: it cannot be told to save, and one that goes back to the queue must not begin."""
_FACTS = ("JobState", "Reason", "Restarts", "RunTime", "TimeLimit", "EligibleTime", "NodeList", "ExitCode", "BatchHost")


class Slurm:
    """A Slurm cluster; see `launch.submission.Launcher`."""

    def __init__(self, config: SlurmConfig) -> None:
        self.config = config

    def render(self, work: Work) -> str:
        """The scripts, and in comments how they would be handed over. Of one job, it is a text that sbatch takes.

        Raises:
            ConfigError: the work does not fit the cluster, or holds text that Slurm cannot carry.
        """
        folder = next_folder(work.run)
        made = f"# mkdir -p {shlex.quote(str(folder))}\n"
        parts: list[str] = []
        before: str | None = None
        for script in scripts(work, self.config, folder):
            command = sbatch(script.path, None if before is None else f"JOB_OF_{before}")
            # sbatch takes a text that begins with `#!` and nothing else.
            first, _, rest = script.text.partition("\n")
            parts.append(f"{first}\n{'' if parts else made}# {shlex.join(command)}\n# {script.path}:\n{rest}")
            before = script.stage
        return "\n".join(parts)

    def submit(self, work: Work) -> Launch:
        """Write the scripts into the run directory and hand them to sbatch, each to begin when the one before is done.

        Raises:
            ConfigError: as of `render`; or jobs of an earlier launch are still there; or a variable of `pass_environment` is
                not set; or there is no Slurm here.
            VideofmError: sbatch refused. What was submitted before that is cancelled.
        """
        check_program("sbatch")
        missing = [name for name in self.config.pass_environment if name not in os.environ]
        if missing:
            raise ConfigError(
                f"pass_environment names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not set here; set "
                "what the job needs before you launch, or take the name away"
            )
        self._check_idle(work.run)
        ready = scripts(work, self.config, next_folder(work.run))
        folder = new_folder(work.run)
        jobs: list[Job] = []
        try:
            for script in ready:
                write_atomic(script.path, script.text)
                answer = ask(sbatch(script.path, jobs[-1].id if jobs else None), _plain(os.environ))
                number = answer.partition(";")[0].strip()
                paths = (path.relative_to(work.run) for path in (script.path, script.log(number)))
                jobs.append(Job(number, script.stage, *map(str, paths)))
        except BaseException:
            for job in jobs:
                ask(["scancel", job.id])
            raise
        launch = Launch(
            run=work.run, launcher="slurm", jobs=tuple(jobs), verb=work.verb, folder=str(Path.cwd()),
            cluster=self.config.model_dump(mode="json"), time=now(),
        )  # fmt: skip
        assert folder == ready[0].path.parent
        launch.write()
        return launch

    def states(self, launch: Launch) -> list[JobState]:
        """How its jobs are, by Slurm where it still knows them, else by what they left in the run directory."""
        check_program("scontrol")
        return [_state(launch, job) for job in launch.jobs]

    def cancel(self, launch: Launch, now: bool) -> str:
        """Take waiting jobs away, and have the running one save and stop (or end at once)."""
        check_program("scancel")
        mark_cancelled(launch)
        said = []
        # The last first: when a job ends, those that wait for it must not begin.
        for state in reversed([state for state in self.states(launch) if state.alive]):
            if state.state == "running" and not now and state.detail.partition(",")[0] not in _WITHOUT_PROCESS:
                ask(["scancel", "--batch", "--signal=USR1", state.job.id])
                said.append(f"job {state.job.id} saves and stops")
            else:
                ask(["scancel", state.job.id])
                said.append(f"job {state.job.id} is cancelled")
        return "; ".join(reversed(said)) or "no job of this launch is left; nothing to cancel"

    def _check_idle(self, run: Path) -> None:
        if not (run / "launch.json").is_file():
            return
        launch = Launch.read(run)
        check_idle(launch, self.states(launch) if launch.launcher == "slurm" else [])


def sbatch(script: Path, after: str | None) -> list[str]:
    """The command that submits `script`, to begin once job `after` is done."""
    waits = [] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    return ["sbatch", "--parsable", *waits, str(script)]


def check_program(name: str) -> None:
    """Raises ConfigError where there is no Slurm on this machine."""
    if shutil.which(name) is None:
        raise ConfigError(f"there is no {name} on this machine: launch from a login node of the Slurm cluster")


def ask(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What a program of Slurm answers, with this process' environment unless another one is given.

    Raises:
        VideofmError: it refused; its words are in the message.
    """
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if answer.returncode:
        words = (answer.stderr.strip() or answer.stdout.strip() or "it said nothing").replace("\n", " / ")
        raise VideofmError(f"{command[0]} ended with code {answer.returncode}: {words}")
    return answer.stdout


def _plain(environment: Mapping[str, str]) -> dict[str, str]:
    """Without the variables that say options of sbatch: they would win over those of the script."""
    return {name: value for name, value in environment.items() if not name.startswith("SBATCH_")}


def _state(launch: Launch, job: Job) -> JobState:
    facts = job_facts(job.id)
    stopped = _stopped(launch, job)
    if facts is None:
        return _state_left(launch, job, stopped)
    word = facts["JobState"]
    state = _STATES.get(word, "failed")
    if word == "FAILED" and facts.get("ExitCode") == f"{Interrupted.exit_code}:0":
        state = "interrupted"
    told = [
        word,
        *(f"{key} {facts[key]}" for key in ("NodeList", "RunTime", "Restarts") if facts.get(key) not in (None, "(null)")),
    ]
    if state == "pending":
        told += [f"waits for {facts.get('Reason')}", f"not before {facts.get('EligibleTime')}"]
    elif state == "failed":
        told.append(f"ExitCode {facts.get('ExitCode')}")
    return JobState(job, state, ", ".join([*told, *([stopped] if stopped else [])]))


def job_facts(job: str) -> dict[str, str] | None:
    """What Slurm says about a job, or None where it has forgotten it.

    Raises:
        VideofmError: Slurm does not answer.
    """
    answer = subprocess.run(["scontrol", "show", "job", job, "--oneliner"], capture_output=True, text=True, check=False)
    if answer.returncode:
        if "Invalid job id" in answer.stderr + answer.stdout:
            return None
        raise VideofmError(f"scontrol show job {job}: {answer.stderr.strip() or answer.stdout.strip()}")
    # The job's name, which may hold anything, comes before all that is looked for.
    text = answer.stdout.rpartition(" JobState=")
    return dict(re.findall(r"(\w+)=(\S+)", f"JobState={text[2]}"))


def _state_left(launch: Launch, job: Job, stopped: str | None) -> JobState:
    """The state of a job that Slurm has forgotten."""
    folders = [folder for folder in stage_folders(launch.run) if job.stage in (None, folder.name)]
    outcomes = [RunDirectory(folder).outcome for folder in folders]
    ended = [outcome["state"] for outcome in outcomes if outcome is not None]
    if ended and all(outcome is not None for outcome in outcomes) and set(ended) == {"finished"}:
        state = "finished"
    elif launch.cancelled is not None:
        state = "cancelled"
    else:
        state = "interrupted" if "interrupted" in ended else "failed"
    return JobState(job, state, ", ".join(["Slurm has forgotten it; by the run directory", *([stopped] if stopped else [])]))


def _stopped(launch: Launch, job: Job) -> str | None:
    """Why the job ended itself, if it did."""
    if job.script is None:
        return None
    record = (launch.run / job.script).parent / f"job_{job.id}.json"
    return read_json(record)["stopped"] if record.exists() else None
