"""Run one stage in its run directory: attempts, log, outcome, and a clean stop on Ctrl-C, SIGTERM and SIGUSR1.

Whatever happens, `attempts/NNNN/outcome.json` says how it ended; a traceback goes to `traceback.txt` beside it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import BaseModel

from videofm.errors import ConfigError, Interrupted, VideofmError
from videofm.progress import LOG, duration, setup_logging
from videofm.registry import STAGES, lookup
from videofm.run_dir import RunDirectory
from videofm.train.signals import PATIENCE, insists

LOCK_PATIENCE = 10.0
"""Seconds to wait for the lock of a run directory: the helpers of a killed run need a moment to notice."""


class StopSignals:
    """While entered, SIGINT, SIGTERM or SIGUSR1 asks the running stage to save and stop, and one more that insists (see
    `train.signals`) ends the process."""

    def __init__(self) -> None:
        self.run: RunDirectory | None = None
        self.requested = False
        self._first = 0.0
        self._owner = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A forked helper inherited this handler. Its parent decides about Ctrl-C; SIGTERM means the helper itself.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        # os.write: a handler may interrupt a write to the same buffered stream.
        if self.requested:
            if insists(number, time.monotonic() - self._first):
                again = b"videofm: stopped at once; `videofm run` again resumes from the last checkpoint\n"
                os.write(sys.stderr.fileno(), again)
                os._exit(Interrupted.exit_code)
            return
        self.requested, self._first = True, time.monotonic()
        if self.run is not None:
            with suppress(OSError):  # a full disk: the run remembers
                self.run.request_stop()
        name, after = signal.Signals(number).name, "" if number == signal.SIGINT else f" after {PATIENCE:g} s"
        os.write(sys.stderr.fileno(), f"videofm: {name}: saving, then stopping; once more{after} stops at once\n".encode())


def execute(
    config: BaseModel, path: Path, inputs: Mapping[str, str] | None = None, signals: StopSignals | None = None
) -> dict[str, Any]:
    """Run the stage that `config` describes in the run directory `path`, and return its results.

    Args:
        config: a resolved stage config.
        path: run directory; made, or taken up again when the same config made it.
        inputs: name -> fingerprint of the stages it reads.
        signals: the handler in force, when a recipe has installed one.

    Raises:
        Interrupted: stopped on request with everything saved.
        VideofmError: the stage failed; the outcome and, for a fault of ours, the traceback are in the run directory.
    """
    if signals is None:
        with StopSignals() as own:
            return execute(config, path, inputs, own)
    kind: str = config.kind  # type: ignore[attr-defined]
    runner = lookup(STAGES, kind, "stage")
    with locked(path):
        run = RunDirectory.create(path, config, inputs)
        attempt = run.start_attempt()
        signals.run = run
        if signals.requested:
            with suppress(OSError):  # as in the handler
                run.request_stop()  # the signal came before this stage could hear it
        setup_logging(run.path / "log.txt")
        started = time.monotonic()
        try:
            LOG.info("%s: %s", kind, run.path)
            results = _attempt(runner, config, run, attempt)
            run.set_outcome("finished", seconds=time.monotonic() - started, **results)
            LOG.info("%s finished in %s", kind, duration(time.monotonic() - started))
            return results
        finally:
            signals.run = None
            setup_logging(None)


def _attempt(runner: Any, config: BaseModel, run: RunDirectory, attempt: Path) -> dict[str, Any]:
    """One try, with its outcome written when it does not finish."""
    try:
        return dict(runner(config, run) or {})
    except (Interrupted, KeyboardInterrupt) as error:
        message = str(error) or "stopped on request"
        _say(run, "interrupted", message)
        raise Interrupted(f"{run.path}: {message}. The same command resumes it.") from None
    except VideofmError as error:
        _say(run, "failed", str(error))
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        with suppress(OSError):
            (attempt / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        _say(run, "failed", message)
        raise VideofmError(f"{run.path} failed: {message} (traceback in {attempt / 'traceback.txt'})") from error


def _say(run: RunDirectory, state: str, message: str) -> None:
    """Write how an attempt ended that did not finish. A disk that does not take it must not hide why: that is raised."""
    try:
        run.set_outcome(state, message)
    except OSError as error:
        LOG.error("the outcome of %s cannot be written (%s); it is %s: %s", run.path, error, state, message)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the run directory `path` for this process.

    Raises:
        ConfigError: another process works in it, or its file system has no locks.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as file:
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"another videofm works in {path}; wait for it, or choose another run directory"
                    ) from None
                time.sleep(0.2)
            except OSError as error:  # such as ENOSYS, ENOLCK, EOPNOTSUPP
                raise ConfigError(
                    f"{file.name} cannot be locked ({error}): the file system of a run directory must support flock, which "
                    "keeps two processes from working in one. Mount it so (Lustre: mount -o flock; NFS: with its lock "
                    "service), or choose a run directory on another one"
                ) from None
        yield
