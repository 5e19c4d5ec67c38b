"""Nurseries without their imports: one process imports, and forks a nursery for each test that wants one.

What runs in them is the real `videofm.data.nursery.main`, with decoders that hang or crash on the clips that a test names; see
`tests.stub_nursery`. How the process comes about is another, and it does not pause before it asks a store again.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from videofm.data.processes import START_TIMEOUT, Nursery


class Origin:
    """The process that imports once. `faults` are those of the nurseries forked from now on."""

    def __init__(self) -> None:
        self.faults: dict[str, str] = {}
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.ready_nursery", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).resolve().parents[1],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def ask(self, question: dict[str, Any], descriptors: list[int]) -> int:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(question).encode()], descriptors)
            return int(json.loads(self._socket.recv(1 << 12)))

    def close(self) -> None:
        self._process.kill()  # its nurseries ended with their pools
        self._process.wait()
        self._socket.close()


class ReadyNursery(Nursery):
    """A nursery forked from `origin`."""

    def __init__(self, origin: Origin) -> None:
        self._origin, self._alive = origin, True
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(START_TIMEOUT)
        with theirs:
            self._pid = origin.ask({"faults": origin.faults}, [theirs.fileno()])

    def kill(self) -> None:
        if self._alive:
            self._alive = False
            self._origin.ask({"end": self._pid}, [])


def main(control: socket.socket) -> None:
    from tests import stub_nursery
    from videofm.data import decode, nursery, storage

    storage.FIRST_PAUSE = 0.0
    for name in decode.ORDER:
        decode.get(name).unavailable()  # which imports it
    while True:
        line, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1)
        if not line:
            return
        asked = json.loads(line)
        if "end" in asked:
            pid = asked["end"]
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        elif (pid := os.fork()) == 0:
            control.close()
            stub_nursery.FAULTS.update(asked["faults"])
            nursery.main(socket.socket(fileno=descriptors[0]))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        control.sendall(json.dumps(pid).encode())


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
