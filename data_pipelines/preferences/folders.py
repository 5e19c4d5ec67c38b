"""Readers of folders of videos: what is better lies in one, what is worse in another, and files of one name make a pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipelines.preferences.records import Bad, ForeignPair, Found, located, prompt_of, read_records, read_text
from videofm.config.import_pairs import ChosenRejectedFormat, FolderPairsFormat
from videofm.data.preferences import Origin, PreferencePair, Side
from videofm.errors import DataError

VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv")

Stem = tuple[str, Path, Path, Sequence[Path]]
"""A name, the folders of the better and of the worse ones, and where its prompt may be, the first that is there counts."""


def read_folder_pairs(config: FolderPairsFormat, source: Path, videos: Path, generator: str) -> Found:
    """The pairs of all `NAME/w` and `NAME/l` in `source`, or of its own `w` and `l`."""
    _check_folder(source)
    names = [source] if (source / config.winners).is_dir() else sorted(path for path in source.iterdir() if path.is_dir())
    names = [name for name in names if (name / config.winners).is_dir() or (name / config.losers).is_dir()]
    if not names:
        raise DataError(f"{source} has no folder with {config.winners!r} and {config.losers!r} in it; is it of another format?")

    def stems() -> Iterator[tuple[str, Stem]]:
        for name in names:
            better, worse = name / config.winners, name / config.losers
            for stem in _stems(better, worse):
                texts = [
                    better / f"{stem}.txt",
                    name / "prompt.txt",
                    *([] if name == source else [source / f"{name.name}.txt"]),
                ]
                yield f"{'' if name == source else name.name + '/'}{stem}", (stem, better, worse, texts)

    yield from read_records(stems(), lambda where, item: _pair(where, item, videos, generator, "folder pairs"))


def read_chosen_rejected(config: ChosenRejectedFormat, source: Path, videos: Path, generator: str) -> Found:
    """The pairs of two folders in `source`."""
    _check_folder(source)
    better, worse = source / config.chosen, source / config.rejected
    for folder in (better, worse):
        if not folder.is_dir():
            raise DataError(f"{folder} is missing: format.chosen and format.rejected are folders in `source`")

    def stems() -> Iterator[tuple[str, Stem]]:
        for stem in _stems(better, worse):
            texts = [folder / f"{stem}.txt" for folder in (better, source, source / "prompts")]
            yield stem, (stem, better, worse, texts)

    yield from read_records(stems(), lambda where, item: _pair(where, item, videos, generator, "chosen and rejected folders"))


def _pair(where: str, item: Stem, videos: Path, generator: str, source: str) -> ForeignPair:
    stem, better, worse, texts = item
    files = [located(videos, str(_only(folder, stem).absolute())) for folder in (better, worse)]
    text = next((path for path in texts if path.is_file()), None)
    if text is None:
        raise Bad("no prompt", f"there is none of {', '.join(map(str, texts))}")
    origin = Origin(generator, None, None, {}) if generator else None
    winner, loser = (Side(file.relative_to(file.parents[1]).as_posix(), "", {}, origin) for file in files)
    return ForeignPair(where, PreferencePair("", prompt_of(read_text(text)), winner, loser, source=source), *files)


def _stems(*folders: Path) -> list[str]:
    """Names of the videos in the folders, without their endings."""
    found = {path.stem for folder in folders if folder.is_dir() for path in folder.iterdir() if _is_video(path)}
    return sorted(found)


def _only(folder: Path, stem: str) -> Path:
    """The one video of a name."""
    found = sorted(path for path in folder.iterdir() if path.stem == stem and _is_video(path)) if folder.is_dir() else []
    if not found:
        raise Bad("no partner", f"{folder} has no video {stem!r}")
    if len(found) > 1:
        raise Bad("several files", f"{folder} has {', '.join(path.name for path in found)}")
    return found[0]


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_ENDINGS


def _check_folder(source: Path) -> None:
    if not source.is_dir():
        raise DataError(f"source = {str(source)!r} is no folder")
