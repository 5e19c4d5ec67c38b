"""What a step left of a group, on disk: the driver reads the small summary, the tasks of the next step read the rows.

```
groups/STEP/GROUP.json           summary: hashes of config, inputs and rows, number of rows, metrics
groups/STEP/GROUP.rows.jsonl     the rows that came out, without the place where their source lies
groups/STEP/GROUP.losses.jsonl   those that did not
```

The summary is written last; a group without one was not done. A group of a step may become several (`00003`, `00003-0001`),
which the summary lists in `parts`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipelines.rows import Loss, Row
from data_pipelines.sources import source_rows
from videofm.errors import DataError
from videofm.run_dir import read_json, write_atomic, write_json


@dataclass(frozen=True)
class Input:
    """A group as it enters a step: its name, how many rows it has, and SHA-256 of them and of all else that decides."""

    group: str
    num_rows: int
    hash: str


@dataclass(frozen=True)
class Summary:
    """What the driver knows of a group after a step. `metrics` are those of the step's stages; `parts` are the groups that it
    became, with their numbers of rows and hashes."""

    config_hash: str
    inputs_hash: str
    parts: list[Input]
    metrics: list[dict[str, Any]]

    @classmethod
    def load(cls, folder: Path, step: int, group: str) -> Summary | None:
        """The summary of a group, or None where the step did not end for it."""
        path = _path(folder, step, group, "json")
        if not path.exists():
            return None
        value = read_json(path)
        try:
            return cls(**{**value, "parts": [Input(**part) for part in value["parts"]]})
        except (KeyError, TypeError):
            raise DataError(f"{path} is of another version of videofm; choose another run directory") from None


def base_group(group: str) -> str:
    """The group of sources that a group is a part of."""
    return group.partition("-")[0]


def read_rows(folder: Path, step: int, group: str) -> list[Row]:
    """The rows that enter `step`: what the step before left, or the sources; with the places of their sources."""
    sources = source_rows(folder, base_group(group))
    if step == 0:
        return sources
    places = {row.source_id: row.path for row in sources}
    path = _path(folder, step - 1, group, "rows.jsonl")
    with path.open(encoding="utf-8") as lines:
        rows = [Row.from_json(json.loads(line)) for line in lines]
    return [row.with_(path=places[row.source_id]) for row in rows]


def write_report(
    folder: Path,
    step: int,
    group: str,
    hashes: tuple[str, str],
    parts: Mapping[str, Sequence[Row]],
    losses: Iterable[Loss],
    metrics: Sequence[dict[str, Any]],
) -> Summary:
    """Write what a step left of a group.

    Args:
        folder: the run directory.
        step: number of the step.
        group: its name.
        hashes: of the config and of the inputs.
        parts: name of a group of the next step -> its rows.
        losses: rows that left.
        metrics: of the stages of the step, as plain values.
    """
    made = []
    for name, rows in parts.items():
        content = "".join(json.dumps(row.with_(path="").to_json(), sort_keys=True) + "\n" for row in rows)
        write_atomic(_path(folder, step, name, "rows.jsonl"), content)
        made.append(Input(name, len(rows), hashlib.sha256(content.encode()).hexdigest()))
    ordered = sorted(losses, key=lambda loss: (loss.source, loss.span or (0.0, 0.0), loss.start or 0))
    lines = [{name: value for name, value in asdict(loss).items() if value not in (None, {})} for loss in ordered]
    write_atomic(_path(folder, step, group, "losses.jsonl"), "".join(json.dumps(line) + "\n" for line in lines))
    summary = Summary(*hashes, made, list(metrics))
    write_json(_path(folder, step, group, "json"), asdict(summary))
    return summary


def read_losses(folder: Path, step: int, group: str) -> Iterator[dict[str, Any]]:
    """The losses of a group in a step, as plain values without empty fields."""
    path = _path(folder, step, group, "losses.jsonl")
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _path(folder: Path, step: int, group: str, ending: str) -> Path:
    return folder / "groups" / str(step) / f"{group}.{ending}"
