"""Progress of long work: a bar with rate and ETA on a terminal, plain lines elsewhere; and the log of a run."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOG = logging.getLogger("videofm")


class _ConsoleHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever `sys.stderr` is at that moment: a progress bar puts something there that keeps lines above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def setup_logging(log_file: Path | None = None, level: int = logging.INFO) -> None:
    """Send the log to the console (stderr) and, where given, append it to `log_file`. Calling again replaces both."""
    for handler in list(LOG.handlers):
        LOG.removeHandler(handler)
        handler.close()
    handlers: list[logging.Handler] = [_ConsoleHandler()]
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
        LOG.addHandler(handler)
    LOG.setLevel(level)
    LOG.propagate = False


class Progress:
    """Counts units of work and tells rate and time left. Use `progress(...)` to make one."""

    def __init__(self, description: str, total: int | None, every: float) -> None:
        self.description, self.total, self.every = description, total, every
        self.count = 0
        self._start = self._told = time.monotonic()
        self._initial = 0

    def start_at(self, count: int) -> None:
        """Units that were done before this process began; they do not count for the rate."""
        self.count = self._initial = count

    def advance(self, units: int = 1, note: str = "") -> None:
        """`units` more are done; `note` is shown behind the numbers."""
        self.count += units
        if time.monotonic() - self._told >= self.every:
            self._told = time.monotonic()
            LOG.info("%s", self.line(note))

    def line(self, note: str = "") -> str:
        """The state as text: done, total, rate, time left, note."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rate = (self.count - self._initial) / elapsed
        of = f"/{self.total}" if self.total else ""
        left = f", {duration((self.total - self.count) / rate)} left" if self.total and rate > 0 else ""
        return f"{self.description} {self.count}{of}, {rate:.3g}/s{left}{', ' + note if note else ''}"


class _TerminalProgress(Progress):
    """The same, as a bar of rich."""

    def __init__(self, description: str, total: int | None, every: float) -> None:
        super().__init__(description, total, every)
        # rich is imported here so that nothing pays for it where output is not a terminal.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task(description, total=total, rate="", note="")

    def start_at(self, count: int) -> None:
        super().start_at(count)
        self.bar.update(self.task, completed=count)

    def advance(self, units: int = 1, note: str = "") -> None:
        self.count += units
        rate = (self.count - self._initial) / max(time.monotonic() - self._start, 1e-9)
        self.bar.update(self.task, advance=units, rate=f"{rate:.3g}/s", note=note)


@contextmanager
def progress(description: str, total: int | None = None, every: float = 10.0) -> Iterator[Progress]:
    """Show the progress of work of `total` units: a bar on a terminal, else a line at most each `every` seconds."""
    if not sys.stderr.isatty():
        yield Progress(description, total, every)
        return
    shown = _TerminalProgress(description, total, every)
    with shown.bar:
        yield shown


def duration(seconds: float) -> str:
    """Seconds as people write them: `42 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
