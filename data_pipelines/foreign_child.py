"""The child process in which the videos of foreign shards are decoded: `python -m data_pipelines.foreign_child`.

It speaks as `data_pipelines.child` does, and forks for each video in the same way, under the same limits.
"""

from __future__ import annotations

import json
import sys
from typing import Any, ClassVar

import numpy as np

from data_pipelines.child import build_stages, die_with_parent, run_isolated
from data_pipelines.rows import ClipFile, Placement, Rejected, Row, Stage
from data_pipelines.workspace import Workspace

_MAX_JITTER = 0.5
"""Frames whose distances differ from the median by more than this share of it have no constant rate."""


class CountStage:
    """Decode every frame, so that the index holds what is there and not what a header says. Fills `Row.clip`.

    `config["variable_rate"]` is `drop`, which refuses a video whose frames are not evenly spaced, or `keep`, which takes its
    mean rate.
    """

    name: ClassVar[str] = "decode"
    requires: ClassVar[tuple[str, ...]] = ("probe",)
    placement: ClassVar[Placement] = "child"

    def __init__(self, config: dict[str, Any]) -> None:
        self.variable_rate = config["variable_rate"]

    def process(self, row: Row, work: Workspace) -> list[Row]:
        times, info = work.scan().times, work.info()
        steps, fps = np.diff(times), info.fps
        if len(steps):
            median, mean = float(np.median(steps)), float(times[-1] - times[0]) / len(steps)
            if float(np.abs(steps - median).max()) > _MAX_JITTER * median:
                if self.variable_rate == "drop":
                    detail = f"its frames are {steps.min():.4f} to {steps.max():.4f} s apart; curate it to resample"
                    raise Rejected("variable_frame_rate", detail)
                work.notes["variable_frame_rate"] += 1
            # The rate of the stream is an exact ratio; where frames do not follow it, their times count.
            fps = info.fps if abs(info.fps * mean - 1) < 0.02 else 1 / mean
        return [row.with_(info=info, clip=ClipFile(row.path, len(times), fps, info.height, info.width))]


def main() -> None:
    """Serve the videos that come on standard input, one after the other, until it ends."""
    die_with_parent()
    header = json.loads(sys.stdin.readline())
    probe, count = header["stages"]
    stages: list[Stage] = [*build_stages([probe]), CountStage(count)]
    for line in sys.stdin:
        result = run_isolated(stages, Row.from_json(json.loads(line)), header)
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
