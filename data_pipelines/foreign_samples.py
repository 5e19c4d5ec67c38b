"""The samples of a foreign webdataset shard: which members belong together, and what is wrong with the others.

`webdataset` takes the name up to the first dot as the key and joins what comes one after the other; it returns a key twice
when it comes back later, and merges `clip.001.mp4` with `clip.002.mp4`. Here such keys are refused by name.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.rows import Loss
from videofm.data.shards import KEY_PATTERN
from videofm.data.tar import TarMember, TarScan

STAGE = "tar"
VIDEO = ("mp4", "m4v", "mov", "mkv", "webm", "avi")
"""Extensions of videos. What a member holds is found out by decoding it."""
USED = (*VIDEO, "txt", "json")
MAX_CAPTION_BYTES, MAX_JSON_BYTES = 1 << 16, 1 << 20
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class Sample:
    """A video with the members beside it. `key` is the one of the index: `GROUP-KEY`."""

    key: str
    name: str
    video: TarMember
    text: TarMember | None
    metadata: TarMember | None


@dataclass
class Samples:
    """The samples of a shard, those that are lost, and members that are not read, counted by extension."""

    found: list[Sample] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


@dataclass
class _Unit:
    """The members of one key. `num_runs` counts the places in the tar where it stands."""

    members: dict[str, list[TarMember]] = field(default_factory=dict)
    num_runs: int = 0
    refused: tuple[str, str] | None = None


def samples_of(scan: TarScan, group: str, tar: str) -> Samples:
    """Group the members of a tar. Nothing is read but names."""
    result, units = Samples(), dict[str, _Unit]()
    for refused in scan.refused:
        key, extension = split_name(refused.name)
        if refused.reason == "unsafe_name":
            result.losses.append(_loss(tar, refused.name, refused.reason, refused.detail))
        elif extension in USED:
            units.setdefault(key, _Unit()).refused = (refused.reason, f"{refused.name}: {refused.detail}")
        else:
            result.ignored[extension or "(no extension)"] += 1
    last = None
    for member in scan.members:
        key, extension = split_name(member.name)
        if extension not in USED and extension.rpartition(".")[2] not in VIDEO:
            result.ignored[extension or "(no extension)"] += 1
            continue
        unit = units.setdefault(key, _Unit())
        unit.num_runs += key != last
        unit.members.setdefault(extension, []).append(member)
        last = key
    for key, unit in units.items():
        _judge(result, unit, key, group, tar)
    return result


def split_name(name: str) -> tuple[str, str]:
    """A member's key (its folders joined with `-`) and extension, which begins at the first dot, in lower case."""
    *folders, base = name.removeprefix("./").split("/")
    stem, _, extension = base.partition(".")
    return "-".join([*folders, stem]), extension.lower()


def _judge(result: Samples, unit: _Unit, key: str, group: str, tar: str) -> None:
    """Make one sample of a key, or lose it with its reason."""
    videos = [member for extension in VIDEO for member in unit.members.get(extension, [])]
    dotted = [m for extension, members in unit.members.items() if "." in extension for m in members]
    full = f"{group}-{key}"
    if dotted:
        for member in [*dotted, *videos]:
            detail = f"webdataset would read the key {key!r}; a key has no dot"
            result.losses.append(_loss(tar, member.name, "dotted_key", detail))
        return
    name = videos[0].name if videos else key
    twice = [extension for extension, members in unit.members.items() if len(members) > 1]
    reason: tuple[str, str] | None = None
    if twice:
        where = "apart from each other" if unit.num_runs > 1 else "one after the other"
        reason = "duplicate_key", f"{key!r} has {', '.join(twice)} more than once, {where}; nothing tells which is meant"
    elif unit.num_runs > 1:
        reason = (
            "duplicate_key",
            f"the members of {key!r} stand in {unit.num_runs} places; webdataset would make as many samples",
        )
    elif not KEY_PATTERN.fullmatch(full):
        reason = "bad_key", f"{full[:100]!r} does not match {KEY_PATTERN.pattern}"
    elif unit.refused is not None:
        reason = unit.refused
    elif not videos:
        reason = "no_video", f"{key!r} has only {', '.join(unit.members)}"
    elif len(videos) > 1:
        reason = "several_videos", f"{key!r} has {len(videos)} videos"
    if reason is not None:
        result.losses.append(_loss(tar, name, *reason))
        return
    text, metadata = (next(iter(unit.members.get(extension, [])), None) for extension in ("txt", "json"))
    result.found.append(Sample(full, name, videos[0], text, metadata))


@dataclass(frozen=True)
class Described:
    """What the small members of a sample say."""

    caption: str
    scores: dict[str, float]
    source: str | None


class BadMember(Exception):
    """A small member that cannot be read: reason and detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def describe(path: Path, sample: Sample, scores: tuple[str, ...], source_field: str) -> Described:
    """Caption (of KEY.txt, else `caption` in KEY.json), scores and source of a sample.

    Raises:
        BadMember: the caption or the source is no plain text, a member is too large, or KEY.json is no JSON object.
    """
    value: dict[str, Any] = {}
    if sample.metadata is not None:
        value = _json(_read(path, sample.metadata, MAX_JSON_BYTES, "json_too_large"))
    if sample.text is not None:
        content = _read(path, sample.text, MAX_CAPTION_BYTES, "caption_too_long")
        try:
            caption = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadMember("caption_not_utf8", f"{sample.text.name}: {error.reason} at byte {error.start}") from None
    else:
        caption = value["caption"] if isinstance(value.get("caption"), str) else ""
    found = {name: float(value[name]) for name in scores if _is_number(value.get(name))}
    source = value.get(source_field)
    source = source if isinstance(source, str) and source else None
    for what, text in (("caption", caption), (source_field, source or "")):
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write half a character: "\ud800"
            raise BadMember("not_text", f"{what}: {error}") from None
    return Described(" ".join(caption.split()), found, source)


def check_score_name(name: str) -> bool:
    """Whether a field of KEY.json can be a score."""
    return _NAME.fullmatch(name) is not None


def _json(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadMember("bad_json", f"{type(error).__name__}: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise BadMember("bad_json", f"it holds {type(value).__name__}, not an object")
    return value


def _read(path: Path, member: TarMember, limit: int, reason: str) -> bytes:
    if member.size > limit:
        raise BadMember(reason, f"{member.name}: {member.size:,} bytes, at most {limit:,}")
    with path.open("rb") as file:
        return os.pread(file.fileno(), member.size, member.offset)


def _is_number(value: Any) -> bool:
    """Whether `value` is a finite number; an int may be beyond what a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _loss(tar: str, name: str, reason: str, detail: str) -> Loss:
    return Loss("quarantined", STAGE, f"{tar}:{name}", reason, detail)
