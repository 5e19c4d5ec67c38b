"""The part of the report about curation: funnel, refused clips by reason, kept clips, histograms of scores, broken files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any, Protocol

import pyarrow

from videofm.data.index import ClipRecord
from videofm.data.shards import read_clip
from videofm.errors import DataError
from videofm.report.charts import number
from videofm.report.collect import Stage
from videofm.report.curation_data import FACTS, MAX_SHARDS, CurationData, Reason, gather
from videofm.report.histogram import figure
from videofm.report.pieces import jpeg, shortened, table

NUM_FRAMES = 4
"""Frames shown of a kept clip."""
DETAIL, CAPTION, SOURCE = 160, 240, 80
"""Characters shown of a text."""
UNTOUCHED = ("crash", "timeout", "memory", "missing", "empty", "no_video", "not_video")
"""Reasons of broken files for which no picture is tried: there is none, or it would take the child down once more."""
MAX_PROBLEMS = 10
KINDS = ("dropped", "quarantined", "errors")
SCORES = {
    "motion": "mean change between frames, 1 = full range",
    "brightness": "mean luminance, 1 = white",
    "flow_mean": "optical flow, shorter sides a second",
    "flow_max": "the fastest sampled frame's flow",
    "flow_min": "the slowest sampled frame's flow",
    "blur": "variance of the Laplacian; low is blurred",
    "saturation_mean": "1 = pure colours",
    "saturation_max": "the most colourful frame",
    "saturation_min": "the least colourful frame",
    "dark_share": "share of pixels clipped dark",
    "bright_share": "share of pixels clipped bright",
    "static_share": "share of frames that hardly change",
    "duplicate_share": "share of frames that repeat",
    "flash": "largest jump of luminance",
    "text_area": "share that looks like writing (a proxy)",
    "border_share": "share that is black border",
}
"""Scores that curation stores, in a few words."""
TIMES = {"cpu_seconds": "CPU s", "wall_seconds": "wall s", "latency_p50": "p50 s", "latency_p95": "p95 s"}
"""Times that the funnel may have, and the heads of their columns; p50 and p95 are of one source or clip."""


class Pictures(Protocol):
    """Makes JPEG pictures of clips. Both methods raise `DataError` with a short reason where there is none."""

    def of_source(self, name: str, start: int | None, stop: int | None, span: tuple[float, float] | None) -> bytes:
        """The middle frame of the frames `[start, stop)` of a source, or of a span of it, in seconds."""
        ...

    def of_clip(self, video: bytes, num_frames: int) -> list[bytes]:
        """Frames of the file `video`, evenly spaced."""
        ...


def section(stage: Stage, pictures: Pictures | None) -> str:
    """All about the curation `stage`; without `pictures`, their places are left empty."""
    parts = [_funnel(stage.funnel)]
    try:
        data = gather(stage.path, stage.config, stage.funnel)
    except (DataError, OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        return parts[0] + _note(str(error))
    parts += [_note(problem) for problem in data.problems[:MAX_PROBLEMS]]
    if len(data.problems) > MAX_PROBLEMS:
        parts.append(_note(f"and {len(data.problems) - MAX_PROBLEMS} more"))
    parts += [_scope(data), _lost(data, stage.funnel, pictures), _histograms(data), _kept(stage.path, data, pictures)]
    return "".join([*parts, _quarantine(data), _identity(stage)])


def _note(problem: str) -> str:
    return f'<p class="note">could not be read: {escape(problem)}</p>'


def _scope(data: CurationData) -> str:
    """What the numbers below the funnel come from, where that is not everything."""
    told = []
    if data.num_read < data.num_shards:
        told.append(f"{data.num_read} of {data.num_shards} shards (at most {MAX_SHARDS} are read, drawn by hash)")
    if data.lists_cut:
        told.append("evenly spaced pieces of the lists of refused clips")
    return f'<p class="why">Below the funnel: {escape(" and ".join(told))}.</p>' if told else ""


# -- the funnel


def _funnel(steps: list[dict[str, Any]]) -> str:
    """The table of funnel.json: what went in, what stayed, time, and why the rest did not."""
    most = max([max(step["num_in"], step["num_made"]) for step in steps] + [1])
    timed = [(name, text) for name, text in TIMES.items() if any(isinstance(step.get(name), int | float) for step in steps)]
    rows = []
    for step in steps:
        reasons = [
            f"{count} {reason}" + (f" ({kind})" if kind != "dropped" else "")
            for kind in KINDS
            for reason, count in sorted(step.get(kind, {}).items(), key=lambda item: -item[1])
        ]
        made, came = 100 * step["num_made"] / most, 100 * step["num_in"] / most
        bar = f'<div class="bar"><i class="lost" style="width:{came:.2f}%"></i><i style="width:{made:.2f}%"></i></div>'
        counts = [f"{step[name]:,}" for name in ("num_in", "num_out", "num_made")]
        times = [_seconds(step.get(name)) for name, _ in timed]
        why = f'<span class="why">{escape(", ".join(reasons))}</span>'
        rows.append([escape(str(step["stage"])), *counts, bar, *times, why])
    head = ["step", "in", "kept", "made", "", *(text for _, text in timed), "why not"]
    numeric = (1, 2, 3, *range(5, 5 + len(timed)))
    return f"<h3>funnel: what was kept, and why the rest was not</h3>{table(head, rows, numeric)}"


def _seconds(value: Any) -> str:
    """Seconds in as many digits as matter."""
    if not isinstance(value, int | float):
        return ""
    digits = next((digits for digits, least in ((0, 100), (1, 10), (2, 1)) if value >= least), 3)
    return f"{value:,.{digits}f}" if value >= 0.0005 else "0"


# -- scores and facts


def _histograms(data: CurationData) -> str:
    parts = []
    if data.scores:
        charts = "".join(figure(histogram, SCORES.get(histogram.name, "")) for histogram in data.scores)
        keys = {"kept": "kept", "lost": "lost", "limit": "limit of a rule"}
        legend = " ".join(f'<span class="key {name}"></span> {text}' for name, text in keys.items())
        parts.append(f'<h3>scores <span class="legend">{legend}</span></h3><div class="histograms">{charts}</div>')
    if data.facts or data.constants:
        told = ", ".join(f"{name} {number(value)}" for name, value in data.constants.items())
        same = f'<p class="why">the same for all kept clips: {escape(told)}</p>' if told else ""
        charts = "".join(figure(histogram, FACTS[histogram.name]) for histogram in data.facts)
        parts.append(f'<h3>kept clips in numbers</h3>{same}<div class="histograms">{charts}</div>')
    return "".join(parts)


# -- contact sheets


def _lost(data: CurationData, funnel: list[dict[str, Any]], pictures: Pictures | None) -> str:
    """A sheet for each reason, in the order of the stages, the most frequent reason first."""
    parts = []
    for step in funnel:
        counts = {(kind, reason): count for kind in KINDS for reason, count in step.get(kind, {}).items()}
        for (kind, reason), count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            losses = data.lost.get((str(step["stage"]), kind, reason), [])
            parts.append(_sheet((str(step["stage"]), kind, reason), count, step["num_in"], losses, pictures))
    return f'<h3>what was refused, by reason</h3><div class="reasons">{"".join(parts)}</div>' if parts else ""


def _sheet(of: Reason, count: int, num_in: int, losses: list[dict[str, Any]], pictures: Pictures | None) -> str:
    stage, kind, reason = of
    share = f"{100 * count / max(1, num_in):.3g} %"
    shown = f", {len(losses)} shown" if 0 < len(losses) < count else ""
    about = f"{kind} by {stage}, {count:,} of {num_in:,} ({share}){shown}"
    title = f'<h4>{escape(reason)} <span class="about">{escape(about)}</span></h4>'
    cells = [_lost_cell(loss, pictures) for loss in losses]
    return f'<div class="reason">{title}<div class="sheet-flow">{"".join(cells)}</div></div>'


def _lost_cell(loss: dict[str, Any], pictures: Pictures | None) -> str:
    name, start, stop, span = (loss.get(key) for key in ("source", "start", "stop", "span"))
    source, detail = escape(shortened(str(name), SOURCE)), escape(shortened(str(loss.get("detail", "")), DETAIL))
    frames = "" if start is None else f" <span>frames {start} to {'the end' if stop is None else stop}</span>"
    frames += f" <span>seconds {number(span[0])} to {number(span[1])}</span>" if span else ""
    if loss.get("kind") != "dropped" and loss.get("reason") in UNTOUCHED:
        picture = _absent(f"{loss.get('reason')}: no picture was tried")
    else:
        pair = (float(span[0]), float(span[1])) if span else None
        picture = _picture(lambda: [pictures.of_source(str(name), start, stop, pair)] if pictures else [], str(name))
    return f'<figure class="cell">{picture}<figcaption><b>{source}</b>{frames}<div>{detail}</div></figcaption></figure>'


def _kept(path: Path, data: CurationData, pictures: Pictures | None) -> str:
    if not data.kept:
        return ""
    cells = "".join(_kept_cell(path, record, pictures) for record in data.kept)
    return f'<h3>kept clips: {len(data.kept)} drawn by hash</h3><div class="sheet-grid">{cells}</div>'


def _kept_cell(path: Path, record: ClipRecord, pictures: Pictures | None) -> str:
    picture = _picture(lambda: pictures.of_clip(read_clip(path, record), NUM_FRAMES) if pictures else [], record.key)
    caption = escape(shortened(record.caption, CAPTION)) if record.caption else "<i>no caption</i>"
    facts = f"{record.num_frames} frames, {number(record.fps)} fps, {record.width}x{record.height}, {record.split}"
    shown = {name: number(float(f"{value:.3g}")) for name, value in sorted(record.scores.items())}  # as much as fits a column
    scores = "".join(f"<span>{escape(name)} <b>{value}</b></span>" for name, value in shown.items())
    text = f'<div>{caption}</div><div class="why">{escape(facts)}</div><div class="scores">{scores}</div>'
    return f'<figure class="cell">{picture}<figcaption>{text}</figcaption></figure>'


def _picture(make: Callable[[], Sequence[bytes]], alt: str) -> str:
    try:
        images = make()
    except DataError as error:
        return _absent(shortened(str(error), DETAIL))
    return f'<div class="strip">{"".join(jpeg(image, alt) for image in images)}</div>' if images else _absent("no picture")


def _absent(why: str) -> str:
    return f'<div class="strip absent">{escape(why)}</div>'


# -- broken files, and what this is


def _quarantine(data: CurationData) -> str:
    if not data.quarantined:
        return ""
    names = ("source", "stage", "reason", "detail")
    rows = [[escape(shortened(str(loss.get(name, "")), 300)) for name in names] for loss in data.quarantined]
    more = data.num_quarantined - len(rows)
    rest = f'<p class="why">and {more:,} more in quarantine.jsonl</p>' if more > 0 else ""
    summary = f"<summary>{data.num_quarantined:,} broken, set aside</summary>"
    return f"<details open>{summary}{table(names, rows)}{rest}</details>"


def _identity(stage: Stage) -> str:
    """The counts and hashes that name the dataset."""
    clips = stage.curation.get("num_clips")
    split = ", ".join(f"{count:,} {name}" for name, count in clips.items()) if isinstance(clips, dict) else ""
    facts = {
        "sources": stage.curation.get("num_sources"),
        "files left alone": stage.curation.get("num_ignored_files"),
        "clips": split,
        "manifest hash": stage.curation.get("manifest_hash"),
        "config hash": stage.curation.get("config_hash"),
    }
    rows = [[escape(name), f"<code>{escape(str(value))}</code>"] for name, value in facts.items() if value not in (None, "")]
    return f"<h3>dataset</h3>{table(['', ''], rows)}" if rows else ""
