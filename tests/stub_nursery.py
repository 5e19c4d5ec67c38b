"""A nursery whose decoders hang or crash on chosen clips: `VIDEOFM_STUB_FAULTS` is JSON, SHA-256 of a clip -> what happens.

`hang` holds Python's lock for ever, as decord can; `crash` is a segmentation fault; `once:PATH` is a crash that happens unless
PATH exists, which it makes.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from videofm.data import decode, nursery

FAULTS: dict[str, str] = json.loads(os.environ.get("VIDEOFM_STUB_FAULTS", "{}"))


def faulty(read: Callable[..., Any]) -> Callable[..., Any]:
    """`read`, but for the clips in `FAULTS`."""

    def wrapped(source: bytes, indices: Any) -> Any:
        fault = FAULTS.get(hashlib.sha256(source).hexdigest(), "")
        if fault == "hang":
            ctypes.PyDLL(None).sleep(1000)  # keeps the lock
        marker = Path(fault.removeprefix("once:")) if fault.startswith("once:") else None
        if fault == "crash" or (marker is not None and not marker.exists()):
            if marker is not None:
                marker.touch()
            os.kill(os.getpid(), signal.SIGSEGV)
        return read(source, indices)

    return wrapped


for name in decode.ORDER:
    decoder: Any = decode.get(name)
    decoder.read = faulty(decoder.read)

if __name__ == "__main__":
    nursery.main(socket.socket(fileno=int(sys.argv[1])))
