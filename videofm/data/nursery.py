"""Decoding processes and their parent: `python -m videofm.data.nursery SOCKET`, started by `videofm.data.workers`.

The nursery imports what decoding needs, once, and forks a decoding process whenever it is asked for one: a few milliseconds
where a fresh Python would take seconds. It runs no code on media, so it never hangs; it ends when the trainer does, and takes
its children along, however they hang. Lines of JSON go both ways:

```
trainer -> nursery   {"start": settings} with a socket and files for frames     {"end": pid}
nursery -> trainer   {"pid": pid}                                               {"how": "how the process ended"}
trainer -> process   {"slot": s, "request": ...}, answered one after the other
process -> trainer   {"say": "ready" | "fetched" | "done" | "failed" | "unfit", ...}; failed and unfit have `kind` and `message`
```
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np

from videofm.data import decode
from videofm.data.reader import BadClipError, ClipReader, ClipRequest, ReaderSettings
from videofm.errors import ConfigError, DataError, MissingError, TransientError

KINDS: dict[str, type[Exception]] = {
    "bad": BadClipError,
    "transient": TransientError,
    "missing": MissingError,
    "data": DataError,
    "config": ConfigError,
}
"""Names that errors travel under, the narrow ones first."""

NUM_SLOTS = 2
"""Files for frames of a process: it decodes the next clip while the last one's frames are taken over."""

_PR_SET_PDEATHSIG = 1


def main(control: socket.socket) -> None:
    """Serve the trainer until it closes its end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        # Ctrl-C reaches the whole terminal, a scheduler's signal every process of a job; the trainer decides what ends.
        signal.signal(number, signal.SIG_IGN)
    children: set[int] = set()
    while True:
        line, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 1 + NUM_SLOTS)
        if not line:
            return
        asked = json.loads(line)
        if "start" in asked:
            settings = ReaderSettings(**asked["start"])
            _import_decoder(settings.decoder)
            pid = os.fork()
            if pid == 0:
                control.close()
                _child(settings, socket.socket(fileno=descriptors[0]), descriptors[1:])
            children.add(pid)
            for descriptor in descriptors:
                os.close(descriptor)
            answer: dict[str, Any] = {"pid": pid}
        else:
            pid = asked["end"]
            children.discard(pid)
            answer = {"how": _end(pid)}
        control.sendall(json.dumps(answer).encode() + b"\n")


def _import_decoder(name: str) -> None:
    """Import the library that will be used, so that no child has to; a name that is none is the child's to report."""
    for candidate in decode.ORDER if name == "auto" else [found for found in decode.ORDER if found == name]:
        if decode.get(candidate).unavailable() is None:
            return


def _end(pid: int) -> str:
    """See a child to its end; how it ended, which may be by what it was asked to do before."""
    os.kill(pid, signal.SIGKILL)  # a child that ended waits for us, so that its number is not another's
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exit code {os.WEXITSTATUS(status)}"


def _child(settings: ReaderSettings, trainer: socket.socket, slots: list[int]) -> None:
    """A decoding process: never returns."""
    code = 1
    try:
        _die_with_parent()
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # libraries print, some of them what is in the file
            os.dup2(nothing, stream)
        serve(ClipReader(settings), trainer, slots)
        code = 0
    finally:
        os._exit(code)


def serve(reader: ClipReader, trainer: socket.socket, slots: list[int]) -> None:
    """Answer requests until the trainer closes its end. Frames go into the file of the slot that it names."""

    def say(what: str, **facts: Any) -> None:
        trainer.sendall(json.dumps({"say": what, **facts}).encode() + b"\n")

    try:
        reader.decoder()
    except Exception as error:
        say("unfit", **_described(error))
        return
    say("ready")
    maps: dict[int, mmap.mmap] = {}
    for asked in _lines(trainer):
        slot = asked["slot"]
        try:
            frames = reader.read(ClipRequest.from_json(asked["request"]), lambda: say("fetched"))
            if slot not in maps or len(maps[slot]) < frames.nbytes:
                maps[slot] = mmap.mmap(slots[slot], 0)  # all of the file, which the trainer made large enough
            np.copyto(np.ndarray(frames.shape, np.uint8, maps[slot]), frames)
            del frames  # before the next clip, whose frames then take the same, warm memory
        except Exception as error:
            say("failed", **_described(error))
            continue
        counts = dict(reader.counts)
        reader.counts.clear()
        say("done", counts=counts)


def _described(error: Exception) -> dict[str, str]:
    for kind, class_ in KINDS.items():
        if isinstance(error, class_):
            return {"kind": kind, "message": str(error)}
    return {"kind": "bug", "message": traceback.format_exc()}


def _lines(connection: socket.socket) -> Iterator[dict[str, Any]]:
    pending = b""
    while content := connection.recv(1 << 16):
        *lines, pending = (pending + content).split(b"\n")
        yield from map(json.loads, lines)


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the nursery ends, so that no decoder is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:
            os._exit(1)  # the nursery ended before we asked


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
