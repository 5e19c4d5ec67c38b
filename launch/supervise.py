"""Start the ranks of a training run, and start them again after one died, hung or diverged, from the newest checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from launch.ranks import Attempt, Outcome, Start
from videofm.config.train import TrainConfig
from videofm.errors import Interrupted, ParallelError, TransientError, VideofmError
from videofm.parallel.layout import layout_of
from videofm.progress import LOG
from videofm.run_dir import RunDirectory
from videofm.train import goodput

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before the first restart, and at most; each one waits twice as long as the one before."""
_POLL_SECONDS = 0.1
_FRUITLESS = 2
"""Attempts in a row without a new step at which another one is not worth its time."""
_AGAIN = "run the same command again to go on from the last checkpoint"


@dataclass
class _Count:
    """What happened so far in this call of the verb."""

    furthest: int
    attempts: int = 1
    restarts: int = 0
    rollbacks: int = 0
    fruitless: int = 0
    gone: set[str] = field(default_factory=set)


def supervise(run: RunDirectory, config: TrainConfig, start: Start) -> goodput.Goodput | None:
    """Train to the end, in as many attempts as `config.faults` allows.

    The newest attempt of `run` is the first; each further one gets a folder of its own, and the outcome of the one before is
    written when it is given up. Attempts are counted in this call only: whoever runs the verb again, as a scheduler does,
    begins a new count.

    Args:
        run: a run directory whose newest attempt has not ended.
        config: the resolved config of the run.
        start: the launcher.

    Returns:
        Where the time went, from the first launch of the run on.

    Raises:
        Interrupted: a stop was asked for; where the message does not say otherwise, everything is saved.
        VideofmError: the run failed, and another attempt would not help or is not allowed; of the class that a rank raised.
    """
    count = _Count(furthest=_last_step(run))
    try:
        while True:
            world_size = layout_of(config.parallel).world_size
            outcome = _attempt(Attempt(run, run.newest_attempt, world_size, frozenset(count.gone)), start)
            if outcome.state == "finished":
                break
            _check(run, config, outcome, count)
            config = _without(config, outcome, run)
            _next_attempt(run, config, outcome, count)
    finally:
        found = _goodput(run)
    return found


def _attempt(attempt: Attempt, start: Start) -> Outcome:
    """One attempt, with its events. Whatever happens, none of its ranks is left."""
    state = "failed"
    goodput.record(attempt.run, attempt.number, goodput.STARTED, world_size=attempt.world_size)
    try:
        try:
            ranks = start(attempt)
        except TransientError as error:  # as a node that is lost while its rank starts: one that started might fail so, too
            return Outcome("failed", str(error), "TransientError")
        try:
            outcome = ranks.wait()
        finally:
            ranks.end()
        state = outcome.state
        return outcome
    finally:
        goodput.record(attempt.run, attempt.number, goodput.ENDED, state=state)


def _goodput(run: RunDirectory) -> goodput.Goodput | None:
    """Measure and log it; a file that cannot be read must not hide how the run ended."""
    try:
        found = goodput.measure(run)
    except (VideofmError, OSError, ValueError, KeyError) as error:
        LOG.warning("effective training time is not known: %s", error)
        return None
    if found is not None:
        LOG.info("%s", found.describe())
    return found


def _check(run: RunDirectory, config: TrainConfig, outcome: Outcome, count: _Count) -> None:
    """Whether there is to be another attempt; counts the one that ended.

    Raises:
        VideofmError: there is not; it says why.
    """
    if not outcome.may_restart:
        raise outcome.error()
    if run.stop_requested:
        raise Interrupted(f"stopped on request before everything was saved: {outcome.message}")
    step = _last_step(run)
    if outcome.state == "diverged":  # the next one reads other data: its steps are new ones
        count.rollbacks += 1
        step = count.furthest = 0
        _limit(count.rollbacks, config.faults.divergence.rollbacks, "faults.divergence.rollbacks", outcome, count)
    else:
        count.restarts += 1
        count.fruitless = 0 if step > count.furthest else count.fruitless + 1
        _limit(count.restarts, config.faults.max_restarts, "faults.max_restarts", outcome, count)
    if count.fruitless >= _FRUITLESS:
        raise outcome.error(
            f"{count.fruitless} attempts in a row ended without a step beyond {count.furthest}, so another one would not help: "
            f"{_with_advice(outcome.message)}, once the cause is gone"
        )
    count.furthest = max(count.furthest, step)


def _limit(number: int, most: int, name: str, outcome: Outcome, count: _Count) -> None:
    if number <= most:
        return
    before = f"{count.attempts} attempts failed, and {name} {most} allows no more; the last: " if count.attempts > 1 else ""
    raise outcome.error(before + _with_advice(outcome.message))


def _with_advice(message: str) -> str:
    """`message` and how to go on, unless it says so itself, as that of a failed collective does."""
    return message.rstrip(".") if "same command again" in message else f"{message.rstrip('.')}; {_AGAIN}"


def _without(config: TrainConfig, outcome: Outcome, run: RunDirectory) -> TrainConfig:
    """The config for the ranks that are left, written into the run directory where it is another one."""
    if not outcome.gone or not config.faults.fewer_ranks:
        return config
    layout = layout_of(config.parallel)
    left, each = layout.world_size - len(outcome.gone), layout.world_size // layout.data_degree
    groups = config.data.num_micro_batches
    fit = [degree for degree in range(1, layout.data_degree) if groups % degree == 0 and degree * each <= left]
    places = ", ".join(sorted(set(outcome.gone.values())))
    if not fit:
        raise ParallelError(
            f"{len(outcome.gone)} of {layout.world_size} ranks are gone with {places}, and one of {left} ranks cannot be made: "
            f"a data group needs {each} (context_degree {layout.context_degree} x tensor_degree {layout.tensor_degree}). "
            f"{_AGAIN.capitalize()} once there are ranks enough, or choose smaller degrees"
        )
    LOG.warning("%s gone: going on with parallel.data_degree %d in place of %d", places, fit[-1], layout.data_degree)
    values = config.model_dump(mode="json")
    values["parallel"]["data_degree"] = fit[-1]
    config = TrainConfig.model_validate(values)
    run.set_config(config)
    return config


def _next_attempt(run: RunDirectory, config: TrainConfig, outcome: Outcome, count: _Count) -> None:
    """Say how the last attempt ended, wait a moment, and make the folder of the next one.

    Raises:
        Interrupted: a stop was asked for meanwhile.
    """
    try:
        run.set_outcome("failed", outcome.message)
    except OSError as error:  # the next attempt may find room, or say itself that there is none
        LOG.error("the outcome of an attempt that ended (%s) cannot be written: %s", outcome.message.rstrip("."), error)
    count.gone |= set(outcome.gone.values())
    pause = min(FIRST_PAUSE * 2 ** (count.restarts + count.rollbacks - 1), LONGEST_PAUSE)
    LOG.warning(
        "attempt %d ended (%s): %s; the next one begins in %.0f s (restart %d of at most %d, rollback %d of at most %d)",
        int(run.newest_attempt.name),
        outcome.state,
        outcome.message.rstrip("."),
        pause,
        count.restarts,
        config.faults.max_restarts,
        count.rollbacks,
        config.faults.divergence.rollbacks,
    )
    deadline = time.monotonic() + pause
    while time.monotonic() < deadline:
        if run.stop_requested:
            raise Interrupted(f"stopped on request between two attempts; the last ended: {outcome.message}")
        time.sleep(_POLL_SECONDS)
    run.start_attempt(again=True)
    count.attempts += 1


def _last_step(run: RunDirectory) -> int:
    """The furthest step that has a row in the metrics; 0 without any."""
    return max((row["step"] for row in run.metrics()), default=0)
