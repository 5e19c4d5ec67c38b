"""What a batch script of `videofm launch --on slurm` becomes: `python -m launch.slurm_job ... -- COMMAND`.

It runs the command, which is the verb as a laptop runs it, and knows what only a scheduler asks for:

- USR1 comes before the time is up (or at preemption, where the site says so). The verb is told once; it saves, stops, ends with
  75, and the job goes back into the queue.
- At preemption Slurm sends SIGTERM to the ranks, or to every process of the job; they save, too, and the verb ends with 75. A
  stop that somebody asked for (`control/stop`, `videofm launch cancel`, scancel) ends with 75 as well, and is not requeued.
- Slurm itself requeues a job after a lost node, but may take minutes to see that it is lost, while the verb fails at once. So
  after a failure each node is asked to run something; if one does not, the job goes back into the queue, to other nodes.
- A full disk needs a person: a run whose state went to `trainer.spare_checkpoints` ends with 75, and is not requeued.
- Each turn is counted, and a run that gets no further in two turns in a row stops for good: another one would not help.

SIGTERM is left to the verb: Slurm sends it to every process of the job.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from launch.slurm import ask, job_facts
from launch.submission import Launch, progress, spared, stage_folders
from videofm.errors import Interrupted, VideofmError
from videofm.parallel.hostlist import expand_hosts
from videofm.run_dir import RunDirectory, now, read_json, write_json

T = TypeVar("T")
FRUITLESS = 2
"""Turns in a row without progress after which there is no other one."""
CANCELLED = "it was cancelled"
"""Why a job ends or does not go back."""
_POLL_SECONDS = 0.1
_TRIES, _PAUSE_SECONDS = 20, 0.5
_PATIENCE_SECONDS, _AGAIN_SECONDS = 120.0, 5.0
"""How long Slurm's controller, which restarts at times, may leave a question open; and the pause before it is asked again."""
_CAUGHT = re.compile(r"^SigCgt:\s*([0-9a-f]+)$", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """One turn of the job. Returns the exit code of the command, 128 more than the signal that killed it."""
    options = _parse(arguments)
    run, job = Path(options.run), os.environ["SLURM_JOB_ID"]
    turn = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    record = Path(options.folder) / f"job_{job}.json"
    if (reason := begin(record, run, job, turn, options.max_requeues)) is not None:
        _tell(f"job {job} ends here: {reason}")
        return Interrupted.exit_code if reason == CANCELLED else 1
    stop = _touch(run) if options.stop_by_file else _signal
    before = spared(run)
    code, asked = follow(options.command, stop)
    if code == Interrupted.exit_code:
        reason = why_not_again(run, job, asked or _preempted(job), turn, options.max_requeues, before) or _not_running(job)
        if reason is None:
            _tell(f"job {job}: saved and stopped in time; back into the queue for turn {turn + 2}")
            _requeue(job, record)
        else:
            _note(record, stopped=reason)
            _tell(f"job {job} does not go back into the queue: {reason}")
    elif code and turn < options.max_requeues and (silent := silent_nodes(os.environ)) and _not_running(job) is None:
        spare = can_do_without(job, silent)
        how = "without it" if spare else "with the same nodes, since the partition has too few others"
        _tell(f"job {job}: {', '.join(silent)} runs nothing any more; back into the queue for turn {turn + 2}, {how}")
        _requeue(job, record, silent if spare else ())
    return code if code >= 0 else 128 - code


def begin(record: Path, run: Path, job: str, turn: int, most: int) -> str | None:
    """Count this turn in `record`, with how far the run is, and say why the job should end instead, if it should.

    Args:
        record: `job_ID.json`; made on the first turn.
        run: run directory.
        job: its number.
        turn: how often Slurm has started the job before.
        most: how often it may be requeued.
    """
    turns = read_json(record)["turns"] if record.exists() else []
    reached = progress(run)
    fruitless = 0
    if turns:
        fruitless = turns[-1]["fruitless"] + 1 if turns[-1]["progress"] == reached else 0
    turns.append({"turn": turn, "time": now(), "progress": reached, "fruitless": fruitless})
    reason = None
    if _cancelled(run, job):
        reason = CANCELLED  # while it was on its way back into the queue
    elif turn > most:
        reason = f"it was requeued {turn} times and cluster.max_requeues is {most}; launch again to go on"
    elif fruitless >= FRUITLESS:
        reason = f"{fruitless} turns in a row saved nothing new; look at its log, and launch again once the cause is gone"
    write_json(record, {"turns": turns, "stopped": reason})
    return reason


def follow(command: Sequence[str], stop: Callable[[subprocess.Popen[bytes]], bool]) -> tuple[int, bool]:
    """Run `command` to its end. On USR1 call `stop` until it says that the command has been told.

    Returns:
        The exit code, negative for a signal, and whether Slurm sent one: USR1, or SIGTERM, which the command got from it, too.
    """
    came: set[int] = set()

    def note(number: int, _frame: FrameType | None) -> None:
        """A handler, not SIG_IGN, which the command would inherit."""
        came.add(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        process, told = subprocess.Popen(command), False
        while (code := process.poll()) is None:
            told = told or (signal.SIGUSR1 in came and stop(process))
            time.sleep(_POLL_SECONDS)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code, bool(came & {signal.SIGUSR1, signal.SIGTERM})


def why_not_again(
    run: Path, job: str, asked: bool, turn: int, most: int, before: Mapping[Path, Path] | None = None
) -> str | None:
    """Why a job that saved and stopped should not go back into the queue, or None.

    Args:
        run: run directory.
        job: its number.
        asked: whether Slurm sent signals, upon which the verb or a rank leaves `control/stop` behind, too.
        turn: how often Slurm has started the job before.
        most: how often it may be requeued.
        before: what `spared` said when the turn began; nothing by default.
    """
    if _cancelled(run, job):
        return CANCELLED
    if new := {stage: path for stage, path in spared(run).items() if path != (before or {}).get(stage)}:
        stage, path = next(iter(new.items()))
        return (
            f"{stage / 'checkpoints'} could not take the state (its disk is full or fails), which went to {path}; make room, "
            "and launch again to go on from there"
        )
    if not asked and any(RunDirectory(folder).stop_requested for folder in stage_folders(run)):
        return "somebody asked it to stop"
    if turn >= most:
        return f"cluster.max_requeues is {most}; launch again to go on"
    return None


def _cancelled(run: Path, job: str) -> bool:
    """Whether the launch that `job` belongs to was; one that was handed over by hand belongs to none."""
    if not (run / "launch.json").is_file():
        return False
    launch = Launch.read(run)
    return launch.cancelled is not None and job in [known.id for known in launch.jobs]


def silent_nodes(environment: Mapping[str, str], patience: float = 60.0) -> list[str]:
    """Nodes of this job, besides its first, that do not run a step within `patience` seconds."""
    others = expand_hosts(environment.get("SLURM_JOB_NODELIST", "-"))[1:]
    command = ["srun", "--nodes=1", "--ntasks=1", "--overlap", "--input=none", "--output=none"]
    steps = {
        node: subprocess.Popen([*command, f"--nodelist={node}", "true"], stderr=subprocess.DEVNULL, start_new_session=True)
        for node in others
    }
    deadline = time.monotonic() + patience
    while any(step.poll() is None for step in steps.values()) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    silent = [node for node, step in steps.items() if step.poll() != 0]
    for step in steps.values():
        if step.poll() is None:
            step.kill()
        step.wait()
    return silent


def can_do_without(job: str, nodes: Sequence[str]) -> bool:
    """Whether the job's partition has nodes enough that could take the place of these: they answer, and have the same features
    and GPUs. A job that is told to keep off too many is held for ever; where Slurm does not say, it is not told."""
    facts = _facts(job)
    try:
        found = [ask(["sinfo", "--noheader", "--Node", f"--nodes={node}", "--format=%f|%G"]) for node in nodes]
        command = ["sinfo", "--noheader", "--Node", "--responding", "--states=idle,alloc,mix,comp", "--format=%N|%f|%G"]
        rows = ask([*command, f"--partition={facts['Partition']}"])
        needed = int(facts["NumNodes"].partition("-")[0])
    except (VideofmError, KeyError, ValueError):
        return False
    kinds = {line.strip() for text in found for line in text.splitlines()}
    there = {name for name, _, kind in (row.strip().partition("|") for row in rows.splitlines()) if kind in kinds}
    return len(kinds) == 1 and len(there - {*nodes, *_kept_off(facts)}) >= needed


def _requeue(job: str, record: Path, without: Sequence[str] = ()) -> None:
    """Put the job back into the queue, which ends this turn; it is to keep off the nodes `without`."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm sends it at once, and we have a word to add
    known = _kept_off(_facts(job)) if without else []
    try:
        _patiently(lambda: ask(["scontrol", "requeue", job]))
    except VideofmError as error:
        reason = f"Slurm refused to requeue it: {error}"
        _note(record, stopped=reason)
        _tell(f"job {job} does not go back into the queue: {reason}; launch again to go on")
        return
    if not without:
        return
    # Only of a job that waits can this be changed.
    change = ["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join([*known, *without])}"]
    for _ in range(_TRIES):
        if subprocess.run(change, capture_output=True, check=False).returncode == 0:
            return
        time.sleep(_PAUSE_SECONDS)
    _tell(f"job {job}: Slurm would not keep it off {', '.join(without)}")


def _kept_off(facts: Mapping[str, str]) -> list[str]:
    """Nodes that a job is not to use."""
    listed = facts.get("ExcNodeList", "(null)")
    return expand_hosts(listed) if listed != "(null)" else []


def _facts(job: str) -> dict[str, str]:
    """What Slurm says about the job; nothing where it does not answer for long."""
    try:
        return _patiently(lambda: job_facts(job)) or {"JobState": "unknown"}
    except VideofmError as error:
        _tell(f"job {job}: Slurm does not answer: {error}")
        return {}


def _patiently(question: Callable[[], T]) -> T:
    """The answer to `question`, which is asked again while Slurm does not answer or refuses.

    Raises:
        VideofmError: the last refusal.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return question()
        except VideofmError:
            if time.monotonic() + _AGAIN_SECONDS > deadline:
                raise
        time.sleep(_AGAIN_SECONDS)


def _preempted(job: str) -> bool:
    """Whether Slurm is taking the nodes away in this turn; it signals the ranks alone then."""
    facts = _facts(job)
    since, start = facts.get("PreemptTime", "None"), facts.get("StartTime", "")
    return since[:1].isdecimal() and since >= start  # both like 2026-11-23T12:46:22


def _not_running(job: str) -> str | None:
    """Slurm is ending the job itself, and decides what follows; or None, also where it does not answer."""
    state = _facts(job).get("JobState", "RUNNING")
    return None if state == "RUNNING" else f"for Slurm it is {state}"


def _signal(process: subprocess.Popen[bytes]) -> bool:
    """Send USR1 once the process has a handler for it; before that it would be killed."""
    try:
        caught = _CAUGHT.search(Path(f"/proc/{process.pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return False
    if caught is None or not int(caught[1], 16) >> (signal.SIGUSR1 - 1) & 1:
        return False
    process.send_signal(signal.SIGUSR1)
    return True


def _touch(run: Path) -> Callable[[subprocess.Popen[bytes]], bool]:
    """A stop by `control/stop` of the stage that works, for a command in a container, which signals may not reach."""

    def stop(_process: subprocess.Popen[bytes]) -> bool:
        working = [RunDirectory(folder) for folder in stage_folders(run) if RunDirectory(folder).outcome is None]
        for folder in working:
            folder.request_stop()
        return bool(working)

    return stop


def _note(record: Path, **values: Any) -> None:
    """Keep `values` in the record of the job, if its disk has room."""
    known: Mapping[str, Any] = read_json(record)
    try:
        write_json(record, {**known, **values})
    except OSError as error:
        _tell(f"{record} cannot be written: {error}")


def _tell(text: str) -> None:
    print(f"videofm launch: {text}", file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.slurm_job", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", required=True, help="run directory")
    parser.add_argument("--folder", required=True, help="folder of the launch, for job_ID.json")
    parser.add_argument("--max-requeues", type=int, required=True, help="how often the job may go back into the queue")
    parser.add_argument("--stop-by-file", action="store_true", help="the command runs in a container: stop it by control/stop")
    parser.add_argument("command", nargs="+", help="behind --")
    found = parser.parse_args(arguments)
    if "SLURM_JOB_ID" not in os.environ:
        parser.error("SLURM_JOB_ID is not set: this runs in batch scripts of Slurm")
    return found


if __name__ == "__main__":
    sys.exit(main())
