"""How long `videofm --help` and `videofm VERB --help` take, whole process: the best and the median of five, in seconds."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from videofm.cli import VERBS

LIMIT = 0.5


def measure(arguments: list[str], repeats: int = 5) -> list[float]:
    """Wall times of `python -m videofm ARGUMENTS`, in seconds."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "videofm", *arguments], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return times


def main() -> int:
    """Print one line a verb; 1 when a median is over the limit."""
    slow = 0
    for arguments in [["--help"], *([verb, "--help"] for verb in VERBS)]:
        times = measure(arguments)
        median = statistics.median(times)
        slow += median > LIMIT
        print(
            f"videofm {' '.join(arguments):18} best {min(times):.3f}  median {median:.3f}{'  OVER' if median > LIMIT else ''}"
        )
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main())
