"""Preferences: which of two clips of one prompt is better, and everything that is known of how both came to be.

```
preferences.json           the header, written last: schema, where the clips are, and name, SHA-256 and length of each file
pairs/pairs-00000.jsonl    one record a line, at most 10,000 a file
```

The clips themselves are an ordinary dataset of ours; a record names two of its keys. A folder exists when its header does, and
the header has the hash of every file, so that a reader sees all of it or an error. Whether a record makes sense is not the
folder's business: `pair_problem` says what is wrong with one, and whoever reads decides what to do about it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from videofm.errors import DataError
from videofm.files import sync
from videofm.run_dir import read_json, write_atomic, write_json

SCHEMA = 1
"""Version of the records and of the header."""

HEADER = "preferences.json"

PAIRS_A_FILE = 10_000

CHOICES = ("winner", "loser", "tie")
"""What an axis of a pair can say; also the `choice` of a vote, where other words (as `both_bad`) name neither side."""


@dataclass(frozen=True)
class Origin:
    """Who made a clip, and how, so that it can be made again and that pairs of an older policy can be told apart.

    Attributes:
        generator: name of the run or of the model that made it.
        policy: SHA-256 (hex) of the weights that made it (`train.encoders.weights_hash`); None where they are not known.
        seed: of its noise; None where it is not known.
        sampler: settings of the sampler, in plain values.
    """

    generator: str
    policy: str | None
    seed: int | None
    sampler: dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One clip of a pair: its key in the dataset, the SHA-256 (hex) of its file, its scores by axis, and its origin.

    `scores["overall"]`, where there is one, is what the pair was ranked by.
    """

    key: str
    sha256: str
    scores: dict[str, float]
    origin: Origin | None


@dataclass(frozen=True)
class Segments:
    """Labels of stretches of `seconds` each, from the start of the clips: 1 where the winner is better there, -1 where the
    loser is, 0 where neither (DenseDPO)."""

    seconds: float
    labels: tuple[int, ...]


@dataclass(frozen=True)
class PreferencePair:
    """Two clips of one prompt.

    Attributes:
        pair_id: names the pair; every random draw about it is keyed by it. No other pair of a folder has it.
        prompt: what both clips were made from.
        winner: the better clip; in a tie just the first.
        loser: the other one.
        tie: neither is better.
        weight: what its loss is multiplied by; ties have none in any case.
        segments: labels of stretches of time, or None.
        axes: name of an axis (as `motion`) -> which side is better on it, `winner`, `loser` or `tie`.
        source: where the judgement came from, in words.
        votes: the single judgements, where there were several. `choice` of one, where it has it, is of `CHOICES` or any other
            word for neither side.
    """

    pair_id: str
    prompt: str
    winner: Side
    loser: Side
    tie: bool = False
    weight: float = 1.0
    segments: Segments | None = None
    axes: dict[str, str] = field(default_factory=dict)
    source: str = ""
    votes: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values, as a line of a file has them."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> PreferencePair:
        """The inverse of `to_json`.

        Raises:
            DataError: a field is missing, unknown or of the wrong type; the message names it.
        """
        found = _fields(cls, value, "the record")
        found |= {name: _side(found[name], name) for name in ("winner", "loser")}
        if found.get("segments") is not None:
            segments = _fields(Segments, found["segments"], "segments")
            _require(_is_number(segments["seconds"]), "segments.seconds", segments["seconds"], "a number")
            _require(
                _all(segments["labels"], (list, tuple), int), "segments.labels", segments["labels"], "a list of whole numbers"
            )
            found["segments"] = Segments(segments["seconds"], tuple(segments["labels"]))
        for name in ("pair_id", "prompt", "source"):
            _require(isinstance(found.get(name, ""), str), name, found.get(name), "a text")
        _require(isinstance(found.get("tie", False), bool), "tie", found.get("tie"), "true or false")
        _require(_is_number(found.get("weight", 1.0)), "weight", found.get("weight"), "a number")
        _require(_all(found.get("axes", {}), dict, str), "axes", found.get("axes"), "axes with a text each")
        _require(_all(found.get("votes", []), (list, tuple), dict), "votes", found.get("votes"), "a list of objects")
        return cls(**{**found, "votes": tuple(found.get("votes", ()))})


@dataclass(frozen=True)
class Preferences:
    """A folder of preferences, read.

    Attributes:
        pairs: its records, in their order.
        clips: the dataset that the keys are of: a folder, made absolute where the header has it relative, or a URL.
        header: all that the header says.
        hash: SHA-256 (hex) over the files of records: the identity of the preferences.
    """

    pairs: list[PreferencePair]
    clips: str
    header: dict[str, Any]
    hash: str


def pair_problem(pair: PreferencePair) -> str | None:
    """What is wrong with a record by itself, in words; None where nothing is. Whether its clips are there is not looked at."""
    return _naming_problem(pair) or _number_problem(pair) or _contradiction(pair)


def describe_pair(pair: PreferencePair) -> str:
    """A pair in messages."""
    return f"pair {pair.pair_id} ({pair.winner.key} over {pair.loser.key})"


def write_preferences(
    folder: str | Path, pairs: Iterable[PreferencePair], clips: str | Path, facts: Mapping[str, Any] | None = None
) -> Path:
    """Write a folder of preferences; what stood there before is replaced. Files come first and the header last, so that a
    crash leaves no folder that could be read by half.

    Args:
        folder: where; made if need be.
        pairs: the records, in the order that is kept.
        clips: the dataset of their clips. A folder below that of the run's neighbours (`folder/../..`) is stored relative to
            `folder`, so that a recipe's runs can be moved together; any other folder absolute, so that it is found from
            wherever the preferences are read; a URL as it is given.
        facts: more for the header, in plain values (the config of the stage, counts of what was left out).

    Returns:
        the folder.

    Raises:
        DataError: two pairs have one `pair_id`, a number is not finite, or a fact has the name of a field of the header.
    """
    folder, facts = Path(folder), dict(facts or {})
    records = [pair.to_json() for pair in pairs]
    twice = [name for name, count in Counter(record["pair_id"] for record in records).items() if count > 1]
    if twice:
        raise DataError(f"{len(twice)} pair ids name several pairs ({', '.join(twice[:3])}); draws are keyed by them, so each "
                        "pair needs its own")  # fmt: skip
    path, base = _stored_place(folder, clips)
    header = {"schema": SCHEMA, "clips": path, "clips_base": base, "num_pairs": len(records)}
    if taken := sorted(set(facts) & {*header, "files"}):
        raise DataError(f"facts cannot have {', '.join(taken)}: the header of preferences says these itself; rename them")
    (folder / HEADER).unlink(missing_ok=True)  # first: files of two writings do not fit together
    for old in (folder / "pairs").glob("pairs-*.jsonl"):
        old.unlink()
    starts = range(0, len(records), PAIRS_A_FILE)
    header["files"] = [_write_file(folder, n, records[start : start + PAIRS_A_FILE]) for n, start in enumerate(starts)]
    if records:
        sync(folder / "pairs")
    write_json(folder / HEADER, {**facts, **header})
    return folder


def read_preferences(folder: str | Path) -> Preferences:
    """The preferences in a folder.

    Raises:
        DataError: there are none, their schema is of another version, or a file is missing or damaged; the message has the
            record where one cannot be read, and what to do.
    """
    folder = Path(folder)
    if not (folder / HEADER).is_file():
        raise DataError(
            f"{folder} has no preferences ({HEADER} is missing): the writing of it was cut short, or it is another folder. "
            "Make some with `videofm dpo rank`, `videofm dpo annotate --export` or `videofm dpo import`"
        )
    header = read_json(folder / HEADER)
    schema = header.get("schema") if isinstance(header, dict) else None
    if schema != SCHEMA:
        raise DataError(
            f"{folder / HEADER} has schema {schema!r}, and this version reads {SCHEMA}; update videofm, or write the "
            "preferences again with this version"
        )
    _check_header(folder, header)
    pairs = [pair for file in header["files"] for pair in _read_file(folder, file)]
    total = hashlib.sha256("".join(file["sha256"] for file in header["files"]).encode()).hexdigest()
    clips = str(header["clips"])
    if header["clips_base"] == "folder":
        clips = os.path.normpath(folder.resolve() / clips)
    return Preferences(pairs, clips, header, total)


def _naming_problem(pair: PreferencePair) -> str | None:
    """What is wrong with names: of the pair, and of its clips."""
    if not pair.pair_id:
        return "it has no pair_id"
    if re.search(r"@\d+~", pair.pair_id):
        return f"its pair_id {pair.pair_id!r} has '@NUMBER~', by which replacements are named in a run; take another"
    if not pair.winner.key or not pair.loser.key:
        return "a side names no clip"
    if pair.winner.key == pair.loser.key:
        return f"winner and loser are the same clip {pair.winner.key}"
    if pair.winner.sha256 and pair.winner.sha256 == pair.loser.sha256:
        return f"winner {pair.winner.key} and loser {pair.loser.key} are identical (one SHA-256)"
    return None


def _number_problem(pair: PreferencePair) -> str | None:
    """What is wrong with weight, scores, segments and axes, each by itself."""
    if not math.isfinite(pair.weight) or pair.weight < 0:
        return f"its weight is {pair.weight:g}; it must be finite and not negative"
    for name, side in (("winner", pair.winner), ("loser", pair.loser)):
        if wrong := [axis for axis, score in side.scores.items() if not math.isfinite(score)]:
            return f"the {name}'s score {wrong[0]} is not finite"
    if pair.segments is not None:
        if not math.isfinite(pair.segments.seconds) or pair.segments.seconds <= 0 or not pair.segments.labels:
            return "its segments need a positive length in seconds and at least one label"
        if wrong_labels := sorted(set(pair.segments.labels) - {-1, 0, 1}):
            return f"its segments have the labels {wrong_labels}; they are -1, 0 or 1"
    for axis, choice in pair.axes.items():
        if choice not in CHOICES:
            return f"its axis {axis} says {choice!r}; it can say {', '.join(CHOICES)}"
    return None


def _contradiction(pair: PreferencePair) -> str | None:
    """Where a pair that is no tie speaks for its loser."""
    if pair.tie:
        return None
    first, second = pair.winner.scores.get("overall"), pair.loser.scores.get("overall")
    if first is not None and second is not None and first < second:
        return f"contradictory: the overall score of its winner, {first:g}, is below that of its loser, {second:g}"
    if pair.axes and all(choice == "loser" for choice in pair.axes.values()):
        return f"contradictory: its loser is better on {', '.join(sorted(pair.axes))}"
    counts = Counter(str(vote.get("choice")) for vote in pair.votes)
    if counts["loser"] and counts["loser"] >= counts["winner"]:
        return f"contradictory votes: {counts['loser']} for its loser, {counts['winner']} for its winner"
    return None


def _stored_place(folder: Path, clips: str | Path) -> tuple[str, str]:
    """The dataset as the header has it, and what that is relative to."""
    if "://" in str(clips):
        return str(clips), "given"
    here, there = folder.resolve(), Path(clips).resolve()
    if there.is_relative_to(here.parent.parent) and here.parent != here.parent.parent:
        return Path(os.path.relpath(there, here)).as_posix(), "folder"
    return str(Path(clips).absolute()), "given"


def _write_file(folder: Path, number: int, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write a file of records; what the header says of it."""
    try:
        lines = [json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False) for record in records]
    except ValueError as error:
        raise DataError(f"a pair holds a number that is not finite ({error}); leave its score or its weight out") from None
    text, name = "".join(f"{line}\n" for line in lines), f"pairs/pairs-{number:05d}.jsonl"
    write_atomic(folder / name, text)
    return {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "num_pairs": len(lines)}


def _read_file(folder: Path, described: Mapping[str, Any]) -> Iterator[PreferencePair]:
    """The records of one file."""
    path = folder / str(described["name"])
    fix = "restore it, or write the preferences again"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is in {HEADER} but missing; {fix}") from None
    found = hashlib.sha256(content).hexdigest()
    intact = found == described["sha256"]
    pairs = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            pairs.append(PreferencePair.from_json(json.loads(line)))
        except (ValueError, DataError) as error:
            damaged = "" if intact else f" (the file is damaged: SHA-256 expected {described['sha256']}, found {found})"
            raise DataError(f"record {number} of {path} cannot be read: {error}{damaged}; {fix}") from None
    if not intact or len(pairs) != described["num_pairs"]:
        raise DataError(
            f"{path} is damaged: it has {len(pairs)} records of {described['num_pairs']}, SHA-256 expected "
            f"{described['sha256']}, found {found}; {fix}"
        )
    yield from pairs


def _check_header(folder: Path, header: Mapping[str, Any]) -> None:
    """Refuse a header that lacks what is needed, or names files outside of the folder."""
    files = header.get("files")
    whole = isinstance(header.get("clips"), str) and header.get("clips_base") in ("folder", "given") and isinstance(files, list)
    if whole:
        wanted = {f"pairs/pairs-{number:05d}.jsonl" for number in range(len(files or []))}
        whole = all(isinstance(file, dict) and {"name", "sha256", "num_pairs"} <= set(file) for file in files or [])
        whole = whole and {file["name"] for file in files or []} == wanted
    if not whole:
        raise DataError(
            f"{folder / HEADER} is damaged: it needs clips, clips_base and files (name, sha256, num_pairs); restore it, or "
            "write the preferences again"
        )


def _side(value: Any, name: str) -> Side:
    found = _fields(Side, value, name)
    for part in ("key", "sha256"):
        _require(isinstance(found[part], str), f"{name}.{part}", found[part], "a text")
    scores = found["scores"]
    _require(isinstance(scores, dict) and all(map(_is_number, scores.values())), f"{name}.scores", scores, "axes with numbers")
    if found["origin"] is None:
        return Side(**found)
    origin = _fields(Origin, found["origin"], f"{name}.origin")
    _require(isinstance(origin["generator"], str), f"{name}.origin.generator", origin["generator"], "a text")
    _require(isinstance(origin["policy"], str | None), f"{name}.origin.policy", origin["policy"], "a hash or null")
    whole = origin["seed"] is None or (isinstance(origin["seed"], int) and _is_number(origin["seed"]))
    _require(whole, f"{name}.origin.seed", origin["seed"], "a whole number or null")
    _require(isinstance(origin["sampler"], dict), f"{name}.origin.sampler", origin["sampler"], "an object")
    return Side(**{**found, "origin": Origin(**origin)})


_OPTIONAL = {"tie", "weight", "segments", "axes", "source", "votes"}
"""Fields of a record that may be left out; the others may not."""


def _fields(kind: type[Any], value: Any, name: str) -> dict[str, Any]:
    """The fields of a dataclass out of plain values: all that are needed, and no other."""
    if not isinstance(value, dict):
        raise DataError(f"{name} is {value!r} and should be an object")
    known = {item.name for item in fields(kind)}
    needed = known - _OPTIONAL if kind is PreferencePair else known
    if missing := sorted(needed - set(value)):
        raise DataError(f"{name} lacks {', '.join(missing)}")
    if extra := sorted(set(value) - known):
        raise DataError(f"{name} has the unknown {', '.join(extra)}; known are {', '.join(sorted(known))}")
    return dict(value)


def _require(right: bool, name: str, value: Any, wanted: str) -> None:
    if not right:
        raise DataError(f"{name} is {value!r} and should be {wanted}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _all(value: Any, outer: type | tuple[type, ...], inner: type) -> bool:
    """Whether `value` is a list, or an object, of items of one type."""
    fits: bool = isinstance(value, outer)
    items = value.values() if isinstance(value, dict) else value
    return fits and all(isinstance(item, inner) and not isinstance(item, bool) for item in items)
