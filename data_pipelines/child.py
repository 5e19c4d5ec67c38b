"""The child process in which untrusted media are decoded: `python -m data_pipelines.child`.

It imports what its stages need once, then forks for each source: a source costs a few milliseconds, and runs in a process of
its own that has a limit on memory (RLIMIT_AS), CPU time (RLIMIT_CPU) and wall time, no standard streams, and dies with its
parent.
Lines of JSON go in and out:

- first line in: `{"stages": [sections of the config], "scratch": folder, "memory_mib": n, "timeout": seconds a stage}`; with
  `"frames": {"num_frames", "height", "width"}` instead of stages the frames of each row are written for a model;
- then, in: a row, or a list of rows of one source. Out: `{"stages": [the events of `run_stages`], "rows": [...], "failure":
  null or {"kind", "stage", "detail", "num_rows"}}`.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Both are loaded where they are first used, which would be in every fork.
import av.subtitles.stream  # noqa: F401
import numpy.ma  # noqa: F401 - by np.median
from pydantic import TypeAdapter

from data_pipelines.frames import FrameStage
from data_pipelines.rows import FrameRequest, Loss, Refusal, Row, Stage
from data_pipelines.workspace import Workspace
from videofm import registry
from videofm.config.curate import CurationStage
from videofm.errors import VideofmError

_PR_SET_PDEATHSIG = 1
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def main() -> None:
    """Serve the sources that come on standard input, one after the other, until it ends."""
    die_with_parent()
    header = json.loads(sys.stdin.readline())
    frames = header.get("frames")
    stages: list[Stage] = [FrameStage(FrameRequest(**frames))] if frames else build_stages(header["stages"])
    for line in sys.stdin:
        value = json.loads(line)
        rows = [Row.from_json(row) for row in (value if isinstance(value, list) else [value])]
        result = run_isolated(stages, rows, header)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


def build_stages(sections: list[dict[str, Any]]) -> list[Stage]:
    """The stages for sections of the config, as plain values."""
    # Strict types: a tuple of the config is a list in plain values, which only the reader of JSON takes for one.
    configs = [TypeAdapter[Any](CurationStage).validate_json(json.dumps(section)) for section in sections]
    stages = [registry.lookup(registry.CURATION_STAGES, config.kind, "curation stage")(config) for config in configs]
    for stage, config in zip(stages, configs, strict=True):
        stage.name = getattr(config, "name", None) or config.kind
    return stages


def run_isolated(stages: Sequence[Stage], rows: Row | Sequence[Row], header: dict[str, Any]) -> dict[str, Any]:
    """Fork, run the stages on the rows of a source there, and gather what the fork says until it ends, hangs or dies."""
    rows = [rows] if isinstance(rows, Row) else rows
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        _run_fork(stages, rows, header, send)
    os.close(send)
    try:
        return _gather(pid, receive, header["timeout"], len(rows))
    finally:
        os.close(receive)


def _run_fork(stages: Sequence[Stage], rows: Sequence[Row], header: dict[str, Any], send: int) -> None:
    """The fork: never returns."""
    code = 1
    try:
        die_with_parent()
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        seconds = int(header["timeout"]) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (seconds * len(stages), seconds * len(stages) + 1))
        memory = _own_address_space() + header["memory_mib"] * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with os.fdopen(send, "w", encoding="utf-8") as out:
            for event in run_stages(stages, rows, _workspace(rows[0], header)):
                out.write(json.dumps(event) + "\n")
                out.flush()
        code = 0
    finally:
        os._exit(code)


def _workspace(row: Row, header: dict[str, Any]) -> Workspace:
    """The workspace of a source or span. `scans`, in the header, is a folder where scans are kept for later processes."""
    kept = Path(header["scans"]) / f"{row.unit}.npz" if header.get("scans") else None
    return Workspace(Path(row.path), Path(header["scratch"]), row.span, kept, header.get("keep_scans", True))


def run_stages(stages: Sequence[Stage], rows: Sequence[Row], work: Workspace) -> Any:
    """Run rows of one source through the stages. Yields `{"begin": stage, "in": rows}` and a result for each, then
    `{"rows": [...]}`. In a result, `seconds` is the wall time of each row. After `{"fatal": message}` nothing comes."""
    for stage in stages:
        if prepare := getattr(stage, "prepare", None):
            prepare(work)  # says what it will measure, so that one scan serves all
    for stage in stages:
        yield {"begin": stage.name, "in": len(rows)}
        started, num_out, losses = time.process_time(), 0, []
        made: list[Row] = []
        seconds: list[float] = []
        written = {row.clip.path for row in rows if row.clip}
        work.notes.clear()
        for item in rows:
            begun = time.monotonic()
            try:
                made += stage.process(item, work)
                num_out += 1
            except VideofmError as error:  # says something about the request, not about the row
                yield {"fatal": f"{stage.name}: {error}"}
                return
            except OSError as error:
                if error.errno in _DISK:  # nor does a full disk
                    yield {"fatal": f"{stage.name}: {error}; free the disk of engine.scratch and run again"}
                    return
                losses.append(asdict(_loss(stage.name, item, error)))
            except Exception as error:  # a stage must not take the other clips of the source with it
                losses.append(asdict(_loss(stage.name, item, error)))
            seconds.append(round(time.monotonic() - begun, 6))
        clips = {row.clip.path for row in made if row.clip} - written
        yield {
            "stage": stage.name, "in": len(rows), "out": num_out, "made": len(made), "losses": losses,
            "notes": dict(work.notes), "cpu_seconds": time.process_time() - started, "seconds": seconds,
            "bytes_out": sum(os.path.getsize(path) for path in clips),
        }  # fmt: skip
        rows = made
        if not rows:
            break
    yield {"rows": [item.to_json() for item in rows]}


def _loss(stage: str, row: Row, error: Exception) -> Loss:
    scores: dict[str, float] = {}
    if isinstance(error, Refusal):
        scores = error.scores
        kind, reason, detail = error.kind, error.reason, error.detail
    elif isinstance(error, MemoryError):
        kind, reason, detail = "quarantined", "memory", "needs more than engine.task_memory_mib"
    else:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace else ""
        kind, reason, detail = "errors", type(error).__name__, f"{error}{where}"
    start, stop = (None, None) if row.stop is None else (row.start, row.stop)
    return Loss(kind, stage, row.name, reason, detail[:500], start, stop, scores={**row.scores, **scores}, span=row.span)


def _gather(pid: int, receive: int, timeout: float, num_rows: int) -> dict[str, Any]:
    """Read the fork's events. Each stage has `timeout` seconds of wall time."""
    stages: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] | None = None
    stage, fatal, pending = None, None, b""
    deadline, hung = time.monotonic() + timeout, False
    while not hung:
        ready, _, _ = select.select([receive], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            hung = True
            os.kill(pid, signal.SIGKILL)
            break
        content = os.read(receive, 1 << 16)
        if not content:
            break
        *lines, pending = (pending + content).split(b"\n")
        for event in map(json.loads, lines):
            if "begin" in event:
                stage, num_rows, deadline = event["begin"], event["in"], time.monotonic() + timeout
            elif "stage" in event:
                stages.append(event)
            elif "fatal" in event:
                fatal = event["fatal"]
            else:
                rows = event["rows"]
    _, status = os.waitpid(pid, 0)
    failure: dict[str, Any] | None = None
    if hung:
        failure = {"kind": "timeout", "detail": f"no answer within {timeout:g} s"}
    elif fatal is not None:
        failure = {"kind": "fatal", "detail": fatal}
    elif rows is None:
        failure = {"kind": "crash", "detail": _how_it_died(status)}
    if failure is not None:
        failure |= {"stage": stage, "num_rows": num_rows}
    return {"stages": stages, "rows": rows or [], "failure": failure}


def _how_it_died(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"the process was killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"the process ended early with exit code {os.WEXITSTATUS(status)}"


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, so that no decoder is left behind."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _own_address_space() -> int:
    """Bytes of address space that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()
