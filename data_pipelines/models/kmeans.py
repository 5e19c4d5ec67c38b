"""K-means on vectors of length 1 (Lloyd's rounds, k-means++ start): small, seeded, the same for the same vectors in any order
as long as the caller sorts them."""

from __future__ import annotations

import numpy as np

from data_pipelines.models.contract import Array

_CHUNK = 1 << 24
"""Numbers of the matrix of similarities that are held at once."""


def fit(vectors: Array, num_clusters: int, num_iterations: int, seed: int) -> Array:
    """Centres of length 1, float32 `(K, D)`, of vectors of length 1, `(N, D)`, N >= K."""
    rng = np.random.default_rng(seed)
    centres = _first_centres(vectors, num_clusters, rng)
    before = None
    for _ in range(num_iterations):
        labels, similarity = assign(vectors, centres)
        if before is not None and np.array_equal(labels, before):
            break
        before = labels
        centres = _centres(vectors, labels, similarity, num_clusters)
    return centres


def assign(vectors: Array, centres: Array) -> tuple[Array, Array]:
    """Index of the nearest centre `(N,)` of each vector, and the cosine to it `(N,)`; of equally near ones the first."""
    labels, similarity = [], []
    step = max(1, _CHUNK // len(centres))
    for start in range(0, len(vectors), step):
        cosine = vectors[start : start + step] @ centres.T  # (step, K)
        nearest = cosine.argmax(1)
        labels.append(nearest)
        similarity.append(cosine[np.arange(len(cosine)), nearest])
    return np.concatenate(labels), np.concatenate(similarity)


def _first_centres(vectors: Array, num_clusters: int, rng: np.random.Generator) -> Array:
    """K-means++ (Arthur and Vassilvitskii 2007), greedy: of a few vectors, drawn in proportion to their squared distance from
    the centres so far, the next centre is the one that brings all vectors nearest."""
    chosen = [int(rng.integers(len(vectors)))]
    distance = _squared_distances(vectors, vectors[chosen])[:, 0]
    num_drawn = 2 + int(np.log(num_clusters))
    while len(chosen) < num_clusters:
        total = distance.sum()
        # With fewer different vectors than clusters nothing is far from a centre; then any will do.
        drawn = rng.choice(len(vectors), num_drawn, p=distance / total if total > 0 else None)
        nearer = np.minimum(distance[:, None], _squared_distances(vectors, vectors[drawn]))  # (N, drawn)
        best = int(nearer.sum(0).argmin())
        chosen.append(int(drawn[best]))
        distance = nearer[:, best]
        distance[chosen] = 0.0
    return vectors[chosen].copy()


def _squared_distances(vectors: Array, others: Array) -> Array:
    """`(N, M)`. On the unit sphere it is 2 - 2 cos, which rounding can take below 0."""
    squared: Array = np.maximum(0.0, 2.0 - 2.0 * (vectors @ others.T).astype(np.float64))
    return squared


def _centres(vectors: Array, labels: Array, similarity: Array, num_clusters: int) -> Array:
    """The mean direction of each cluster; an empty one moves to the vector that is worst served."""
    sums = np.zeros((num_clusters, vectors.shape[1]))
    order = np.argsort(labels, kind="stable")
    present, starts = np.unique(labels[order], return_index=True)
    sums[present] = np.add.reduceat(vectors[order], starts, axis=0, dtype=np.float64)
    worst = iter(np.argsort(similarity, kind="stable"))
    for cluster in np.flatnonzero(np.bincount(labels, minlength=num_clusters) == 0):
        sums[cluster] = vectors[next(worst)]
    # Members that cancel out leave no direction; then the centre is of length 0 and nearest to nothing but its own kind.
    length = np.linalg.norm(sums, axis=1, keepdims=True)
    return (sums / np.where(length > 0, length, 1.0)).astype(np.float32)
