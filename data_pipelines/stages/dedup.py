"""Dedup: of sources with equal bytes, or with equal video packets in another container, the first by name stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.rows import Placement, Row
from videofm.config.curation_stages import DedupConfig


class DedupStage:
    """See `DedupConfig`. Needs the hashes that `probe` took; rows of one source count as one, clips and spans alike."""

    name, requires = "dedup", ("probe",)
    placement: Placement = "barrier"
    num_fit_rows = 0

    def __init__(self, config: DedupConfig) -> None:
        self.config = config

    def fit(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Nothing to fit."""
        raise AssertionError("num_fit_rows is 0")

    def keys(self, row: Row, state: dict[str, Any] | None) -> list[str]:
        """The hash of the video packets: files of equal bytes share it, too."""
        assert row.info is not None
        return [row.info.packets_sha256]

    def choose(self, key: str, rows: Sequence[Row]) -> Iterator[tuple[Row, str, str]]:
        """All but the first source, each compared with the ones before it."""
        # Names may be equal: those of addresses that differ in their query only. Ids never are.
        ordered = sorted(rows, key=lambda row: (row.name, row.source_id))
        first_by_bytes: dict[str, Row] = {}
        for row in ordered:
            assert row.info is not None
            twin = first_by_bytes.setdefault(row.info.sha256, row)
            if row.source_id == ordered[0].source_id:
                continue
            if twin.source_id == row.source_id:
                yield row, "same_packets", f"equals {ordered[0].name}"
            else:
                yield row, "same_bytes", f"equals {twin.name}"
