"""Webdataset shards of others (video2dataset: `00000.tar` with KEY.mp4, KEY.txt, KEY.json), made readable where they lie.

Each tar gets an index and a manifest entry beside it, and stays as it is. Every video is decoded in a child process with
limits, so that the index says what is there. What is not taken is told in `indexing/GROUP.json`, and a tar that cannot be
trusted gets no entry. The work is done a tar at a time: a second run does only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.foreign_samples import STAGE, BadMember, Described, Sample, check_score_name, describe, samples_of
from data_pipelines.groups import split_position
from data_pipelines.isolate import Isolate
from data_pipelines.rows import Loss, Row
from data_pipelines.scratch import CLIPS, scratch_folder
from videofm.data.files import lock
from videofm.data.index import ClipRecord, write_index
from videofm.data.manifest import VERSION, Entry, Manifest, count_splits, entry_path, publish, read_entry
from videofm.data.tar import TarDamage, TarLimits, TarMember, scan_tar
from videofm.errors import ConfigError, DataError
from videofm.files import sha256_of, sync
from videofm.run_dir import read_json, write_json

COMMAND = (sys.executable, "-m", "data_pipelines.foreign_child")
PREFIX = "foreign:"
"""How the config hash of such shards begins: their videos are not in our canonical form."""

_CODE_VERSION = 1
_GROUP = re.compile(r"[A-Za-z0-9_-]{1,40}")
_OURS = ("index", "manifest", "indexing", "views")
_ARCHIVE = re.compile(r"\.(tar|tgz|tar\.[a-z0-9]+)$")


@dataclass(frozen=True)
class Options:
    """What decides about the index: its hash is the config hash of the entries.

    `held_out` is the share of sources (the field `source_field` of KEY.json, else the sample) that are held out. `scores` are
    numbers of KEY.json that become scores. `missing_caption` and `variable_rate` are `keep` or `drop`. The rest are limits, in
    bytes, pixels and seconds.
    """

    held_out: float = 0.0
    source_field: str = "url"
    scores: tuple[str, ...] = ()
    missing_caption: str = "keep"
    variable_rate: str = "drop"
    max_member_bytes: int = 2 << 30
    max_members: int = 200_000
    max_pixels: int = 36_000_000
    max_duration: float = 3600.0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out {self.held_out} is a share of the sources, from 0 to below 1")
        wrong = [name for name in self.scores if not check_score_name(name)]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: a score is named in lower case, with digits and _, for example clip_score")

    @property
    def config_hash(self) -> str:
        """`foreign:` and a SHA-256."""
        value = {"code": _CODE_VERSION, **asdict(self), "scores": sorted(self.scores)}
        return PREFIX + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Execution:
    """How the work is done: threads that each keep one decoding process, and its limits for a video (MiB, seconds)."""

    num_workers: int = 1
    memory_mib: int = 1024
    timeout: float = 120.0
    max_attempts: int = 2
    command: Sequence[str] = COMMAND


@dataclass
class TarReport:
    """What became of a tar: `damage` is why it is not used at all. `num_samples` is indexed and lost together."""

    tar: str
    damage: str | None = None
    detail: str = ""
    num_samples: int = 0
    num_indexed: int = 0
    losses: list[Loss] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "losses": [asdict(loss) for loss in self.losses], "notes": dict(self.notes)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TarReport:
        """The inverse of `to_json`."""
        return cls(**{**value, "losses": [Loss(**loss) for loss in value["losses"]], "notes": Counter(value["notes"])})


@dataclass
class FolderReport:
    """The sum over the tars of a folder; `num_skipped` of them were indexed before."""

    num_tars: int = 0
    num_skipped: int = 0
    damaged: dict[str, tuple[str, str]] = field(default_factory=dict)
    num_samples: int = 0
    num_indexed: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    def add(self, report: TarReport) -> None:
        """Count a tar."""
        self.num_tars += 1
        if report.damage is not None:
            self.damaged[report.tar] = (report.damage, report.detail)
        self.num_samples += report.num_samples
        self.num_indexed += report.num_indexed
        self.lost.update(f"{loss.kind}: {loss.reason}" for loss in report.losses)
        self.notes.update(report.notes)


def index_folder(
    folder: Path,
    options: Options = Options(),
    execution: Execution = Execution(),
    tell: Callable[[TarReport], None] | None = None,
) -> FolderReport:
    """Index every tar below `folder`; those that have an entry of the same options are left as they are.

    Args:
        folder: the dataset's folder; `index/`, `manifest/` and `indexing/` are made in it.
        options: what decides about the index.
        execution: how the work is done.
        tell: called after each tar.

    Raises:
        DataError: there is no tar, two have one name, or one changed since it was indexed.
        ConfigError: the folder was indexed with other options.
    """
    tars = list_tars(folder)
    for name in ("index", "manifest", "indexing"):
        (folder / name).mkdir(exist_ok=True)
    found, waiting = FolderReport(), []
    for name, group in tars:
        earlier = _earlier(folder, name, group, options)
        if earlier is None:
            waiting.append((name, group))
        else:
            found.add(earlier)
            found.num_skipped += 1
    with ThreadPoolExecutor(execution.num_workers) as pool:
        for report in pool.map(lambda item: index_tar(folder, item[0], item[1], options, execution), waiting):
            found.add(report)
            if tell is not None:
                tell(report)
    if len(found.damaged) < found.num_tars:
        Manifest.load(folder).write_snapshot()
    return found


def list_tars(folder: Path) -> list[tuple[str, str]]:
    """The tars below a folder, sorted: the name relative to it and the name of the group.

    Raises:
        DataError: there is no such folder, no tar in it, or two tars would be called the same.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give the one that holds the shards")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if _ARCHIVE.search(path.name) and path.relative_to(folder).parts[0] not in _OURS and path.is_file()
    )
    if not names:
        raise DataError(f"{folder} holds no tar; shards of webdataset are files like 00000.tar")
    groups = [_ARCHIVE.sub("", name).replace("/", "-") for name in names]
    twice = sorted({f"{name} ({group})" for name, group in zip(names, groups, strict=True) if groups.count(group) > 1})
    if twice:
        raise DataError(f"these tars would be called the same: {', '.join(twice)}; rename one")
    return list(zip(names, groups, strict=True))


def index_tar(folder: Path, name: str, group: str, options: Options, execution: Execution) -> TarReport:
    """Write the index, the report and the manifest entry of a tar; a damaged one gets its report only."""
    path, report = folder / name, TarReport(name)
    try:
        if not _GROUP.fullmatch(group):
            report = TarReport(name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))
            raise TarDamage(path, "bad_name", f"a shard's name, without .tar, matches {_GROUP.pattern}; rename it")
        before = _stamp(path)
        scan = scan_tar(path, TarLimits(options.max_member_bytes, options.max_members))
        samples = samples_of(scan, group, name)
        report.num_samples = len(samples.found) + len(samples.losses)
        report.losses += samples.losses
        report.notes.update({f"ignored .{extension}": count for extension, count in samples.ignored.items()})
        records = list(_records(path, name, samples.found, options, execution, report))
        sha256 = sha256_of(path)
        if _stamp(path) != before:
            raise TarDamage(path, "changed", "it changed while it was read; index it again when it is complete")
    except TarDamage as damage:
        report = TarReport(report.tar, damage.reason, damage.detail)
        write_json(_report_path(folder, group), report.to_json())
        return report
    report.num_indexed = len(records)
    report.notes["without_caption"] += sum(not record.caption for record in records)
    # The report comes before the commit: a committed tar always has one.
    write_json(_report_path(folder, group), report.to_json())
    _commit(folder, group, name, before[0], sha256, sorted(records, key=lambda record: record.key), options.config_hash)
    return report


def as_text(found: FolderReport) -> str:
    """The sum for people."""
    parts = [
        f"{found.num_tars:,} tars ({found.num_skipped:,} of them indexed before), {len(found.damaged):,} not used",
        f"{found.num_samples:,} samples, {found.num_indexed:,} indexed, {found.lost.total():,} not taken",
    ]
    parts += [f"  {count:>9,}  {reason}" for reason, count in found.lost.most_common()]
    parts += [f"  {count:>9,}  note: {note}" for note, count in found.notes.most_common() if count]
    parts += [f"  {name}: {reason}: {detail}" for name, (reason, detail) in sorted(found.damaged.items())]
    return "\n".join([*parts, "every one with its reason: indexing/GROUP.json"])


def _records(
    path: Path, tar: str, samples: Sequence[Sample], options: Options, execution: Execution, report: TarReport
) -> Iterator[ClipRecord]:
    """The records of the samples that decode; the others become losses of the report."""
    probe: dict[str, Any] = {"kind": "probe", "max_bytes": options.max_member_bytes, "max_pixels": options.max_pixels,
             "max_duration": options.max_duration, "min_frames": 1}  # fmt: skip
    stages = [probe, {"kind": "decode", "variable_rate": options.variable_rate}]
    with (
        scratch_folder(CLIPS, Path(tempfile.gettempdir())) as scratch,
        Isolate(stages, scratch, execution.memory_mib, execution.timeout, execution.command) as isolate,
    ):
        for sample in samples:
            try:
                described = describe(path, sample, options.scores, options.source_field)
            except BadMember as error:
                report.losses.append(_loss(tar, sample, "quarantined", STAGE, error.reason, error.detail))
                continue
            if not described.caption and options.missing_caption == "drop":
                report.losses.append(_loss(tar, sample, "dropped", STAGE, "no_caption", "no text in KEY.txt or KEY.json"))
                continue
            record = _decode(path, tar, sample, described, options, isolate, scratch, execution.max_attempts, report)
            if record is not None:
                yield record
            for file in scratch.iterdir():
                file.unlink()


def _decode(
    path: Path, tar: str, sample: Sample, described: Described, options: Options, isolate: Isolate, scratch: Path, tries: int,
    report: TarReport,
) -> ClipRecord | None:  # fmt: skip
    """Decode a video in the child; None where it is lost."""
    # The file is named by us: a member's name never reaches the file system.
    clip = scratch / "video"
    sha256 = _extract(path, sample.video, clip)
    source_id = hashlib.sha256((described.source or sample.key).encode()).hexdigest()[:16]
    row = Row(source_id, f"{tar}:{sample.name}", str(clip), sample.video.size)
    for attempt in range(1, tries + 1):
        result = isolate.run(row)
        if result.failure is None:
            break
        if attempt == tries:
            failure = result.failure
            detail = f"failed {tries} times; {failure.detail}"
            report.losses.append(_loss(tar, sample, "quarantined", failure.stage or "probe", failure.kind, detail))
            return None
    for stage in result.stages:
        report.losses += [Loss(**loss) for loss in stage["losses"]]
        report.notes.update({note: count for note, count in stage["notes"].items() if count})
    if not result.rows:
        return None
    found = result.rows[0].clip
    assert found is not None
    split = "held_out" if split_position(source_id) < options.held_out else "train"
    return ClipRecord(
        sample.key, tar, sample.video.offset, sample.video.size, sha256, found.num_frames, found.fps, found.height, found.width,
        described.caption, source_id, split, described.scores,
    )  # fmt: skip


def _extract(path: Path, member: TarMember, target: Path) -> str:
    """Copy a member to a file; its SHA-256."""
    digest, left = hashlib.sha256(), member.size
    with path.open("rb") as source, target.open("wb") as file:
        source.seek(member.offset)
        while left and (content := source.read(min(left, 1 << 20))):
            digest.update(content)
            file.write(content)
            left -= len(content)
    if left:
        raise TarDamage(path, "changed", "it became shorter while it was read; index it again when it is complete")
    return digest.hexdigest()


def _commit(
    folder: Path, group: str, tar: str, num_bytes: int, sha256: str, records: Sequence[ClipRecord], config_hash: str
) -> None:
    """Put the index in place and create the entry: the steps of `ShardWriter.commit`, without a tar of ours."""
    index = f"index/shard-{group}.parquet"
    temporary = folder / f"{index}.tmp-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        index_sha256 = write_index(temporary, records)
        entry = Entry(
            VERSION, group, tar, num_bytes, sha256, index, index_sha256, count_splits(records), config_hash,
            sorted({record.source_id for record in records}),
        )  # fmt: skip
        with lock(folder / "manifest" / f".shard-{group}.lock"):
            if not entry_path(folder, group).exists():
                os.replace(temporary, folder / index)
                sync(folder / "index")
                publish(entry_path(folder, group), entry)
    finally:
        temporary.unlink(missing_ok=True)
    if (committed := read_entry(folder, group)).config_hash != config_hash:
        raise _other_options(folder, committed, config_hash)


def _earlier(folder: Path, name: str, group: str, options: Options) -> TarReport | None:
    """The report of a tar that is indexed; None where it is to be done."""
    if not entry_path(folder, group).exists():
        return None
    entry = read_entry(folder, group)
    if entry.config_hash != options.config_hash:
        raise _other_options(folder, entry, options.config_hash)
    if (folder / name).stat().st_size != entry.bytes or entry.tar != name:
        raise DataError(
            f"{folder / name} is not the tar that was indexed ({entry.tar}, {entry.bytes:,} bytes); if it was replaced on "
            f"purpose, delete {entry_path(folder, group)} and index again"
        )
    return TarReport.from_json(read_json(_report_path(folder, group)))


def _other_options(folder: Path, entry: Entry, config_hash: str) -> ConfigError:
    ours = entry.config_hash.startswith(PREFIX)
    how = "indexed with other options" if ours else "written by `videofm curate`; it needs no index"
    fix = f". Delete {folder / 'manifest'} and {folder / 'index'} to index it anew" if ours else ""
    return ConfigError(
        f"shard {entry.group} of {folder} was {how} (hash {entry.config_hash[:20]}, these are {config_hash[:20]}){fix}"
    )


def _report_path(folder: Path, group: str) -> Path:
    return folder / "indexing" / f"{group if _GROUP.fullmatch(group) else _hash(group)}.json"


def _hash(name: str) -> str:
    """Digits for a name, which may hold bytes that are no UTF-8."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _loss(tar: str, sample: Sample, kind: str, stage: str, reason: str, detail: str) -> Loss:
    return Loss(kind, stage, f"{tar}:{sample.name}", reason, detail)
