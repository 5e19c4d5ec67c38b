"""What checkpoints there are, which of them stay, and what is wrong with them: for people who look at runs. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videofm.checkpoint.keep import Best, KeepRules, best_of
from videofm.checkpoint.record import COMMITTED, Record, committed, file_problem, read_record
from videofm.errors import CheckpointError
from videofm.run_dir import RunDirectory, read_json

_DEFAULT_LAST = 2


@dataclass(frozen=True)
class Entry:
    """A checkpoint, as far as its marker and the sizes of its files tell.

    Attributes:
        folder: where it lies.
        step: optimizer steps that were done, by the name of the folder.
        num_bytes: of all files that are there.
        record: what the marker says; None where that cannot be read.
        kept: why it stays when newer ones come: `permanent`, `best`; empty for one that will go.
        damage: the first thing that is wrong; None for a checkpoint that is whole as far as this tells.
    """

    folder: Path
    step: int
    num_bytes: int
    record: Record | None
    kept: tuple[str, ...]
    damage: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, for programs."""
        record = self.record
        return {
            "folder": str(self.folder),
            "step": self.step,
            "bytes": self.num_bytes,
            "time": record.time if record else None,
            "healthy": record.facts.healthy if record else None,
            "metrics": dict(record.facts.metrics) if record else {},
            "kept": list(self.kept),
            "damage": self.damage,
        }


@dataclass(frozen=True)
class Damage:
    """Everything that is wrong with a checkpoint, a sentence a file, and the newest one that can be used in its place."""

    folder: Path
    problems: list[str]
    instead: Path | None

    @property
    def advice(self) -> str:
        """What to do about it."""
        restore = "bring the files back from a copy if you have one"
        if self.instead is None:
            return f"{restore}; no other checkpoint of the run is whole: without a copy, move the run away and start again"
        return f"{restore}, or delete {self.folder}: {self.instead.name} is whole, and a run goes on from it by itself"


def places_of(run: Path) -> list[Path]:
    """The folders in which checkpoints of a run may lie: its own, and that of `trainer.spare_checkpoints`."""
    return [run / "checkpoints", *([spare] if (spare := spare_of(run)) is not None else [])]


def spare_of(run: Path) -> Path | None:
    """Where the checkpoints of a run went that its own folder had no room for; None where its config names no such place."""
    return spare_folder(RunDirectory(run), _trainer(run).get("spare_checkpoints"))


def spare_folder(run: RunDirectory, place: str | Path | None) -> Path | None:
    """The folder of a run in `place`, its `trainer.spare_checkpoints`; None where that is None.

    Runs share the place and not the folder: its name has that of the run, its fingerprint, and its birth, so that a run that is
    begun anew in the same place goes not on from what the one before it left there.
    """
    if place is None:
        return None
    return Path(place) / "-".join(filter(None, [run.path.resolve().name, (run.fingerprint or "new")[:12], run.birth]))


def checkpoints_of(path: Path) -> list[Path]:
    """The folders of checkpoints that `path`, a run or a checkpoint, has: oldest first, unfinished ones among them.

    Raises:
        CheckpointError: there are none.
    """
    if (path / "checkpoints").is_dir():
        found = [folder for place in places_of(path) for folder in place.glob("step_*") if folder.is_dir()]
        if not found:
            raise CheckpointError(f"{path} has no checkpoint yet")
        return sorted(found, key=lambda folder: folder.name)
    if (path / COMMITTED).is_file() or (path.is_dir() and path.name.startswith("step_")):
        return [path]
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: give a run directory, or a checkpoint in it")
    raise CheckpointError(f"{path} is neither a run (it has no checkpoints/) nor a checkpoint (it has no {COMMITTED})")


def finished_checkpoints(path: Path) -> list[Path]:
    """The finished ones of `checkpoints_of`.

    Raises:
        CheckpointError: there are none.
    """
    found = [folder for folder in checkpoints_of(path) if (folder / COMMITTED).is_file()]
    if not found:
        raise CheckpointError(f"{path} has no checkpoint that was finished: none has a {COMMITTED}")
    return found


def own_checkpoints(run: Path) -> list[Path]:
    """The finished ones that lie in the run itself, oldest first: each step once, with the frozen models beside them.

    Raises:
        CheckpointError: there are none.
    """
    if found := committed(run / "checkpoints"):
        return found
    spare = spare_of(run)
    elsewhere = f"; those in {spare} (trainer.spare_checkpoints) do not count" if spare and committed(spare) else ""
    raise CheckpointError(f"{run / 'checkpoints'} has no checkpoint that was finished: none has a {COMMITTED}{elsewhere}")


def rules_of(run: Path) -> KeepRules:
    """What the config of a run says about which checkpoints stay."""
    trainer = _trainer(run)
    best = trainer.get("keep_best")
    return KeepRules(trainer.get("keep_checkpoints", _DEFAULT_LAST), trainer.get("keep_every"), Best(**best) if best else None)


def entries(path: Path) -> list[Entry]:
    """Every checkpoint of a run, or the one at `path`, by its marker and by sizes; hashes are not looked at.

    Raises:
        CheckpointError: there is none.
    """
    folders = checkpoints_of(path)
    records = {folder: _record(folder) for folder in folders}
    run = path if (path / "checkpoints").is_dir() else path.resolve().parents[1]
    reasons = _reasons(run, {folder: found for folder, found in records.items() if isinstance(found, Record)})
    return [_entry(folder, found, reasons.get(folder, ())) for folder, found in records.items()]


def damage(path: Path) -> list[Damage]:
    """Hash every file of a run's checkpoints, or of the one at `path`, and tell all that is wrong with each.

    A file that no marker names is wrong, too: a reader could take it for a part of the checkpoint.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    found = {folder: list(problems_of(folder)) for folder in checkpoints_of(path)}
    broken = {folder: problems for folder, problems in found.items() if problems}
    if not broken:
        return []
    asked_of_one = path in found
    beside = sorted(path.parent.glob("step_*")) if asked_of_one else list(found)
    others = [folder for folder in reversed(beside) if folder not in broken and (folder / COMMITTED).is_file()]
    # Of a run all are hashed already; of one checkpoint the others are, from the newest on, until one is whole.
    instead = next((folder for folder in others if not asked_of_one or not any(problems_of(folder))), None)
    return [Damage(folder, problems, instead) for folder, problems in broken.items()]


def problems_of(folder: Path) -> Iterator[str]:
    """A sentence for each file of a checkpoint that is missing, differs from what was written, or was put there."""
    try:
        record = read_record(folder)
    except CheckpointError as error:
        yield str(error)
        return
    for name, expected in record.files.items():
        if problem := file_problem(folder, name, expected):
            yield problem
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        hidden = any(part.startswith(".") for part in Path(name).parts)  # such as those that NFS makes
        if path.is_file() and name not in record.files and name != COMMITTED and not hidden:
            yield f"{folder} is damaged: {name} is no part of it, and was put there later"


def _trainer(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    found: dict[str, Any] = read_json(path).get("trainer", {}) if path.is_file() else {}
    return found


def _record(folder: Path) -> Record | str:
    try:
        return read_record(folder)
    except CheckpointError as error:
        return str(error)


def _entry(folder: Path, found: Record | str, kept: tuple[str, ...]) -> Entry:
    step = int(number) if (number := folder.name.removeprefix("step_")).isdecimal() else -1
    num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if isinstance(found, str):
        return Entry(folder, step, num_bytes, None, kept, found)
    problems = (file_problem(folder, name, expected, hashed=False) for name, expected in found.files.items())
    return Entry(folder, step, num_bytes, found, kept, next((problem for problem in problems if problem), None))


def _reasons(run: Path, records: Mapping[Path, Record]) -> dict[Path, tuple[str, ...]]:
    rules = rules_of(run)
    facts = {folder: record.facts for folder, record in records.items()}
    best = best_of(facts, rules.best) if rules.best else None
    every = rules.every
    return {
        folder: tuple(
            reason
            for reason, holds in {"permanent": every and found.step % every == 0, "best": folder == best}.items()
            if holds
        )
        for folder, found in facts.items()
    }


def as_text(found: Sequence[Entry]) -> str:
    """A table for people; of a checkpoint that lies elsewhere than in the run it says where."""
    rows = [("step", "committed (UTC)", "size", "healthy", "kept", "state")]
    for entry in found:
        record = entry.record
        rows.append(
            (
                str(entry.step),
                record.time.removesuffix("+00:00").replace("T", " ") if record else "-",
                f"{entry.num_bytes / 2**20:,.1f} MiB",
                "-" if record is None else "yes" if record.facts.healthy else "no",
                ", ".join(entry.kept) or "-",
                entry.damage or ("whole" if entry.folder.parent.name == "checkpoints" else f"whole, in {entry.folder.parent}"),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    return "\n".join(lines)
