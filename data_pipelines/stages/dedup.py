"""Dedup: of sources with equal bytes, or with equal video packets in another container, the first by path stays."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipelines.rows import Loss, Row
from videofm.config.curation_stages import DedupConfig


class DedupStage:
    """See `DedupConfig`. Sees all sources at once; needs the hashes that `probe` took."""

    name, requires, barrier = "dedup", ("probe",), True

    def __init__(self, config: DedupConfig) -> None:
        self.config = config

    def process_all(self, rows: Sequence[Row]) -> tuple[list[Row], list[Loss]]:
        first_by_bytes: dict[str, str] = {}
        first_by_packets: dict[str, str] = {}
        kept, losses = [], []
        for row in sorted(rows, key=lambda row: row.name):
            assert row.info is not None
            twin = first_by_bytes.setdefault(row.info.sha256, row.name)
            reason = "same_bytes"
            if twin == row.name:
                twin, reason = first_by_packets.setdefault(row.info.packets_sha256, row.name), "same_packets"
            if twin == row.name:
                kept.append(row)
            else:
                losses.append(Loss("dropped", self.name, row.name, reason, f"equals {twin}"))
        return kept, losses
