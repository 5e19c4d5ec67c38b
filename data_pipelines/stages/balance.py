"""Balance: clusters of clips by meaning, near-duplicates within them, outliers, and a cap on what is too common.

The clusters are fitted on a sample. Everything else happens within one cluster, whose clips meet under its key: two
near-duplicates on both sides of a border between clusters are not compared (as in SemDeDup and Cosmos).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from data_pipelines.models import kmeans
from data_pipelines.models.contract import Array
from data_pipelines.rows import Placement, Row, pack_array, unpack_array
from videofm.config.curation_models import BalanceConfig
from videofm.errors import DataError

_BLOCK = 1024
"""Clips of a cluster that are compared with the kept ones at once."""


class BalanceStage:
    """See `BalanceConfig`. Needs the feature `embedding`; see `BarrierStage` for the order of calls."""

    name, requires = "balance", ("score_model",)
    placement: Placement = "barrier"

    def __init__(self, config: BalanceConfig) -> None:
        self.config = config
        self.num_fit_rows = config.num_fit_rows
        self._state: tuple[dict[str, Any], Array] | None = None

    def fit(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Centres, the cosine below which a clip is an outlier, and the share of each cluster that stays.

        Raises:
            DataError: there are fewer clips than clusters, or one has no embedding.
        """
        config = self.config
        if len(rows) < config.num_clusters:
            raise DataError(
                f"balance: {len(rows)} clips cannot make {config.num_clusters} clusters; lower num_clusters (100 clips or more "
                "for each make sense) or leave the stage out"
            )
        ordered = sorted(rows, key=_place)
        vectors = np.stack([embedding(row) for row in ordered])
        centres = kmeans.fit(vectors, config.num_clusters, config.num_iterations, config.seed)
        labels, cosine = kmeans.assign(vectors, centres)
        sizes = np.bincount(labels, minlength=config.num_clusters)
        keep = np.ones(config.num_clusters)
        if config.max_share is not None:
            keep = np.minimum(1.0, config.max_share * len(rows) / config.num_clusters / np.maximum(sizes, 1))
        far = None if config.outlier_quantile is None else float(np.quantile(cosine, 1 - config.outlier_quantile))
        return {"centres": pack_array(centres), "width": vectors.shape[1], "min_cosine": far, "keep": keep.tolist()}

    def keys(self, row: Row, state: dict[str, Any] | None) -> list[str]:
        """One key: the cluster, whether the clip is an outlier of it, and the share of the cluster that stays."""
        assert state is not None
        centres = self._centres(state)
        vector = embedding(row)
        if len(vector) != state["width"]:
            raise DataError(
                f"balance: {row.name} has an embedding of width {len(vector)}, others {state['width']}; two models made them"
            )
        labels, cosine = kmeans.assign(vector[None], centres)
        far = state["min_cosine"] is not None and cosine[0] < state["min_cosine"]
        return [f"{labels[0]:06d} {'far' if far else 'near'} {state['keep'][labels[0]]!r}"]

    def choose(self, key: str, rows: Sequence[Row]) -> Iterator[tuple[Row, str, str]]:
        """Of a cluster: outliers, near-duplicates of a better clip, and by hash what is over the cap."""
        cluster, where, keep = key.split()
        if where == "far":
            yield from ((row, "outlier", f"far from the centre of cluster {int(cluster)}") for row in rows)
            return
        better = sorted(rows, key=lambda row: (-_num_pixels(row), -_num_frames(row), _place(row)))
        twins = near_duplicates(np.stack([embedding(row) for row in better]), self.config.max_similarity)
        for row, (twin, cosine) in zip(better, twins, strict=True):
            if twin is not None:
                other = better[twin]
                yield row, "near_duplicate", f"cosine {cosine:.4f} with {other.name} frame {other.start}"
            elif position(row) >= float(keep):
                yield row, "common", f"cluster {int(cluster)} is thinned to {float(keep):.3f} of its size"

    def _centres(self, state: dict[str, Any]) -> Array:
        """The centres of `state`, unpacked once."""
        if self._state is None or self._state[0] is not state:
            self._state = (state, unpack_array(state["centres"], np.float32).reshape(-1, state["width"]))
        return self._state[1]


def embedding(row: Row) -> Array:
    """The embedding of a clip, float32 `(D,)` of length 1.

    Raises:
        DataError: it has none, or one that is not finite.
    """
    if "embedding" not in row.features:
        raise DataError(
            f"balance: {row.name} frame {row.start} has no feature 'embedding'; put a stage `kind: score_model` with "
            "`model: {kind: embedding, ...}` before it"
        )
    vector = unpack_array(row.features["embedding"], np.float16).astype(np.float32)
    length = float(np.linalg.norm(vector))
    if not length > 0 or not np.isfinite(length):
        raise DataError(f"balance: the embedding of {row.name} frame {row.start} has length {length}; wrong weights or dtype?")
    return vector / np.float32(length)


def near_duplicates(vectors: Array, max_similarity: float | None) -> list[tuple[int | None, float]]:
    """Walking through vectors of length 1, `(N, D)`, the best first: the kept one that each is too close to, with the cosine.

    What is close to a dropped one only stays. Without `max_similarity` nothing is too close.
    """
    if max_similarity is None:
        return [(None, 0.0)] * len(vectors)
    answers: list[tuple[int | None, float]] = []
    kept: list[int] = []
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[start : start + _BLOCK]
        against = vectors[kept] @ block.T  # (kept, block)
        within = block @ block.T
        in_block: list[int] = []
        num_before = len(kept)
        for j in range(len(block)):
            cosines = np.concatenate([against[:num_before, j], within[in_block, j]])
            best = int(cosines.argmax()) if len(cosines) else -1
            if best >= 0 and cosines[best] >= max_similarity:
                answers.append((kept[best], float(cosines[best])))
            else:
                answers.append((None, 0.0))
                kept.append(start + j)
                in_block.append(j)
    return answers


def position(row: Row) -> float:
    """A number in [0, 1) that is a function of the clip alone, by which common clips are thinned."""
    return int.from_bytes(hashlib.sha256(f"balance:{row.key}".encode()).digest()[:8], "big") / 2**64


def _place(row: Row) -> tuple[str, str, float, int]:
    return row.name, row.source_id, 0.0 if row.span is None else row.span[0], row.start


def _num_pixels(row: Row) -> int:
    if row.border is not None:
        return row.border[2] * row.border[3]
    return 0 if row.info is None else row.info.height * row.info.width


def _num_frames(row: Row) -> int:
    return 0 if row.stop is None else row.stop - row.start
