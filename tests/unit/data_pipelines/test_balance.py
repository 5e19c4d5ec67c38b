"""Balance: k-means by its laws, near-duplicates against every pair compared, thinning, and no dependence on order."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest

from data_pipelines.models import kmeans
from data_pipelines.rows import Row, SourceInfo, pack_array
from data_pipelines.stages import balance
from data_pipelines.stages.balance import BalanceStage, embedding, near_duplicates, position
from videofm.config.curation_models import BalanceConfig
from videofm.errors import DataError


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def blobs(sizes, width=16, spread=0.1, seed=0):
    """Vectors of length 1 around random directions, in turn; with the blob of each."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(len(sizes), width)))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return unit(centres[labels] + spread * rng.normal(size=(len(labels), width)) / np.sqrt(width)), labels


def clip(i, vector, height=16, **changes):
    info = SourceInfo("", "", "mp4", "h264", 10, 25.0, height, 2 * height, 0.4)
    row = Row(
        f"{i:024x}", f"{i:05d}.mp4", "x", 1, info=info, stop=10, features={"embedding": pack_array(vector.astype(np.float16))}
    )
    return row.with_(**changes)


def stage(**changes):
    return BalanceStage(BalanceConfig.model_validate({"kind": "balance", "num_clusters": 4, **changes}))


def run(made, rows):
    """All calls as the engine makes them; names of the dropped -> reason."""
    state = json.loads(json.dumps(made.fit(rows[: made.num_fit_rows])))
    meet: dict[str, list[Row]] = {}
    for row in rows:
        for key in made.keys(row, state):
            meet.setdefault(key, []).append(row)
    return {row.name: (reason, detail) for key, met in meet.items() for row, reason, detail in made.choose(key, met)}


def test_kmeans_finds_blobs_apart():
    vectors, labels = blobs([30, 50, 20, 40])
    found, _ = kmeans.assign(vectors, kmeans.fit(vectors, 4, 25, 0))
    assert len({(a, b) for a, b in zip(labels, found, strict=True)}) == 4


def test_kmeans_ends_in_a_fixed_point():
    """Every vector belongs to the centre of largest cosine, and every centre is the direction of its members' mean."""
    vectors = unit(np.random.default_rng(1).normal(size=(300, 8)))
    centres = kmeans.fit(vectors, 7, 500, 3)
    labels, cosine = kmeans.assign(vectors, centres)
    for vector, label, value in zip(vectors, labels, cosine, strict=True):
        all_cosines = [float(np.dot(vector.astype(np.float64), centre)) for centre in centres]
        assert all_cosines[label] >= max(all_cosines) - 1e-6 and value == pytest.approx(max(all_cosines), abs=1e-6)
    for i, centre in enumerate(centres):
        np.testing.assert_allclose(centre, unit(vectors[labels == i].astype(np.float64).mean(0)), atol=1e-5)


def test_each_round_of_kmeans_serves_the_vectors_better():
    vectors = unit(np.random.default_rng(2).normal(size=(400, 6)))
    served = [kmeans.assign(vectors, kmeans.fit(vectors, 9, rounds, 5))[1].sum() for rounds in range(1, 8)]
    assert all(later >= earlier - 1e-3 for earlier, later in itertools.pairwise(served)) and served[-1] > served[0]


def test_kmeans_bears_fewer_vectors_than_clusters_and_chunks(monkeypatch):
    vectors = unit(np.eye(3)[[0, 0, 0, 1, 2, 2]])
    labels, cosine = kmeans.assign(vectors, kmeans.fit(vectors, 5, 10, 0))
    np.testing.assert_allclose(cosine, 1, atol=1e-6)
    assert len(set(labels[[0, 3, 4]])) == 3
    many = unit(np.random.default_rng(3).normal(size=(100, 4)))
    whole = kmeans.assign(many, many[:7])
    monkeypatch.setattr(kmeans, "_CHUNK", 50)
    np.testing.assert_array_equal(kmeans.assign(many, many[:7])[0], whole[0])


def test_different_seeds_start_elsewhere():
    vectors = unit(np.random.default_rng(4).normal(size=(200, 8)))
    assert not np.array_equal(kmeans.fit(vectors, 6, 1, 0), kmeans.fit(vectors, 6, 1, 1))


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_near_duplicates_against_every_pair(block, monkeypatch):
    monkeypatch.setattr(balance, "_BLOCK", block)
    vectors, _ = blobs([12] * 5, spread=0.25, seed=6)
    order = np.random.default_rng(7).permutation(len(vectors))
    vectors = vectors[order]
    kept: list[int] = []
    expected = []
    for i, vector in enumerate(vectors):
        close = [j for j in kept if float(vector @ vectors[j]) >= 0.95]
        expected.append(max(close, key=lambda j: float(vector @ vectors[j])) if close else None)
        if not close:
            kept.append(i)
    assert [twin for twin, _ in near_duplicates(vectors, 0.95)] == expected
    assert 5 <= len(kept) < len(vectors), "some are close, some are not"
    assert near_duplicates(vectors, None) == [(None, 0.0)] * len(vectors)


def test_of_near_duplicates_the_largest_stays():
    vectors, _ = blobs([1] * 8, seed=8)
    rows = [clip(i, vector, height=64) for i, vector in enumerate(vectors)]
    rows += [clip(20, vectors[0], height=128), clip(21, vectors[1], height=32)]
    rows += [clip(22, vectors[2], height=64, border=(0, 0, 32, 128))]  # black borders do not count
    rows += [clip(23, vectors[3], height=64)]  # equal in all: the first by name stays
    rows += [clip(24, vectors[4], height=64, stop=12)]  # more frames
    dropped = run(stage(), rows)
    assert dropped.keys() == {f"{i:05d}.mp4" for i in (0, 21, 22, 23, 4)}
    reason, detail = dropped["00000.mp4"]
    assert reason == "near_duplicate" and detail == "cosine 1.0000 with 00020.mp4 frame 0"


def test_what_is_dropped_does_not_depend_on_the_order():
    vectors, _ = blobs([60, 20, 10, 10], spread=0.6, seed=9)
    rows = [clip(i, vector, height=16 * (1 + i % 3)) for i, vector in enumerate(vectors)]
    settings = {"max_share": 1.0, "outlier_quantile": 0.9, "max_similarity": 0.9}
    wanted = run(stage(**settings), rows)
    assert {reason for reason, _ in wanted.values()} == {"near_duplicate", "common", "outlier"}
    for seed in range(3):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert run(stage(**settings), shuffled) == wanted


def test_common_clusters_are_thinned_to_the_share():
    """Sizes 800 and 200, mean 500: of the first 1.2 * 500 / 800 = 3/4 stay, give or take 5 deviations of a binomial."""
    vectors, labels = blobs([800, 200], spread=0.3, seed=10)
    rows = [clip(i, vector) for i, vector in enumerate(vectors)]
    made = stage(num_clusters=2, max_share=1.2, max_similarity=None)
    dropped = run(made, rows)
    assert {reason for reason, _ in dropped.values()} == {"common"}
    assert {labels[int(name[:5])] for name in dropped} == {0}
    assert abs(len(dropped) - 200) <= 5 * np.sqrt(800 * 0.75 * 0.25)
    assert all(position(rows[int(name[:5])]) >= 0.75 for name in dropped)
    assert next(iter(dropped.values()))[1].endswith("is thinned to 0.750 of its size")


def test_positions_are_even():
    found = np.sort([position(clip(i, np.ones(2))) for i in range(2000)])
    assert np.abs(found - np.arange(2000) / 2000).max() < 1.95 / np.sqrt(2000)  # Kolmogorov-Smirnov, 0.1%


def test_outliers_are_those_far_from_every_centre():
    vectors, _ = blobs([50, 50, 50, 50], spread=0.1, seed=11)
    strange = unit(np.random.default_rng(12).normal(size=(2, 16)))
    made = stage(num_fit_rows=200, outlier_quantile=0.98, max_similarity=None)
    rows = [clip(i, vector) for i, vector in enumerate([*vectors, *strange])]
    dropped = run(made, rows)
    assert {"00200.mp4", "00201.mp4"} <= dropped.keys() and len(dropped) == 2 + 4  # 2% of the 200 that were fitted on
    assert {reason for reason, _ in dropped.values()} == {"outlier"}


def test_what_cannot_be_balanced_is_said():
    vectors, _ = blobs([2, 2])
    rows = [clip(i, vector) for i, vector in enumerate(vectors)]
    with pytest.raises(DataError, match="balance: 3 clips cannot make 4 clusters; lower num_clusters"):
        stage().fit(rows[:3])
    with pytest.raises(DataError, match="00000.mp4 frame 0 has no feature 'embedding'; put a stage `kind: score_model`"):
        embedding(rows[0].with_(features={}))
    with pytest.raises(DataError, match="the embedding of 00000.mp4 frame 0 has length 0"):
        embedding(clip(0, np.zeros(16)))
    with pytest.raises(DataError, match="has length nan"):
        embedding(clip(0, np.full(16, np.nan)))
    made = stage()
    with pytest.raises(DataError, match="00009.mp4 has an embedding of width 8, others 16; two models made them"):
        made.keys(clip(9, np.ones(8)), made.fit(rows))
