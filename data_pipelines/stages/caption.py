"""Caption: take a clip's text from the list of sources, or from the files beside its source.

The first of these that exists counts:

- the caption that the list of sources gave;
- `NAME.txt`: the text;
- `NAME.json`: `{"caption": text}`, or `{"captions": [{"start_frame": 0, "end_frame": 24, "caption": text}, ...]}` with end
  exclusive: the clip gets the text of the interval that holds its middle frame;
- `NAME.jsonl`: such intervals, one a line;
- `NAME.srt`, `NAME.vtt`: subtitles; the clip gets the cues whose middle lies in it;
- `captions.jsonl`: lines `{"file": name, "caption": text}`, in local folders only: for sources elsewhere, a list of them with
  captions does the same without a copy of the table for every source.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.rows import Rejected, Row
from data_pipelines.workspace import Workspace
from videofm.config.curation_stages import CaptionConfig

MAX_SIDECAR_BYTES = 64 << 20
_CUE = re.compile(r"^\s*((?:\d+:)?\d+:\d+[.,]\d+)\s+-->\s+((?:\d+:)?\d+:\d+[.,]\d+)")
_TAG = re.compile(r"<[^>]*>|\{\\[^}]*\}")


@dataclass(frozen=True)
class Part:
    """Where a clip lies in its source: its middle frame, and its seconds `[start, stop)` since the first frame."""

    frame: int
    start: float
    stop: float


class CaptionStage:
    """See `CaptionConfig`."""

    name, requires, placement = "caption", (), "child"

    def __init__(self, config: CaptionConfig) -> None:
        self.config = config

    def process(self, row: Row, work: Workspace) -> list[Row]:
        text = row.caption or find_caption(Path(row.path), _part(row, work))
        caption = " ".join(text.split())
        try:
            caption.encode()
        except UnicodeEncodeError as error:  # JSON can write half a character: "\ud800"
            raise Rejected("bad_caption", f"the caption is not plain text: {error}") from None
        if not caption and self.config.missing == "drop":
            raise Rejected("no_caption", "neither the list of sources nor a file beside it has a caption for it")
        work.notes["without_caption"] += not caption
        return [row.with_(caption=caption)]


def _part(row: Row, work: Workspace) -> Part:
    times, since = work.scan().times, row.span[0] if row.span else 0.0
    stop = row.stop if row.stop is not None else len(times)
    end = float(times[stop]) if stop < len(times) else float("inf")
    return Part(work.first_frame() + (row.start + stop) // 2, since + float(times[row.start]), since + end)


def find_caption(path: Path, part: Part) -> str:
    """The caption of a part of the video at `path`; empty where no sidecar has one.

    Raises:
        Rejected: a sidecar cannot be read; the reason is `bad_sidecar`.
    """
    try:
        for sidecar in (
            *(path.with_suffix(s) for s in (".txt", ".json", ".jsonl", ".srt", ".vtt")),
            path.parent / "captions.jsonl",
        ):
            if sidecar.is_file():
                return _read(sidecar, path.name, part)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # ValueError: bad JSON or bad UTF-8
        raise Rejected("bad_sidecar", f"{type(error).__name__}: {error}") from None
    return ""


def _read(sidecar: Path, name: str, part: Part) -> str:
    if sidecar.stat().st_size > MAX_SIDECAR_BYTES:
        raise ValueError(f"{sidecar.name} is larger than {MAX_SIDECAR_BYTES} bytes")
    text = sidecar.read_text(encoding="utf-8-sig")
    if sidecar.suffix == ".txt":
        return text
    if sidecar.suffix in (".srt", ".vtt"):
        return _from_subtitles(text, part)
    if sidecar.suffix == ".json":
        value = json.loads(text)
        return _from_spans(value["captions"], part) if "captions" in value else str(value.get("caption", ""))
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    if sidecar.name == "captions.jsonl":
        return next((str(row["caption"]) for row in rows if row["file"] == name), "")
    return _from_spans(rows, part)


def _from_spans(spans: list[dict[str, Any]], part: Part) -> str:
    return next((str(span["caption"]) for span in spans if span["start_frame"] <= part.frame < span["end_frame"]), "")


def _from_subtitles(text: str, part: Part) -> str:
    """The words of SubRip or WebVTT cues whose middle lies in a part."""
    words: list[str] = []
    inside = False
    for line in text.splitlines():
        if cue := _CUE.match(line):
            inside = part.start <= (_clock(cue[1]) + _clock(cue[2])) / 2 < part.stop
        elif not line.strip():
            inside = False
        elif inside:
            words.append(_TAG.sub("", line))
    return " ".join(words)


def _clock(text: str) -> float:
    """`01:02:03,500` or `02:03.500` in seconds."""
    seconds = 0.0
    for field in text.replace(",", ".").split(":"):
        seconds = seconds * 60 + float(field)
    return seconds
