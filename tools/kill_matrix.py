"""The kill matrix: every training of tests/kill_matrix.py, killed at drawn moments, gone on with, and compared bit by bit.

python -m tools.kill_matrix --moments 20 --seed 0                     all of it; prints a table
python -m tools.kill_matrix --moments 20 --seed 0 --docs              and puts it into docs/reliability.md
python -m tools.kill_matrix --trainings dit --moments 3 --started     ranks are processes as a user's are

A line is one run: what was killed and when, whether the fault happened (the process writes a file before it sends itself
SIGKILL), how the run went on (`command`: the same command again; `supervisor`: the verb starts the ranks again), attempts,
steps that were done twice, and whether it ended as the undisturbed one: all metrics of all steps but clocks, and all tensors of
the last checkpoint, bit by bit. Exit code 1 when a fault did not happen or a run differs. Ranks are forked from processes that
have made their imports, unless --started: a start then takes seconds less, and all that is killed and compared is the same.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults import Fault
from tests.kill_matrix import TRAININGS, Bench, Disturbed, draw
from videofm.run_dir import code_version

DOCS = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
BEGIN, END = "<!-- kill matrix: begin -->", "<!-- kill matrix: end -->"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    training: str
    fault: Fault
    restarted_by: str
    found: Disturbed

    @property
    def what(self) -> str:
        """What the process was about to do, as far as its mark tells."""
        return ", ".join(str(mark["what"]) for mark in self.found.marks if mark["what"])

    @property
    def is_good(self) -> bool:
        """Whether the fault happened and nothing differs."""
        return len(self.found.marks) == 1 and not self.found.differences

    def cells(self) -> list[str]:
        """The cells of its line."""
        differs = f"**no**: {'; '.join(self.found.differences[:3])}"
        return [
            self.training,
            self.fault.moment,
            f"{self.fault.rank}",
            f"{self.fault.number}" + (f" (`{self.what}`)" if self.what else ""),
            "yes" if self.found.marks else "**no**",
            self.restarted_by,
            f"{self.found.num_attempts}",
            f"{self.found.redone}",
            "yes" if not self.found.differences else differs,
        ]


HEAD = ("training", "moment", "rank", "number", "happened", "went on by", "attempts", "steps redone", "equal")


def table(rows: Sequence[Row], seed: int, seconds: float, started: bool) -> str:
    """The table in Markdown, with a line about how it was made."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    good = sum(row.is_good for row in rows)
    about = (
        f"{good} of {len(rows)} runs end bitwise as the undisturbed one (seed {seed}, {'started' if started else 'forked'} "
        f"ranks, {seconds / 60:.1f} minutes on {os.cpu_count()} CPU cores, Python {platform.python_version()}, videofm "
        f"{code_version()})."
    )
    return "\n".join([about, "", *lines])


def put(path: Path, text: str) -> None:
    """Replace what stands between the two marks of a file.

    Raises:
        ValueError: the marks are not there.
    """
    content = path.read_text(encoding="utf-8")
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} has no lines {BEGIN!r} and {END!r} to put the table between")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def run(bench: Bench, name: str, num_moments: int, seed: int, started: bool) -> list[Row]:
    """The lines of one training, each printed to stderr when it is there."""
    rows = []
    for index, fault in enumerate(draw(name, bench.counts(name), num_moments, seed)):
        supervised = index % 2 == 1
        found = bench.disturb(name, f"{index:02d}", [fault], started, restarts=1 if supervised else 0)
        by = "itself" if fault.moment == "data_worker" else "supervisor" if supervised else "command"
        rows.append(Row(name, fault, by, found))
        print(f"{'ok  ' if rows[-1].is_good else 'FAIL'} {' | '.join(rows[-1].cells())}", file=sys.stderr, flush=True)
        if not rows[-1].is_good:
            print(found.output, file=sys.stderr, flush=True)
    return rows


def main(arguments: list[str]) -> int:
    """Make the table; 1 where a line is not good."""
    parser = argparse.ArgumentParser(prog="python -m tools.kill_matrix", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--moments", type=int, default=20, help="moments of each training")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of moments")
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=list(TRAININGS), help="which ones")
    parser.add_argument("--started", action="store_true", help="start ranks as a user's, without forking")
    parser.add_argument("--folder", type=Path, help="where runs are kept; a temporary folder unless given")
    parser.add_argument("--docs", action="store_true", help=f"put the table into {DOCS.name}")
    chosen = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    begun, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="kill-matrix-") as temporary:
        bench = Bench(chosen.folder or Path(temporary))
        for name in chosen.trainings:
            rows += run(bench, name, chosen.moments, chosen.seed, chosen.started)
    text = table(rows, chosen.seed, time.monotonic() - begun, chosen.started)
    print(text)
    if chosen.docs:
        put(DOCS, text)
    return 0 if all(row.is_good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
