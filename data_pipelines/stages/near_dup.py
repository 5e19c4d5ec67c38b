"""Near duplicates: of clips whose frames look alike, the best one stays: most pixels, then longest, then first by name.

Each clip has 8 pHashes of 64 bits, one for each of 8 evenly spaced frames. A hash is cut into 4 bands of 16 bits; clips that
share a band at the same frame meet and are compared whole. Two frames that differ in at most 3 bits always share a band (3
flipped bits leave one of 4 bands untouched). At exactly 8 bits, spread at random, they do with probability 0.327, and a pair
with 6 such frames meets with probability 1 - 0.673^6 = 0.907; real copies differ in 0 to 4 bits.

A clip goes when a better one that looks like it exists anywhere, also if that one goes itself because of a third: so the answer
does not depend on the order in which clips are met, and the best of a family always stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.rows import Row, unpack_array
from data_pipelines.stages.scores import NUM_HASHES
from videofm.config.curation_stages import NearDupConfig

BANDS = 4


class NearDupStage:
    """See `NearDupConfig`. A barrier: needs the hashes that `scores` took."""

    name, requires, placement, num_fit_rows = "near_dup", ("probe", "scores"), "barrier", 0

    def __init__(self, config: NearDupConfig) -> None:
        self.config = config

    def fit(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Nothing is fitted."""
        raise AssertionError("num_fit_rows is 0")

    def keys(self, row: Row, state: dict[str, Any] | None = None) -> list[str]:
        """One key for each band of each frame."""
        bands = hashes_of(row).view("<u2").reshape(NUM_HASHES, BANDS)
        return [f"{frame}.{band}.{bands[frame, band]:04x}" for frame in range(NUM_HASHES) for band in range(BANDS)]

    def choose(self, key: str, rows: Sequence[Row]) -> Iterator[tuple[Row, str, str]]:
        """Of clips that share a band, those that look like a better one."""
        ranked = sorted(rows, key=_rank)
        hashes = np.stack([hashes_of(row) for row in ranked])  # (N, 8)
        sources = np.array([row.source_id for row in ranked])
        for place, row in enumerate(ranked[1:], start=1):
            alike = self._alike(hashes[:place], hashes[place])
            if not self.config.within_source:
                alike &= sources[:place] != row.source_id
            if alike.any():
                better = ranked[int(np.argmax(alike))]
                yield row, "near_duplicate", f"looks like {better.name} from frame {better.start}"

    def _alike(self, many: np.ndarray[Any, Any], one: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Which of the clips `(N, 8)` look like the clip `(8,)`."""
        near = np.bitwise_count(many ^ one) <= self.config.max_distance
        return np.asarray(near.sum(axis=1) >= self.config.min_frames)


def hashes_of(row: Row) -> np.ndarray[Any, Any]:
    """The hashes of a row, `(8,)` uint64."""
    return unpack_array(row.features["phash"], "<u8")


def _rank(row: Row) -> tuple[Any, ...]:
    """Sorts the best first. What the picture inside its border has of pixels counts."""
    info = row.info
    assert info is not None and row.stop is not None
    pixels = row.border[2] * row.border[3] if row.border else info.height * info.width
    return -pixels, -(row.stop - row.start) / (info.fps or 25.0), row.name, row.source_id, row.span or (0.0, 0.0), row.start
