"""Ranks of tests that wait at a step, so that what a test does to them meets a training which is still under way, however fast
the machine is. The product has no hook for this.

`TEST_HOLD` names a file with a number N. While it is there, a rank that has made N steps since it began makes no other
one, unless the run is asked to stop. A real process installs this through `tests/hold_site/sitecustomize.py` on PYTHONPATH.
"""

from __future__ import annotations

import os
import sys
import time
from functools import wraps
from pathlib import Path
from typing import Any

HOLD = "TEST_HOLD"
SITE = Path(__file__).parent / "hold_site"


def environment(hold: Path) -> dict[str, str]:
    """What a launcher's environment needs for its ranks to obey the file `hold`."""
    search = [str(SITE), str(SITE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {HOLD: str(hold), "PYTHONPATH": os.pathsep.join(search)}


def install() -> None:
    """Have this process wait, if it is a rank and the environment asks for it."""
    if HOLD in os.environ and "videofm.train.worker" in sys.orig_argv:
        from tests.faults import after_imports

        after_imports({"videofm.train.trainer": _wait_before_steps})


def _wait_before_steps(module: Any) -> None:
    real, done = module.train_step, 0

    @wraps(real)
    def train_step(job: Any, step: Any) -> Any:
        nonlocal done
        while (most := _most_steps()) is not None and done >= most and not job.run.stop_requested:
            time.sleep(0.02)
        done += 1
        return real(job, step)

    module.train_step = train_step


def _most_steps() -> int | None:
    """The number in the file, or None where there is none any more."""
    try:
        return int(Path(os.environ[HOLD]).read_text())
    except FileNotFoundError:
        return None
