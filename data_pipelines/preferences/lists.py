"""Readers of lists of pairs: VideoDPO, VideoReward, and JSON lines; see the sections in `videofm/config/import_pairs.py`.

Of VideoDPO's own code and data the layout is known (`OmniScore/funcs/save_utils.py`): clips are `{basic: {clip_path, score?},
misc: {frame_caption}}`, pairs `{video1, video2, label, frame_caption}`, label 0 for the first. The `score` that some pairs have
is a product that its weights are made from; here weights are made from the scores of the clips (`rarity_alpha`).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_pipelines.preferences.records import (
    Bad,
    ForeignPair,
    Found,
    located,
    number_of,
    prompt_of,
    read_json_lines,
    read_json_list,
    read_records,
    read_text,
)
from videofm.config.import_pairs import JSONLFormat, VideoDPOFormat, VideoRewardFormat
from videofm.data.preferences import Origin, PreferencePair, Side
from videofm.errors import DataError

AXES = {"VQ": "quality", "MQ": "motion", "TA": "text"}
"""Axes of VideoReward, and what they are called here."""
FORMAT, VERSION = "videofm.preferences", 1
"""What the lines of `videofm dpo export` say that they are."""
_CHOICES = {"winner": "chosen", "loser": "rejected", "tie": "tie"}


def read_videodpo(config: VideoDPOFormat, source: Path, videos: Path, generator: str) -> Found:
    """The pairs of VideoDPO's two files in `source`."""
    clips = read_json_list(source / config.metadata)
    origin = Origin(generator, None, None, {}) if generator else None

    def side(place: Any) -> tuple[Path, Side, str | None]:
        if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < len(clips):
            raise Bad("no such clip", f"video {place!r} of {len(clips)} in {config.metadata}")
        clip = clips[place] if isinstance(clips[place], dict) else {}
        basic, misc = _part(clip, "basic"), _part(clip, "misc")
        name = basic.get("clip_path", clip.get("video"))
        score = number_of(basic.get("score"))
        caption = misc.get("frame_caption", clip.get("caption"))
        scores = {} if score is None else {"overall": score}
        return located(videos, name), Side(str(name), "", scores, origin), prompt_of(caption) if caption else None

    def read(where: str, item: Any) -> ForeignPair:
        item = _object(item)
        sides = [side(item.get("video1")), side(item.get("video2"))]
        label = item.get("label", 0)
        if label not in (0, 1) or isinstance(label, bool):
            raise Bad("bad label", f"label {label!r}; 0 is for video1, 1 for video2")
        captions = {caption for _, _, caption in sides if caption is not None}
        if item.get("frame_caption") is None and len(captions) > 1:
            raise Bad("two prompts", f"its clips have different captions, {' and '.join(sorted(map(repr, captions)))}")
        prompt = prompt_of(item.get("frame_caption") or next(iter(captions), None))
        (winner, better, _), (loser, worse, _) = sides[:: -1 if label else 1]
        return ForeignPair(where, PreferencePair("", prompt, better, worse, source="VideoDPO"), winner, loser)

    items = ((f"{config.pairs}: record {n}", item) for n, item in enumerate(read_json_list(source / config.pairs)))
    yield from read_records(items, read)


def read_video_reward(config: VideoRewardFormat, source: Path, videos: Path, generator: str) -> Found:
    """The triplets of a VideoReward file in `source`."""

    def read(where: str, item: Any) -> ForeignPair:
        row = _object(item)
        choices = {name: _choice(row, name) for name in (*AXES, "Overall")}
        judged = _majority(choices) if config.judged_by == "majority" else choices[config.judged_by]
        if judged is None:
            raise Bad("no judgement", f"it has no {'VQ, MQ or TA' if config.judged_by == 'majority' else config.judged_by}")
        sides = {}
        for letter in "AB":
            path, model = row.get(f"path_{letter}"), str(row.get(f"{letter}_model") or generator)
            file = located(videos, path)
            sides[letter] = file, Side(str(path), "", _scores(row, letter), Origin(model, None, None, {}) if model else None)
        first, second = ("B", "A") if judged == "B" else ("A", "B")
        says = {first: "winner", second: "loser", "tie": "tie"}
        axes = {AXES[name]: says[choice] for name, choice in choices.items() if choice is not None and name in AXES}
        prompt = prompt_of(row.get("prompt"))
        pair = PreferencePair("", prompt, sides[first][1], sides[second][1], judged == "tie", axes=axes, source="VideoReward")
        return ForeignPair(where, pair, sides[first][0], sides[second][0])

    path = source / config.file
    yield from read_records(_csv_rows(path) if path.suffix.lower() == ".csv" else read_json_lines(path), read)


def read_jsonl(config: JSONLFormat, source: Path, videos: Path, generator: str) -> Found:
    """The lines of a JSON-lines file in `source`; fields beside prompt, chosen and rejected may be absent."""

    def read(where: str, item: Any) -> ForeignPair:
        line = _object(item)
        if line.get("format", FORMAT) != FORMAT or line.get("version", VERSION) != VERSION:
            found = f"{line.get('format', FORMAT)} of version {line.get('version', VERSION)!r}"
            raise Bad("unknown version", f"it is {found}, and this reads {FORMAT} of version {VERSION}")
        files = [located(videos, line.get(name)) for name in ("chosen", "rejected")]
        record = {name: line[name] for name in ("tie", "weight", "segments") if line.get(name) is not None}
        facts = _part(line, "provenance")
        record |= {name: facts[name] for name in ("source", "votes") if name in facts}
        record |= {"pair_id": line.get("pair_id", ""), "prompt": prompt_of(line.get("prompt"))}
        ours = {choice: side for side, choice in _CHOICES.items()}
        record["axes"] = {axis: ours.get(choice, choice) for axis, choice in _part(line, "axes").items()}
        own = asdict(Origin(generator, None, None, {})) if generator else None
        for name, side in (("chosen", "winner"), ("rejected", "loser")):
            record[side] = {
                "key": line[name],
                "sha256": _part(line, "sha256").get(name, ""),
                "scores": _part(line, "scores").get(name, {}),
                "origin": facts.get(name, own),
            }
        return ForeignPair(where, PreferencePair.from_json(record), *files)

    yield from read_records(read_json_lines(source / config.file), read)


def line_of(pair: PreferencePair, chosen: str, rejected: str) -> dict[str, Any]:
    """What `read_jsonl` reads, of a pair of ours whose videos are in the files `chosen` and `rejected`."""
    record = pair.to_json()
    sides = {"chosen": record["winner"], "rejected": record["loser"]}
    return {
        "format": FORMAT,
        "version": VERSION,
        "pair_id": pair.pair_id,
        "prompt": pair.prompt,
        "chosen": chosen,
        "rejected": rejected,
        "tie": pair.tie,
        "weight": pair.weight,
        "axes": {axis: _CHOICES[choice] for axis, choice in pair.axes.items()},
        "segments": record["segments"],
        "scores": {name: side["scores"] for name, side in sides.items()},
        "sha256": {name: side["sha256"] for name, side in sides.items()},
        "provenance": {
            **{name: side["origin"] for name, side in sides.items()},
            "source": pair.source,
            "votes": record["votes"],
        },
    }


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and fields of each row.

    Raises:
        DataError: it lacks a column that is needed.
    """
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        lacking = [name for name in ("prompt", "path_A", "path_B") if name not in (reader.fieldnames or ())]
        if lacking:
            found = ", ".join(reader.fieldnames or ()) or "none"
            raise DataError(f"{path} has no column {', '.join(lacking)} (it has {found}); is it of another format?")
        for row in reader:
            yield f"{path.name}:{reader.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path}: no CSV near line {reader.line_num} ({error}); is a quote left open there?") from None


def _choice(row: dict[str, Any], name: str) -> str | None:
    """`A`, `B` or `tie`; None where the row does not say."""
    said = str(row.get(name) or "").strip()
    known = {"": None, "a": "A", "b": "B", "same": "tie", "tie": "tie"}
    if said.lower() not in known:
        raise Bad("bad label", f"{name} is {said!r}; it is A, B, same or tie")
    return known[said.lower()]


def _majority(choices: dict[str, str | None]) -> str | None:
    """The side for which more axes are, `tie` where as many, None where no axis says anything."""
    said = [choices[name] for name in AXES if choices[name] is not None]
    if not said:
        return None
    first, second = said.count("A"), said.count("B")
    return "A" if first > second else "B" if second > first else "tie"


def _scores(row: dict[str, Any], letter: str) -> dict[str, float]:
    """Scores of a side, where the row has them: columns `VQ_A`, ..., `Overall_A`."""
    names = {**AXES, "Overall": "overall"}
    found = {ours: number_of(row.get(f"{name}_{letter}")) for name, ours in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def _object(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise Bad("not a record", f"{str(item)[:80]!r} is no JSON object")
    return item


def _part(line: dict[str, Any], name: str) -> dict[str, Any]:
    """An object in a record, empty where it is absent."""
    value = line.get(name)
    if value is not None and not isinstance(value, dict):
        raise Bad("not a record", f"{name} is {str(value)[:80]!r}, no JSON object")
    return value or {}
