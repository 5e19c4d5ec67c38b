"""Goodput: how much of a run's time went into steps that count, and where the rest went.

`events.jsonl` in the run directory says when things happened, on the clock of the wall: an attempt was started and ended
(written by the supervisor), its main rank had loaded and did its first step, training waited for a checkpoint or for what looks
at the model (written by the main rank). The seconds of each step stand in metrics.jsonl and, of steps that were done again, in
the `superseded_metrics.jsonl` of the attempt that did so.

*Effective training time* is the time of the steps that were kept, without waiting for data, over the time since the run's first
launch. It lies in the run directory (`goodput.json`), so that it counts across restarts and across calls of the verb.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from videofm.progress import LOG, duration
from videofm.run_dir import RunDirectory, read_jsonl, write_json

STARTED, LOADED, FIRST_STEP, PAUSE, ENDED = "started", "loaded", "first_step", "pause", "ended"
"""What may happen: an attempt was started; its main rank has imported what it needs; the first step is done (`seconds` of it);
training waited `seconds` for `what`; the attempt ended with the outcome `state`."""
CHECKPOINT = "checkpoint"
"""What a pause is for, where it is a checkpoint."""

PARTS = {
    "useful": "steps that count",
    "data_wait": "waiting for data",
    "checkpoint_stall": "waiting for checkpoints",
    "watching": "samples, held-out loss, diagnostics",
    "startup": "start-up of attempts",
    "skipped": "skipped steps",
    "redone": "steps that were done again",
    "unfinished": "from the last step to the end of attempts that failed",
    "down": "between attempts",
    "other": "other",
}
"""The parts of a run's time -> what they are. Their seconds sum to the time since the first launch."""


@dataclass(frozen=True)
class Goodput:
    """Where the time of a run went, from its first launch to the end of its newest attempt."""

    seconds: Mapping[str, float]
    """Of each of `PARTS`."""
    num_attempts: int
    num_redone_steps: int

    @property
    def wall_seconds(self) -> float:
        """From the first launch to the end of the newest attempt."""
        return sum(self.seconds.values())

    @property
    def effective(self) -> float:
        """Effective training time: a share in [0, 1]."""
        return self.seconds["useful"] / self.wall_seconds if self.wall_seconds > 0 else 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain values; times in seconds."""
        return {
            "effective_training_time": self.effective,
            "wall_seconds": self.wall_seconds,
            "num_attempts": self.num_attempts,
            "num_redone_steps": self.num_redone_steps,
            "seconds": dict(self.seconds),
        }

    def describe(self) -> str:
        """One line: the share, and every loss of a percent or more."""
        told = [
            f"{PARTS[name]} {100 * seconds / self.wall_seconds:.0f} %"
            for name, seconds in self.seconds.items()
            if name != "useful" and seconds >= 0.01 * self.wall_seconds
        ]
        lost = f": {', '.join(told)}" if told else ""
        return f"effective training time {100 * self.effective:.0f} % of {duration(self.wall_seconds)}{lost}"


def record(run: RunDirectory, attempt: int, event: str, **facts: Any) -> None:
    """Append an event of an attempt to `events.jsonl`; it is on the disk when this returns. Of a disk that does not take it the
    log tells: no training ends for that."""
    row = {"event": event, "time": time.time(), "attempt": attempt, **facts}
    try:
        with (run.path / "events.jsonl").open("ab", buffering=0) as file:
            # One write: lines of two processes do not mix. It begins a line of its own, as a disk that was full, or a process
            # that was killed, may have left half of one; empty lines are nothing.
            file.write(b"\n" + json.dumps(row).encode() + b"\n")
            os.fsync(file.fileno())
    except OSError as error:
        LOG.warning("the event %r of attempt %d was not recorded: %s", event, attempt, error)


def measure(run: RunDirectory) -> Goodput | None:
    """Add up what the files of a run say, and write it to `goodput.json`; None where no attempt was recorded."""
    attempts = _attempts(_events(run))
    if not attempts:
        return None
    kept = [row for row in run.metrics() if row.get("attempt") in attempts]
    redone = [
        row
        for path in sorted((run.path / "attempts").glob("*/superseded_metrics.jsonl"))
        for row in read_jsonl(path)
        if row.get("attempt") in attempts
    ]
    parts = dict.fromkeys(PARTS, 0.0)
    for row in kept:
        seconds, data_wait = row["seconds"], row["data_wait"]
        parts["data_wait"] += data_wait
        parts["skipped" if row.get("skipped") else "useful"] += seconds - data_wait
    parts["redone"] = sum(row["seconds"] for row in redone)
    _add_attempts(parts, attempts, [*kept, *redone])
    found = Goodput(parts, len(attempts), len(redone))
    write_json(run.path / "goodput.json", {**found.as_json(), "about": PARTS})
    return found


@dataclass
class _Attempt:
    """What the events say of one attempt; times on the clock of the wall."""

    started: float
    last: float
    loop_began: float | None = None
    ended: float | None = None
    well: bool = False
    pauses: float = 0.0
    checkpoint_pauses: float = 0.0


def _events(run: RunDirectory) -> Iterator[dict[str, Any]]:
    """The events that were recorded whole; of others only half a line is there."""
    path = run.path / "events.jsonl"
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict):
            yield event


def _attempts(events: Iterable[Mapping[str, Any]]) -> dict[int, _Attempt]:
    found: dict[int, _Attempt] = {}
    for event in events:
        name, moment = event["event"], float(event["time"])
        if name == STARTED:
            found[event["attempt"]] = _Attempt(moment, moment)
        attempt = found.get(event["attempt"])
        if attempt is None:
            continue
        attempt.last = max(attempt.last, moment)
        if name == FIRST_STEP:
            attempt.loop_began = moment - event["seconds"]
        elif name == PAUSE:
            attempt.pauses += event["seconds"]
            attempt.checkpoint_pauses += event["seconds"] if event["what"] == CHECKPOINT else 0.0
        elif name == ENDED:
            attempt.ended, attempt.well = moment, event["state"] in ("finished", "interrupted")
    return dict(sorted(found.items()))


def _add_attempts(parts: dict[str, float], attempts: Mapping[int, _Attempt], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add what is no step: start-up, pauses, what is left of each attempt, and the time between them.

    An attempt whose supervisor was killed has no recorded end. It is taken to have ended with the last that is known of it.
    """
    in_steps = dict.fromkeys(attempts, 0.0)
    for row in rows:
        in_steps[row["attempt"]] += row["seconds"]
    previous_end: float | None = None
    for number, attempt in attempts.items():
        if previous_end is not None:
            parts["down"] += max(0.0, attempt.started - previous_end)
        known = in_steps[number] + attempt.pauses
        began = attempt.loop_began
        end = attempt.ended or max(attempt.last, (attempt.started if began is None else began) + known)
        if began is None:  # no step was made, or the first one was not recorded: start-up is what the known leaves
            began = max(attempt.started, end - known)
        startup = began - attempt.started
        parts["startup"] += startup
        parts["checkpoint_stall"] += attempt.checkpoint_pauses
        parts["watching"] += attempt.pauses - attempt.checkpoint_pauses
        parts["other" if attempt.well else "unfinished"] += max(0.0, end - began - known)  # clocks may be set meanwhile
        previous_end = end
