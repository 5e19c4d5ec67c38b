"""An annotator's desk: what the page may know, in opaque names, and what its answers mean.

Neither keys, names of files, seeds nor scores reach the page: pairs and videos have names that are keyed hashes of annotator
and pair, so that the same video has another name in each pair, and nothing can be asked for that is not on the desk.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from videofm.annotate.queue import Pool, first_is_left, order_for
from videofm.annotate.store import AXIS_CHOICES, CHOICES, Refused, Store, Vote
from videofm.data.index import ClipRecord
from videofm.data.shards import read_clip
from videofm.errors import DataError

SIDES = ("left", "right")
PAGE_CHOICES = ("left", "right", "tie", "both_bad", "skip")
"""What the page can answer; the store keeps sides as candidates."""
AXES = {
    "motion": "Motion",
    "quality": "Picture quality",
    "text": "Fits the prompt",
}
"""Axes with words of their own on the page; any other is shown by its name."""

_NAME = re.compile(r"[\w][\w .@-]{0,39}")
_CLIENT_ID = re.compile(r"[A-Za-z0-9-]{8,64}")
_CACHED_CLIPS = 32


class Desk:
    """Desks of all annotators over one store.

    Args:
        folder: the dataset of candidates.
        pool: its pairs.
        store: for the votes on them.
        secret: key of the opaque names.
        names: the only annotators there are; empty: whoever says a name.
    """

    def __init__(self, folder: Path, pool: Pool, store: Store, secret: bytes, names: Sequence[str] = ()) -> None:
        self.pool, self.store, self.names = pool, store, [clean_name(name) for name in names]
        self._secret, self._settings = secret, store.settings
        self._read = lru_cache(_CACHED_CLIPS)(lambda number, side: _read_checked(folder, self._clip(number, side)))

    def join(self, name: str) -> str:
        """Give the annotator `name` a queue, if he has none; his name as it is kept.

        Raises:
            Refused: it is no name, or not one of those that were named at the start.
        """
        annotator = clean_name(name)
        if not self.admits(annotator):
            raise Refused(f"{annotator!r} is not one of the annotators here: {', '.join(self.names)}", 403)
        self.store.join(annotator, order_for(self.pool.pairs, self._settings.seed, annotator))
        return annotator

    def admits(self, annotator: str) -> bool:
        """Whether he may vote here; a browser may come with the name of an earlier start."""
        return not self.names or annotator in self.names

    def state(self, annotator: str) -> dict[str, Any]:
        """What the page shows: the pair, its videos from left to right, and how far the annotator is."""
        shown, progress = self.store.current(annotator), self.store.progress(annotator)
        found: dict[str, Any] = {
            "annotator": annotator,
            "axes": [{"name": name, "label": AXES.get(name, name)} for name in self._settings.axes],
            "num_done": progress.num_done,
            "num_pairs": progress.num_pairs,
            "can_undo": progress.last is not None,
            "pair": None,
        }
        if shown is not None:
            videos = [f"/video/{self._name(annotator, shown.number, side)}" for side in self._sides(annotator, shown.number)]
            found["pair"] = {
                "id": self._name(annotator, shown.number, "pair"),
                "prompt": self.pool.pairs[shown.number].prompt,
                "videos": videos,
            }
        return found

    def vote(self, annotator: str, body: Mapping[str, Any]) -> None:
        """Take the vote in `body` (`annotator`, `pair`, `choice`, `axes`, `client_id`); on disk when this returns.

        Raises:
            Refused: it is no vote, another annotator's, or not about the pair that is on the desk.
        """
        self._check_owner(annotator, body)
        client_id, choice, axes = _client_id(body), body.get("choice"), body.get("axes", {})
        if choice not in PAGE_CHOICES:
            raise Refused(f"choice is {choice!r}; it is one of {', '.join(PAGE_CHOICES)}", 400)
        if not isinstance(axes, dict) or not set(axes) <= set(self._settings.axes):
            raise Refused(f"axes is {axes!r}; the axes here are {', '.join(self._settings.axes) or 'none'}", 400)
        if wrong := [value for value in axes.values() if value not in ("left", "right", "tie")]:
            raise Refused(f"an axis says {wrong[0]!r}; it says left, right or tie", 400)
        number, opened = self._pair(annotator, body.get("pair"))
        left, right = self._sides(annotator, number)
        as_stored = {"left": left, "right": right}
        said: dict[str, str] = {axis: as_stored.get(value) or value for axis, value in axes.items()}
        kept = as_stored.get(choice) or choice
        assert kept in CHOICES and set(said.values()) <= set(AXIS_CHOICES)
        # A skipped pair is one that nobody judged: what was said of its axes before is no judgement either.
        said = {} if kept == "skip" else said
        pair_id = self.pool.pairs[number].pair_id
        self.store.vote(Vote(client_id, annotator, pair_id, kept, said, left, opened, time.time()), number)

    def undo(self, annotator: str, body: Mapping[str, Any]) -> None:
        """Take the last vote back; the pair lies on the desk again, its sides as before.

        Raises:
            Refused: there is none, or its pair is another annotator's now.
        """
        self._check_owner(annotator, body)
        self.store.undo(annotator, _client_id(body))

    def video(self, annotator: str, name: str) -> bytes:
        """The MP4 file of a video on the desk.

        Raises:
            Refused: there is none of this name.
            DataError: its shard is missing or damaged.
        """
        for number in self._at_hand(annotator):
            for side in ("first", "second"):
                if _same(self._name(annotator, number, side), name):
                    return self._read(number, side)
        raise Refused("no video on your desk has this name; load the page again", 404)

    def _at_hand(self, annotator: str) -> list[int]:
        """Numbers of the pair on the desk and of the one before."""
        shown, last = self.store.current(annotator), self.store.last_pair(annotator)
        return [number for number in (shown.number if shown else None, last) if number is not None]

    def _pair(self, annotator: str, name: Any) -> tuple[int, float]:
        """The pair that the page calls `name`, and since when it is on the desk."""
        shown = self.store.current(annotator)
        for number in self._at_hand(annotator):
            if isinstance(name, str) and _same(self._name(annotator, number, "pair"), name):
                return number, shown.opened if shown is not None and shown.number == number else time.time()
        raise Refused("no pair on your desk has this id: it is unknown, or you voted on it in another window", 404)

    def _check_owner(self, annotator: str, body: Mapping[str, Any]) -> None:
        if body.get("annotator") != annotator:
            raise Refused(
                f"this page was opened by {body.get('annotator')!r}, and the browser now votes as {annotator!r}; "
                "say again who votes",
                403,
            )

    def _sides(self, annotator: str, number: int) -> tuple[str, str]:
        """Which candidate is on the left, which on the right."""
        is_left = first_is_left(self._settings.seed, annotator, self.pool.pairs[number].pair_id)
        return ("first", "second") if is_left else ("second", "first")

    def _name(self, annotator: str, number: int, what: str) -> str:
        words = "\0".join((annotator, self.pool.pairs[number].pair_id, what))
        return hmac.new(self._secret, words.encode(), hashlib.sha256).hexdigest()[:32]

    def _clip(self, number: int, side: str) -> ClipRecord:
        pair = self.pool.pairs[number]
        return (pair.first if side == "first" else pair.second).record


def clean_name(name: object) -> str:
    """A name of an annotator as it is kept.

    Raises:
        Refused: it is empty, too long, or has other characters.
    """
    cleaned = unicodedata.normalize("NFC", " ".join(name.split())) if isinstance(name, str) else ""
    if not _NAME.fullmatch(cleaned):
        raise Refused(
            f"{name!r} cannot be a name: it has 1 to 40 letters, digits, spaces or . _ @ -, and begins with a letter or digit",
            400,
        )
    return cleaned


def _client_id(body: Mapping[str, Any]) -> str:
    found = body.get("client_id")
    if not isinstance(found, str) or not _CLIENT_ID.fullmatch(found):
        raise Refused(f"client_id is {found!r}; it is 8 to 64 letters, digits and dashes, another one for each vote", 400)
    return found


def _same(expected: str, shown: str) -> bool:
    """Whether two texts are equal, in a time that does not tell where they differ; `shown` may hold anything."""
    return hmac.compare_digest(expected.encode(), shown.encode("utf-8", "surrogatepass"))


def _read_checked(folder: Path, record: ClipRecord) -> bytes:
    """The file of a clip, as it was committed."""
    content = read_clip(folder, record)
    if (found := hashlib.sha256(content).hexdigest()) != record.sha256:
        raise DataError(
            f"clip {record.key} in {folder / record.shard} is damaged: SHA-256 expected {record.sha256}, found {found}"
        )
    return content
