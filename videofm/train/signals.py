"""Signals that ask for a stop: what counts as a second one, and how a rank hears them.

Slurm and other schedulers signal every process of a job, most often SIGTERM and more than once within a moment, or SIGUSR1 some
time before the end of the allocation. So only Ctrl-C is taken for impatience whenever it comes again; of the others, one that
comes `PATIENCE` seconds after the first.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from videofm.progress import LOG

PATIENCE = 5.0
"""Seconds after the first signal from which a further SIGTERM or SIGUSR1 is meant as a second one."""

HEARD = (signal.SIGTERM, signal.SIGUSR1)
"""What a rank stops for. Ctrl-C is for the process that launched it."""


def insists(number: int, seconds: float, patience: float = PATIENCE) -> bool:
    """Whether a signal that comes `seconds` after the first one asks to end at once, with nothing saved."""
    return number == signal.SIGINT or seconds >= patience


class RankSignals:
    """While entered, SIGTERM or SIGUSR1 calls `ask`, and one that insists calls `leave` with its name; SIGINT does nothing.

    A thread does so, woken by the signal itself: the main thread may be in a collective, and would not hear before it is over.
    Enter it in the main thread.
    """

    def __init__(self, ask: Callable[[], object], leave: Callable[[str], object], patience: float = PATIENCE) -> None:
        self._ask, self._leave, self._patience = ask, leave, patience
        self._first: float | None = None

    def __enter__(self) -> RankSignals:
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._before = {number: signal.signal(number, _nothing) for number in HEARD}
        self._before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._fd_before = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_forget)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._theirs.close()
        self._thread.join()
        self._ours.close()

    def _listen(self) -> None:
        while numbers := self._ours.recv(64):
            for number in numbers:
                if number in HEARD:
                    self._hear(number, time.monotonic())

    def _hear(self, number: int, now: float) -> None:
        name = signal.Signals(number).name
        if self._first is None:
            self._first = now
            try:
                self._ask()
            except OSError as error:  # this thread must live to hear the next one; who asks remembers it all the same
                LOG.warning("%s: other processes could not be told to stop: %s", name, error)
            LOG.info("%s: saving at the next step, then stopping; once more after %g s stops at once", name, self._patience)
        elif insists(number, now - self._first, self._patience):
            self._leave(name)


def _nothing(number: int, frame: FrameType | None) -> None:
    """The thread acts. But there has to be a function: a signal that is ignored wakes nobody."""


def _forget() -> None:
    """In a forked process: signals are its own business, and not told to the rank."""
    with suppress(ValueError):  # another thread than the main one has forked; then exec follows
        signal.set_wakeup_fd(-1)
        for number in HEARD:
            if signal.getsignal(number) is _nothing:
                signal.signal(number, signal.SIG_DFL)
