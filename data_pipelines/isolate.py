"""Running stages on sources in child processes, seen from the worker: start, ask, and start again after a death."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipelines.rows import FrameRequest, Row

COMMAND = (sys.executable, "-m", "data_pipelines.child")
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Failure:
    """A child that did not answer. `kind` is `crash` or `timeout`, or `fatal` where the request cannot be met; `stage` is None
    when it died outside of any."""

    kind: str
    stage: str | None
    detail: str
    num_rows: int


@dataclass(frozen=True)
class Result:
    """What became of a source: the count of each stage it reached, the rows that came out, or how the child failed."""

    stages: list[dict[str, Any]]
    rows: list[Row]
    failure: Failure | None


class Isolate:
    """Runs a fixed list of stages on one source after the other, each in a process of its own.

    Args:
        stages: sections of the config, as plain values.
        scratch: an empty folder for clips and frames.
        memory_mib: memory that a source's process may map beyond what its code needs.
        timeout: seconds of wall time for a stage.
        command: how to start the child.
        frames: what a model wants to see; the child then writes frames (see `frames.py`) and runs no stages.
        scans: a folder where scans of sources may lie (see `Workspace`); new ones are written to it if `keep_scans`.
    """

    def __init__(
        self,
        stages: list[dict[str, Any]],
        scratch: Path,
        memory_mib: int,
        timeout: float,
        command: Sequence[str] = COMMAND,
        frames: FrameRequest | None = None,
        scans: Path | None = None,
        keep_scans: bool = False,
    ) -> None:
        self.header: dict[str, Any] = {"stages": stages, "scratch": str(scratch), "memory_mib": memory_mib, "timeout": timeout}
        self.header |= {"frames": asdict(frames) if frames else None, "scans": scans and str(scans), "keep_scans": keep_scans}
        self.command = list(command)
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Isolate:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def run(self, *rows: Row) -> Result:
        """Run the stages on rows of one source. Never raises for what the source does."""
        try:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps([row.to_json() for row in rows] if len(rows) > 1 else rows[0].to_json()) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._stop()
            return Result(
                [], [], Failure("crash", None, f"the parent of the decoding process ended with code {code}", len(rows))
            )
        value = json.loads(line)
        failure = value["failure"] and Failure(**value["failure"])
        return Result(value["stages"], [Row.from_json(row) for row in value["rows"]], failure)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
            paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,
            )
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(self.header) + "\n")
            self._process.stdin.flush()
        return self._process

    def _stop(self) -> int | None:
        """End the child; its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):  # it died with a row unread; its exit code tells
                    stream.close()
        try:
            return process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
