"""The videos of foreign pairs: each is decoded once, in a process with limits, so that what is stored is known to be sound.

What is known is kept in `work/videos.jsonl` of the run directory; re-encoded clips lie in `work/clips/` until they are packed.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipelines.foreign import COMMAND as DECODING
from data_pipelines.isolate import COMMAND as CURATING
from data_pipelines.isolate import Isolate, Result
from data_pipelines.rows import Row
from data_pipelines.scratch import CLIPS, scratch_folder
from videofm.config.curation_stages import ProbeConfig
from videofm.config.import_pairs import ImportPairsConfig
from videofm.errors import DataError
from videofm.files import sha256_of
from videofm.run_dir import read_jsonl, write_atomic

_MAX_ATTEMPTS = 2
GIVEN_UP = ("crash", "timeout")
"""Problems that may lie in the limits and not in the file."""


@dataclass(frozen=True)
class Video:
    """A file that pairs name. `problem` says why it cannot be used, in words that begin with a reason for counts; the rest is
    then empty. `stored` is what becomes the clip: the file itself, or what it was re-encoded to."""

    file: str
    problem: str = ""
    sha256: str = ""
    stored: str = ""
    stored_sha256: str = ""
    num_frames: int = 0
    fps: float = 0.0
    height: int = 0
    width: int = 0

    @property
    def shape(self) -> tuple[int, int, int, float]:
        """Frames, height, width, and frames a second; the videos of a pair have one."""
        return self.num_frames, self.height, self.width, self.fps


class VideoReader:
    """Decodes files on `config.num_workers` threads, each with a process of its own; `work` is kept between attempts."""

    def __init__(self, config: ImportPairsConfig, work: Path, stopped: Callable[[], bool]) -> None:
        self.config, self.work, self.stopped = config, work, stopped
        self._done = work / "videos.jsonl"
        self._clips = work / "clips"
        self._lock = threading.Lock()

    def read(self, files: Sequence[Path], tell: Callable[[int], None]) -> dict[Path, Video]:
        """File -> what is known of it; fewer than asked for where a stop was heard. `tell` gets how many more are done.

        Raises:
            DataError: the work cannot go on (a full disk, a setting that no video fits).
        """
        self._clips.mkdir(parents=True, exist_ok=True)
        found = self._known(files)
        tell(len(found))
        todo = [file for file in files if file not in found]
        parts = [todo[start :: self.config.num_workers] for start in range(min(self.config.num_workers, len(todo)))]
        with ThreadPoolExecutor(max(1, len(parts))) as pool:
            for part in pool.map(lambda part: self._read_part(part, tell), parts):
                found |= part
        return found

    def _known(self, files: Sequence[Path]) -> dict[Path, Video]:
        """What an earlier attempt found of files that are still the same; a last line that was cut goes. What was given up is
        read again: another attempt may have other limits, or a machine with less to do."""
        wanted, rows, found = {str(file): file for file in files}, [], {}
        for row in read_jsonl(self._done):
            video = Video(**row["video"])
            file = wanted.get(video.file)
            given_up = video.problem.partition(":")[0] in GIVEN_UP
            there = bool(video.problem) or Path(video.stored).is_file()
            if file is not None and row["stamp"] == _stamp(file) and there and not given_up:
                found[file] = video
                rows.append(row)
        write_atomic(self._done, "".join(f"{json.dumps(row)}\n" for row in rows))
        return found

    def _read_part(self, files: Sequence[Path], tell: Callable[[int], None]) -> dict[Path, Video]:
        found: dict[Path, Video] = {}
        config = self.config
        with (
            scratch_folder(CLIPS, self.work) as scratch,
            Isolate(_stages(config), scratch, config.memory_mib, config.timeout, _command(config)) as isolate,
        ):
            for file in files:
                if self.stopped():
                    break
                stamp = _stamp(file)
                found[file] = self._read_one(file, isolate)
                line = json.dumps({"stamp": stamp, "video": asdict(found[file])})
                with self._lock, self._done.open("a", encoding="utf-8") as kept:
                    kept.write(f"{line}\n")
                    tell(1)
                for rest in scratch.iterdir():
                    rest.unlink()
        return found

    def _read_one(self, file: Path, isolate: Isolate) -> Video:
        name = hashlib.sha256(os.fsencode(file)).hexdigest()[:16]
        row = Row(name, file.name, str(file.absolute()), file.stat().st_size)
        for _ in range(_MAX_ATTEMPTS):
            result = isolate.run(row)
            if result.failure is None:
                break
        if (problem := _problem(result, file)) is not None:
            return Video(str(file), problem)
        made = result.rows[0]
        assert made.clip is not None and made.info is not None
        stored, clip = file.absolute(), made.clip
        if self.config.transcode is not None:
            stored = (self._clips / f"{name}.mp4").absolute()
            os.replace(clip.path, stored)
        sha256 = made.info.sha256 if self.config.transcode is None else sha256_of(stored)
        facts = clip.num_frames, clip.fps, clip.height, clip.width
        return Video(str(file), "", made.info.sha256, str(stored), sha256, *facts)


def _stages(config: ImportPairsConfig) -> list[dict[str, Any]]:
    probe = ProbeConfig(min_frames=1).model_dump(mode="json")
    if config.transcode is None:
        return [probe, {"kind": "decode", "variable_rate": "drop"}]
    return [probe, config.transcode.model_dump(mode="json")]


def _command(config: ImportPairsConfig) -> Sequence[str]:
    """The children that count the frames of a file are others than those of curation."""
    return CURATING if config.transcode is not None else DECODING


def _problem(result: Result, file: Path) -> str | None:
    """Why a file cannot be used.

    Raises:
        DataError: it is not the file's fault.
    """
    if result.failure is not None and result.failure.kind == "fatal":
        raise DataError(f"reading {file} cannot go on: {result.failure.detail}")
    if result.failure is not None:
        return f"{result.failure.kind}: failed {_MAX_ATTEMPTS} times; {result.failure.detail}"
    losses = [loss for stage in result.stages for loss in stage["losses"]]
    if losses:
        return f"{losses[0]['reason']}: {losses[0]['detail']}"
    return None if result.rows else "nothing: no clip came out of it"


def _stamp(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]
