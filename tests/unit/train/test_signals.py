"""Which signals ask for a stop, and which insist on it; a rank hears them in whatever it waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from videofm.train.signals import HEARD, RankSignals, insists

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("number", "seconds", "at_once"),
    [
        (signal.SIGTERM, 0.01, False),  # Slurm's preemption sends two
        (signal.SIGUSR1, 4.9, False),
        (signal.SIGTERM, 5.0, True),
        (signal.SIGUSR1, 60.0, True),
        (signal.SIGINT, 0.01, True),  # a hand at a keyboard
    ],
)
def test_a_second_signal(number: int, seconds: float, at_once: bool) -> None:
    assert insists(number, seconds) is at_once


class Heard:
    """What a rank was asked."""

    def __init__(self, patience: float) -> None:
        self.asked, self.left = 0, [""][:0]
        self.came = threading.Semaphore(0)
        self.signals = RankSignals(self.ask, self.leave, patience)

    def ask(self) -> None:
        self.asked += 1
        self.came.release()

    def leave(self, name: str) -> None:
        self.left.append(name)
        self.came.release()


@pytest.mark.parametrize("number", HEARD)
def test_the_first_one_asks_and_one_soon_after_is_the_same(number: int) -> None:
    heard = Heard(patience=3600.0)
    before = signal.getsignal(number)
    with heard.signals:
        for other in (number, signal.SIGTERM, number, signal.SIGINT):
            os.kill(os.getpid(), other)
        assert heard.came.acquire(timeout=10)
    assert (heard.asked, heard.left) == (1, []) and signal.getsignal(number) is before


def test_one_that_comes_later_insists() -> None:
    """With no patience every one after the first does."""
    heard = Heard(patience=0.0)
    with heard.signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard.came.acquire(timeout=10)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard.came.acquire(timeout=10)
    assert (heard.asked, heard.left) == (1, ["SIGUSR1"])


def test_a_disk_that_is_full_does_not_make_it_deaf(caplog: pytest.LogCaptureFixture) -> None:
    """The request cannot be written; whoever asks remembers it, and the second signal ends at once all the same."""
    heard = Heard(patience=0.0)

    def ask() -> None:
        heard.ask()
        raise OSError(28, "No space left on device")

    heard.signals = RankSignals(ask, heard.leave, 0.0)
    with heard.signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert heard.came.acquire(timeout=10)
    assert (heard.asked, heard.left) == (1, ["SIGTERM"])
    assert "SIGTERM: other processes could not be told to stop: [Errno 28] No space left on device" in caplog.text


def test_a_forked_process_is_on_its_own() -> None:
    """A signal to it ends it, and nobody tells the rank."""
    heard = Heard(patience=3600.0)
    with heard.signals:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            os.write(write, b"x")
            signal.pause()
            os._exit(0)
        os.read(read, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    os.close(read), os.close(write)
    assert heard.asked == 0


def test_a_main_thread_that_never_comes_back_is_no_obstacle() -> None:
    """It waits in the C library for what never comes, as a rank may in a collective, where Python calls no handlers."""
    script = (
        "import ctypes, os\n"
        "from videofm.train.signals import RankSignals\n"
        "RankSignals(lambda: print('asked', flush=True), lambda name: os._exit(75), patience=0).__enter__()\n"
        "libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"  # zeros: a mutex that is free
        "libc.pthread_mutex_lock(mutex)\n"
        "print('locked', flush=True)\n"
        "libc.pthread_mutex_lock(mutex)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for told in ("locked", "asked"):
            assert process.stdout.readline() == f"{told}\n"
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 75
