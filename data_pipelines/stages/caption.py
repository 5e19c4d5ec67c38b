"""Caption: take a clip's text from the files beside its source.

The first of these that exists counts: `NAME.txt` (the text), `NAME.json` (`{"caption": text}`, or `{"captions":
[{"start_frame": 0, "end_frame": 24, "caption": text}, ...]}` with end exclusive: the clip gets the text of the interval that
holds its middle frame), `captions.jsonl` (lines `{"file": name, "caption": text}`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_pipelines.rows import Rejected, Row
from data_pipelines.workspace import Workspace
from videofm.config.curation_stages import CaptionConfig


class CaptionStage:
    """See `CaptionConfig`."""

    name, requires, barrier = "caption", (), False

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config

    def process(self, row: Row, work: Workspace) -> list[Row]:
        stop = row.stop if row.stop is not None else len(work.scan().times)
        caption = " ".join(find_caption(Path(row.path), (row.start + stop) // 2).split())
        if not caption and self.config.missing == "drop":
            raise Rejected("no_caption", "no sidecar file names a caption for it")
        work.notes["without_caption"] += not caption
        return [row.with_(caption=caption)]


def find_caption(path: Path, frame: int) -> str:
    """The caption of frame `frame` of the video at `path`; empty where no sidecar has one.

    Raises:
        Rejected: a sidecar cannot be read; the reason is `bad_sidecar`.
    """
    try:
        if (text := path.with_suffix(".txt")).is_file():
            return text.read_text(encoding="utf-8")
        if (described := path.with_suffix(".json")).is_file():
            return _from_json(json.loads(described.read_text(encoding="utf-8")), frame)
        if (table := path.parent / "captions.jsonl").is_file():
            rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
            return next((str(row["caption"]) for row in rows if row["file"] == path.name), "")
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # ValueError: bad JSON or bad UTF-8
        raise Rejected("bad_sidecar", f"{type(error).__name__}: {error}") from None
    return ""


def _from_json(value: dict[str, Any], frame: int) -> str:
    if "captions" in value:
        spans = (s for s in value["captions"] if s["start_frame"] <= frame < s["end_frame"])
        return next((str(span["caption"]) for span in spans), "")
    return str(value.get("caption", ""))
