"""Clips that cannot be read: which they are, where that is written down, and when there are too many to go on."""

from __future__ import annotations

import json
import os
from pathlib import Path

from videofm.data import storage
from videofm.data.reader import BadClipError, ClipRequest
from videofm.errors import DataError
from videofm.progress import LOG

MIN_BAD_CLIPS = 3
"""So many may be bad however few were read: a small dataset can lose a clip."""

MAX_IN_A_ROW = 100


class BadClips:
    """Remembers bad clips, so that each is tried, logged and written down once, and stops a run that has too many.

    Attributes:
        num_read: clips read since the start, good or bad.
        num_replaced: times that another clip took the place of a bad one.
    """

    def __init__(self, max_share: float, quarantine: Path | None = None) -> None:
        """
        Args:
            max_share: share of the clips read that may be bad.
            quarantine: a file of JSON lines to which bad clips are added; those that it has are bad without another try. None
                writes nothing.

        Raises:
            DataError: the file is there and is not one of these.
        """
        self.max_share, self.quarantine = max_share, quarantine
        self.num_read = self.num_replaced = 0
        self._in_a_row = 0
        self._known: dict[tuple[str, str], str] = {}
        self._seen: set[tuple[str, str]] = set()
        if quarantine is not None and quarantine.exists():
            for line in quarantine.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self._known[row["key"], row["sha256"] or row.get("place", "")] = row["reason"]
                except (ValueError, KeyError, TypeError):
                    raise DataError(
                        f"{quarantine} is not a list of quarantined clips (line {line[:80]!r}); move it away"
                    ) from None

    def problem(self, request: ClipRequest) -> BadClipError | None:
        """Why a clip is known to be bad, or None."""
        reason = self._known.get(_name(request))
        return None if reason is None else BadClipError(reason)

    def good(self, num_clips: int = 1) -> None:
        """The clips of a sample were read."""
        self.num_read += num_clips
        self._in_a_row = 0

    def bad(self, request: ClipRequest, error: BadClipError, replaces: bool = True) -> None:
        """A clip cannot be read, and another one is about to take its place. `replaces` is False where its sample is being
        replaced already, as that of a pair whose other clip is bad too.

        Raises:
            DataError: they are too many.
        """
        self.num_read += 1
        self.num_replaced += replaces
        self._in_a_row += 1
        name = _name(request)
        self._seen.add(name)
        if name not in self._known:
            self._known[name] = str(error)
            LOG.warning("%s; another clip takes its place", error)
            if self.quarantine is not None:
                row = {"key": request.key, "sha256": request.sha256, "place": storage.redacted(request.place)}
                _append(self.quarantine, {**row, "reason": str(error)})
        see, fix = "", "run `videofm data verify` on the dataset, and restore its shards or curate again"
        if self.quarantine is not None:
            # A repaired clip has the name of the damaged one.
            see, fix = f"; they are listed in {self.quarantine}", f"{fix}, then delete {self.quarantine}"
        if self._in_a_row >= MAX_IN_A_ROW:
            raise DataError(f"{self._in_a_row} clips in a row cannot be read, the last one: {error}{see}; {fix}")
        if len(self._seen) > max(MIN_BAD_CLIPS, self.max_share * self.num_read):
            raise DataError(
                f"{len(self._seen)} of {self.num_read} clips cannot be read, more than data.reading.max_replaced_share "
                f"{self.max_share:g}, the last one: {error}{see}; {fix}, or raise the share"
            )


def _name(request: ClipRequest) -> tuple[str, str]:
    """A clip among those of all datasets, which may share keys: by its content or, where that is not checked, its shard."""
    return request.key, request.sha256 or storage.redacted(request.place)


def _append(path: Path, row: dict[str, str | None]) -> None:
    """Add a line in one write, so that ranks do not mix theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(row) + "\n").encode())
    finally:
        os.close(descriptor)
