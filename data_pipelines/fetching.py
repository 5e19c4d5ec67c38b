"""Bringing a source to where it is worked on: a local one stays where it is, a remote one is copied to scratch disk."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit, urlunsplit

from data_pipelines.rows import Row, Unusable
from videofm.data import storage
from videofm.errors import DataError, MissingError, TransientError
from videofm.files import sha256_of

SIDECARS = (".txt", ".json", ".jsonl", ".srt", ".vtt")
_SIDECAR_BYTES = 64 << 20
_POLL_SECONDS = 0.5
_LONGEST_SUFFIX = 16
"""Of a name's ending so much is kept, in characters; file systems take names of 255 bytes."""


@dataclass(frozen=True)
class CopyLimits:
    """What a copy of a source may take: bytes (of a sidecar 64 MiB at most), seconds, and hosts: see `named_by` in
    `storage.fetch`; empty stands for a local list."""

    max_bytes: int | None = None
    seconds: float | None = None
    named_by: str = ""

    def fetch(self, place: str, path: Path, max_bytes: int | None) -> None:
        """Copy an object within the limits.

        Raises:
            Unusable: it is not there, the store refuses it, or it is beyond the limits.
            TransientError: the store could not be reached.
        """
        try:
            storage.fetch(place, path, max_bytes=max_bytes, seconds=self.seconds, named_by=self.named_by)
        except TransientError:
            raise
        except MissingError:
            raise Unusable("missing", "the object vanished after it was listed") from None
        except DataError as error:
            raise Unusable("unfetchable", str(error)) from None

    def exists(self, place: str) -> bool:
        """Whether there is such an object; raises as `storage.exists`."""
        return storage.exists(place, named_by=self.named_by)


_NO_LIMITS = CopyLimits()


@contextmanager
def fetched(
    row: Row, scratch: Path, sidecars: bool, notes: Counter[str] | None = None, limits: CopyLimits = _NO_LIMITS
) -> Iterator[Path]:
    """The local path of a source; with its sidecars where `sidecars`. What was copied goes at the end.

    A sidecar that the store refuses to tell of counts as absent, and as `sidecar_refused` in `notes`: signed addresses, and
    buckets that may not be listed, answer so for files that are not there.

    Raises:
        Unusable: it vanished (`missing`), the store refuses it (`unfetchable`), or its bytes are not the promised ones.
        TransientError: the store could not be reached, after retries: this says nothing about the source.
    """
    path = storage.local_path(row.path)
    if path is not None:
        if not os.path.isfile(path):  # False, not an error, for a name that is too long
            raise Unusable("missing", "the file vanished after it was listed")
        _check(row, path)
        yield path
        return
    path = scratch / f"{row.source_id}{PurePosixPath(row.name).suffix[:_LONGEST_SUFFIX]}"
    copied = [path]
    try:
        limits.fetch(row.path, path, limits.max_bytes)
        _check(row, path)
        for suffix in SIDECARS if sidecars else ():
            place = sidecar_place(row.path, suffix)
            if _is_there(place, notes, limits):
                copied.append(path.with_suffix(suffix))
                limits.fetch(place, copied[-1], _SIDECAR_BYTES)
        yield path
    finally:
        for part in copied:
            part.unlink(missing_ok=True)


def sidecar_place(place: str, suffix: str) -> str:
    """The place of the file beside `place` with another ending, on the same host; a query (a signature) goes with it."""
    parts = urlsplit(place, allow_fragments=False)
    head = parts.path.removesuffix(PurePosixPath(parts.path).suffix)
    return urlunsplit(parts._replace(path=f"{head}{suffix}"))


def check_reachable(row: Row, limits: CopyLimits = _NO_LIMITS) -> None:
    """See that the store of a source answers, whatever it says of the source.

    Raises:
        TransientError: it does not, after retries.
    """
    try:
        if not storage.is_local(row.path):
            limits.exists(row.path)
    except TransientError:
        raise
    except DataError:
        pass  # an answer


def _is_there(place: str, notes: Counter[str] | None, limits: CopyLimits) -> bool:
    try:
        return limits.exists(place)
    except TransientError:
        raise
    except DataError:
        if notes is not None:
            notes["sidecar_refused"] += 1
        return False


def _check(row: Row, path: Path) -> None:
    if row.promised_sha256 and (found := sha256_of(path)) != row.promised_sha256:
        raise Unusable("checksum", f"the list promises SHA-256 {row.promised_sha256}, the file has {found}")


def wait_for_space(
    folder: Path, free_mib: int, seconds: float, stopped: Callable[[], bool], poll: float = _POLL_SECONDS
) -> None:
    """Return once the disk of `folder` has `free_mib` MiB free, or a stop was asked for.

    Raises:
        DataError: it did not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while (free := _free_bytes(folder)) < free_mib * 2**20 and not stopped():
        if time.monotonic() >= deadline:
            raise DataError(
                f"the scratch disk of {folder} has {free / 2**20:.0f} MiB free, engine.scratch_free_mib asks for {free_mib}, "
                f"and {seconds:g} s of waiting did not help; free it, or set engine.scratch to a folder on another disk"
            )
        time.sleep(poll)


def _free_bytes(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize
