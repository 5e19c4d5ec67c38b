"""Near duplicates: copies are found, others are not, whatever the order; and what banding can miss, by its own law."""

from __future__ import annotations

import itertools
import math

import cv2
import numpy as np
import pytest

from data_pipelines.rows import Row, SourceInfo, pack_array
from data_pipelines.stages.near_dup import NearDupStage, hashes_of
from data_pipelines.stages.probe import ProbeStage
from data_pipelines.stages.scores import ScoresStage
from data_pipelines.workspace import Workspace
from tests.unit.data_pipelines import media
from tests.unit.data_pipelines.test_scores import pan
from videofm.config.curation_stages import NearDupConfig, ProbeConfig, ScoresConfig

STAGE = NearDupStage(NearDupConfig())


def clip(name, hashes, height=90, width=160, num_frames=24, start=0, source=None):
    info = SourceInfo("s", "p", "mp4", "h264", num_frames, 25.0, height, width, num_frames / 25)
    features = {"phash": pack_array(np.asarray(hashes, "<u8"))}
    return Row(source or f"id of {name}", name, name, 1, info, start, start + num_frames, features=features)


def flipped(hashes, num_bits, rng, frames=range(8)):
    """`hashes` with `num_bits` random bits of some frames inverted."""
    made = np.array(hashes, np.uint64)
    for frame in frames:
        for bit in rng.choice(64, num_bits, replace=False):
            made[frame] ^= np.uint64(1) << np.uint64(bit)
    return made


def dropped(rows, stage=STAGE):
    """What a barrier does: rows that share a key meet; a row goes if any of its keys says so."""
    by_key = {}
    for row in rows:
        for key in stage.keys(row, None):
            by_key.setdefault(key, []).append(row)
    gone = {}
    for key, met in by_key.items():
        for row, _, detail in stage.choose(key, met):
            gone[row.name, row.start] = min(detail, gone.get((row.name, row.start), detail))
    return gone


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Real files, through probe and scores: an original, copies of it, and others."""
    folder = tmp_path_factory.mktemp("near_dup")
    frames, other = pan(24, step=2), pan(24, step=2, seed=5)
    small = np.stack([cv2.resize(frame, (112, 64), interpolation=cv2.INTER_AREA) for frame in frames])
    files = {
        "original.mp4": media.write(folder / "original.mp4", frames, options={"crf": "4"}),
        "encoded.mp4": media.write(folder / "encoded.mp4", frames, options={"crf": "32"}),
        "resized.mp4": media.write(folder / "resized.mp4", small),
        "mirrored.mp4": media.write(folder / "mirrored.mp4", np.ascontiguousarray(frames[:, :, ::-1])),
        "backwards.mp4": media.write(folder / "backwards.mp4", frames[::-1]),
        "other.mp4": media.write(folder / "other.mp4", other),
        "brighter.mp4": media.write(folder / "brighter.mp4", np.clip(frames * 1.15 + 8, 0, 255).astype(np.uint8)),
    }
    files["remuxed.mkv"] = media.copy(files["original.mp4"], folder / "remuxed.mkv")
    rows = []
    for name, path in files.items():
        work = Workspace(path, folder)
        (row,) = ProbeStage(ProbeConfig()).process(Row(f"id of {name}", name, str(path), 1), work)
        rows += ScoresStage(ScoresConfig()).process(row, work)
    return rows


def test_copies_are_found_and_others_are_not(scored):
    """Of copies of one size and length the first by name stays; the smaller one goes first."""
    gone = dropped(scored)
    assert {name for name, _ in gone} == {"encoded.mp4", "original.mp4", "remuxed.mkv", "resized.mp4"}
    assert gone["resized.mp4", 0] == "looks like brighter.mp4 from frame 0"


def test_the_answer_does_not_depend_on_order(scored):
    wanted = dropped(scored)
    rng = np.random.default_rng(0)
    for _ in range(10):
        assert dropped([scored[i] for i in rng.permutation(len(scored))]) == wanted


def test_the_best_stays():
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, 8, dtype=np.uint64)
    rows = [
        clip("a small", hashes, height=45, width=80),
        clip("b large", hashes),
        clip("c large and long", hashes, num_frames=48),
        clip("d large and long", hashes, num_frames=48),
    ]
    assert {name for name, _ in dropped(rows)} == {"a small", "b large", "d large and long"}
    boxed = rows[2].with_(border=(20, 0, 50, 160))  # of a picture with borders the inside counts
    assert {name for name, _ in dropped([boxed, rows[1]])} == {"c large and long"}


def test_limits_of_likeness():
    """At most 8 bits on at least 6 of 8 frames; a frame with equal hashes makes sure that the pair meets."""
    rng = np.random.default_rng(2)
    hashes = rng.integers(0, 2**64, 8, dtype=np.uint64)
    for num_bits, frames, alike in (
        (8, range(1, 8), True),
        (9, range(1, 3), True),
        (9, range(1, 4), False),
        (20, range(1, 8), False),
    ):
        other = clip("b", flipped(hashes, num_bits, rng, frames))
        assert bool(dropped([clip("a", hashes), other])) == alike, (num_bits, frames)
    strict = NearDupStage(NearDupConfig(max_distance=0, min_frames=8))
    assert not dropped([clip("a", hashes), clip("b", flipped(hashes, 1, rng, [3]))], strict)
    assert dropped([clip("a", hashes), clip("b", hashes)], strict)


def test_clips_of_one_source_may_be_left_alone():
    hashes = np.random.default_rng(3).integers(0, 2**64, 8, dtype=np.uint64)
    rows = [clip("a", hashes, source="one"), clip("a", hashes, start=24, source="one")]
    assert dropped(rows) == {("a", 24): "looks like a from frame 0"}
    assert not dropped(rows, NearDupStage(NearDupConfig(within_source=False)))


def test_a_chain_keeps_its_best_only():
    """a is like b and b like c, but a is not like c: c goes because of b, which goes because of a."""
    rng = np.random.default_rng(4)
    a = rng.integers(0, 2**64, 8, dtype=np.uint64)
    mask = np.uint64(0b111111)
    b, c = a ^ mask, a ^ mask ^ (mask << np.uint64(16))
    assert np.bitwise_count(a ^ c)[0] > 8 >= np.bitwise_count(b ^ c)[0]
    rows = [clip("a", a, height=400), clip("b", b, height=300), clip("c", c, height=200)]
    for order in itertools.permutations(rows):
        assert set(dropped(order)) == {("b", 0), ("c", 0)}


def test_frames_that_differ_in_three_bits_always_meet():
    """Pigeonhole: 3 flipped bits touch at most 3 of 4 bands, wherever they are; all places of one frame's first 20 bits."""
    hashes = np.random.default_rng(5).integers(0, 2**64, 8, dtype=np.uint64)
    keys = set(STAGE.keys(clip("a", hashes), None))
    for bits in itertools.combinations(range(0, 64, 3), 3):
        other = hashes ^ np.uint64(sum(1 << bit for bit in bits))
        assert keys & set(STAGE.keys(clip("b", other), None))


def test_how_often_frames_that_differ_in_eight_bits_meet():
    """That one band stays untouched, by inclusion and exclusion over the 4 bands; and a pair of clips with 6 such frames."""
    ways = [(-1) ** (k + 1) * math.comb(4, k) * math.comb(64 - 16 * k, 8) for k in (1, 2, 3)]
    one = sum(ways) / math.comb(64, 8)
    assert one == pytest.approx(0.327, abs=0.001) and 1 - (1 - one) ** 6 == pytest.approx(0.907, abs=0.001)
    rng = np.random.default_rng(6)
    hashes = rng.integers(0, 2**64, 8, dtype=np.uint64)
    met = 0
    for _ in range(500):
        other = rng.integers(0, 2**64, 8, dtype=np.uint64)
        other[:6] = flipped(hashes, 8, rng, range(6))[:6]
        met += bool(set(STAGE.keys(clip("a", hashes), None)) & set(STAGE.keys(clip("b", other), None)))
    assert met / 500 == pytest.approx(0.907, abs=0.05)


def test_hashes_survive_the_row_as_json():
    hashes = np.random.default_rng(7).integers(0, 2**64, 8, dtype=np.uint64)
    assert hashes_of(Row.from_json(clip("a", hashes).to_json())).tolist() == hashes.tolist()
