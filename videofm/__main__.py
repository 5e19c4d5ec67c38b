"""The command `videofm`, and `python -m videofm`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from videofm.cli import main


def command() -> int:
    """The entry point of the package: `main`, in whose child processes modules are looked for as in this one.

    They are started by `python -m`, which looks into the current directory first; a `queue.py` of the user's that happens to
    lie there is not the one they need.
    """
    with suppress(FileNotFoundError):  # there is no current directory any more
        if os.getcwd() not in map(os.path.abspath, sys.path):
            os.environ.setdefault("PYTHONSAFEPATH", "1")
    return main()


if __name__ == "__main__":
    raise SystemExit(command())
