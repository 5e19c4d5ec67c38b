"""The order of pairs: pure, whole, resumed anywhere; both sides side by side with the same draws; bad records and bad clips."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.data.datasets import MemoryDataset
from tests.unit.data.preferred import OLDER, POLICY, candidates, data_config, neighbours, pair_of, side, write_neighbours
from videofm.config.data import DataConfig
from videofm.data.buckets import describe_steps
from videofm.data.draws import PlanState, units
from videofm.data.fixed import fixed_draw
from videofm.data.index import ClipRecord
from videofm.data.pairs import PairPlan, frame_labels
from videofm.data.preferences import PreferencePair, Segments, write_preferences
from videofm.errors import CheckpointError, DataError
from videofm.parallel.rng import KeyedRng

RECORDS = candidates(11)


def plan_of(
    folder: Path,
    pairs: Sequence[PreferencePair],
    section: dict[str, Any] | None = None,
    records: Sequence[ClipRecord] = RECORDS,
    seed: int = 5,
    **changes: Any,
) -> PairPlan:
    write_preferences(folder, pairs, "clips")
    return PairPlan([MemoryDataset(records)], data_config(folder, section, **changes), seed)


@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_run_resumes_exactly_with_any_number_of_ranks(tmp_path: Path, after: int) -> None:
    """Eleven pairs in steps of four micro-batches of two: from every step of the first nine on, through JSON, with a plan that
    is made anew, ranks read together what one reads straight."""
    pairs = neighbours(RECORDS)
    straight = list(islice(plan_of(tmp_path, pairs, num_micro_batches=4).steps(), 12))
    for k in range(9):
        state = PlanState.from_json(json.loads(json.dumps((straight[k - 1].after if k else PlanState()).to_json())))
        resumed = list(islice(plan_of(tmp_path, pairs, num_micro_batches=4).steps(state), 3))
        assert resumed == straight[k : k + 3]
        for step, whole in zip(resumed, straight[k:], strict=False):
            shares = [step.share(rank, after) for rank in range(after)]
            assert {len(share) for share in shares} == {4 // after}
            assert [batch for together in zip(*shares, strict=True) for batch in together] == whole.micro_batches
            assert step.num_samples == 8 and len(json.dumps(step.after.to_json())) < 200


def test_the_order_is_a_function_of_seed_and_ids_alone(tmp_path: Path) -> None:
    """Not of the order of the records, nor of how the dataset is sharded; another seed gives another one."""
    pairs = neighbours(RECORDS)

    def order(plan: PairPlan) -> list[list[str]]:
        return [[draw.sample_id for batch in step.micro_batches for draw in batch] for step in islice(plan.steps(), 6)]

    first = order(plan_of(tmp_path / "a", pairs))
    assert order(plan_of(tmp_path / "b", pairs[::-1], records=candidates(11, num_shards=3))) == first
    assert order(plan_of(tmp_path / "c", pairs, seed=6)) != first


def test_every_pair_comes_once_an_epoch(tmp_path: Path) -> None:
    """Eleven pairs, four a step: 22 steps are 8 epochs, of which each has every pair once, in an order of its own."""
    plan = plan_of(tmp_path, neighbours(RECORDS))
    steps = list(islice(plan.steps(), 22))
    drawn = Counter((draw.epoch, draw.pair) for step in steps for batch in step.micro_batches for draw in batch[:2])
    assert drawn == Counter({(epoch, pair.pair_id): 1 for epoch in range(8) for pair in neighbours(RECORDS)})
    assert [step.after.epoch for step in steps] == [(step + 1) * 4 // 11 for step in range(22)]
    orders = [[pair for number, pair in drawn if number == epoch] for epoch in range(8)]
    assert len({tuple(order) for order in orders}) == 8
    assert plan.num_pairs == 11 and plan.describe() == "11 pairs of 22 clips"


def test_few_pairs_and_large_steps(tmp_path: Path) -> None:
    """Three pairs, steps of four: a pair comes twice in a step, as draws of two epochs with ids of their own."""
    plan = plan_of(tmp_path, neighbours(RECORDS)[:3])
    for step in islice(plan.steps(), 6):
        ids = [draw.sample_id for batch in step.micro_batches for draw in batch[:2]]
        assert len(set(ids)) == 4


def test_both_clips_of_a_pair_stand_in_one_micro_batch_and_are_cut_alike(tmp_path: Path) -> None:
    """Winners first, losers behind them in the same order; windows are drawn for the pair, and differ from pair to pair."""
    pairs = {pair.pair_id: pair for pair in neighbours(RECORDS)}
    plan = plan_of(tmp_path, list(pairs.values()), frame_strides=[1, 2], num_frames=4)
    cuts = set()
    for step in islice(plan.steps(), 11):
        for batch in step.micro_batches:
            assert units(batch) == [[0, 2], [1, 3]]
            for winner, loser in zip(batch[:2], batch[2:], strict=True):
                pair = pairs[winner.pair]
                assert (winner.key, loser.key) == (pair.winner.key, pair.loser.key)
                assert replace(loser, key=winner.key, shard=winner.shard) == winner
                assert plan.record(loser).key == loser.key and plan.record(winner).caption == plan.record(loser).caption
                cuts.add((winner.start_frame, winner.stride, winner.left))
    assert len(cuts) > 20 and {stride for _, stride, _ in cuts} == {1, 2}


def test_keyed_draws_are_the_same_for_winner_and_loser(tmp_path: Path) -> None:
    """Noise, sigma and dropout of a micro-batch, as a run draws them; of two pairs, and of two steps, they differ."""
    seen = []
    for step in islice(plan_of(tmp_path, neighbours(RECORDS)).steps(), 4):
        for batch in step.micro_batches:
            rng = KeyedRng(0, step.after.step - 1, [draw.sample_id for draw in batch])
            for drawn in (rng.normal("noise", (3, 4)), rng.uniform("sigma"), rng.uniform("caption")):
                assert torch.equal(drawn[:2], drawn[2:]) and not torch.equal(drawn[0], drawn[1])
            seen.append(rng.normal("noise", (3, 4))[:2])
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 16


def test_a_cache_holds_the_pixels_that_pairs_ask_for(tmp_path: Path) -> None:
    """With nothing left to chance, both draws are those that `videofm encode` made of the clips."""
    fixed: dict[str, Any] = {"start": "centre", "crop": "centre", "cache": {"path": "encoded", "mode": "latents"}}
    plan = plan_of(tmp_path, neighbours(RECORDS), **fixed)
    for step in islice(plan.steps(), 6):
        for draw in (draw for batch in step.micro_batches for draw in batch):
            expected = fixed_draw(plan.record(draw), plan.config, None)
            assert expected is not None
            changes = {"epoch": draw.epoch, "shard": draw.shard, "step": draw.step, "pair": draw.pair}
            assert replace(expected, **changes) == draw


def test_spares_of_a_pair(tmp_path: Path) -> None:
    """Both sides get the sides of one other pair; pairs of the step come last; the ids are no other's; all are tried once."""
    pairs = {pair.pair_id: pair for pair in neighbours(RECORDS)}
    plan = plan_of(tmp_path, list(pairs.values()), {"on_bad": "skip"})
    step = next(islice(plan.steps(), 1, None))
    winner, _, loser, _ = step.micro_batches[0]
    now = {draw.pair for batch in step.micro_batches for draw in batch}
    tried = []
    for attempt in range(10):
        spare, other = plan.replacement(winner, attempt), plan.replacement(loser, attempt)
        assert (spare.key, other.key) == (pairs[spare.pair].winner.key, pairs[spare.pair].loser.key)
        assert spare.sample_id == other.sample_id == f"{spare.pair}@{winner.epoch}~{winner.sample_id}"
        tried.append(spare.pair)
    assert sorted(tried) == sorted(set(pairs) - {winner.pair})
    assert set(tried[-3:]) == now - {winner.pair} and len(now) == 4
    again = plan_of(tmp_path / "again", list(pairs.values()))
    assert [again.replacement(winner, attempt).pair for attempt in range(10)] == tried, "another rank finds the same"
    told = rf"the pair {winner.pair} cannot be read, and .* has no more pair to take its place \(10 were tried\)"
    with pytest.raises(DataError, match=told):
        plan.replacement(winner, 10)
    alone = plan_of(tmp_path / "alone", neighbours(RECORDS)[:1])
    with pytest.raises(DataError, match=r"has no other pair to take its place \(0 were tried\); make more pairs, or repair"):
        alone.replacement(next(alone.steps()).micro_batches[0][0], 0)


def stored_as(key: str, **changes: Any) -> list[ClipRecord]:
    """The dataset with one record changed."""
    return [replace(record, **changes) if record.key == key else record for record in RECORDS]


FIRST, SECOND = neighbours(RECORDS)[:2]
BAD: dict[str, tuple[PreferencePair, list[ClipRecord]]] = {
    "winner and loser are the same clip 000000-000": (pair_of(RECORDS[0], RECORDS[0]), RECORDS),
    "contradictory: the overall score": (replace(FIRST, winner=side(RECORDS[0], 0.0), loser=side(RECORDS[1], 1.0)), RECORDS),
    "the dataset has no clip 000000-001, its loser, in split 'train' (the pairs are of ": (FIRST, RECORDS[2:] + RECORDS[:1]),
    "has no clip 000000-000, its winner, in split": (FIRST, stored_as("000000-000", split="held_out")),
    "its loser 000000-001 is another file: SHA-256 expected sha-000000-001, found other": (
        FIRST, stored_as("000000-001", sha256="other")
    ),
    "its clips have different shapes: the winner 12 frames of 32x40 at 24 fps, the loser 10 frames of 32x40": (
        FIRST, stored_as("000000-001", num_frames=10)
    ),
    "the loser 12 frames of 32x40 at 12 fps": (FIRST, stored_as("000000-001", fps=12.0)),
    "its clips cannot be used: fewer than 9 frames; they have 8 frames": (
        FIRST, [replace(r, num_frames=8) if r.key in ("000000-000", "000000-001") else r for r in RECORDS]
    ),
    "the caption of its loser 000000-001, 'a cat', is not its prompt 'prompt 0'": (
        FIRST, stored_as("000000-001", caption="a cat")
    ),
    "an earlier record has its pair_id": (replace(SECOND, pair_id="twice"), RECORDS),
    "its segments label 0.4 seconds, and the last frame of its clips is shown at 0.458333": (
        replace(FIRST, segments=Segments(0.1, (1, 1, 0, -1))), RECORDS
    ),
    f"its loser 000000-001 was made by policy {OLDER}, which data.pairs.policies does not list": (
        replace(FIRST, loser=side(RECORDS[1], policy=OLDER)), RECORDS
    ),
    "its winner 000000-000 was made by a policy that it does not name": (
        replace(FIRST, winner=side(RECORDS[0], policy=None)), RECORDS
    ),
    "was made by a policy that it does not name, which": (replace(FIRST, loser=replace(FIRST.loser, origin=None)), RECORDS),
}  # fmt: skip


@pytest.mark.parametrize("told", BAD)
def test_a_bad_record_stops_the_run_or_is_left_out(tmp_path: Path, told: str) -> None:
    """It is named with its number and its clips; with `skip` all others are read, and the log has the count and the record."""
    pair, records = BAD[told]
    others = [*neighbours(RECORDS)[2:], replace(neighbours(RECORDS)[2], pair_id="twice")]
    folder = tmp_path / "preferences"
    write_preferences(folder, others, "clips")
    if pair.pair_id == "twice":  # no writer of ours makes it: the files are put together by hand
        merge(folder, tmp_path, pair)
    else:
        write_preferences(folder, [*others, pair], "clips")
    section = {"path": str(folder), "policies": [POLICY]}
    with pytest.raises(DataError) as caught:
        PairPlan([MemoryDataset(records)], data_config(folder, section), 0)
    message = str(caught.value)
    assert message.startswith(
        f"1 of the 11 records of {folder} are bad: record 11, pair {pair.pair_id} ({pair.winner.key} over"
    )
    assert told in message and message.endswith("or set data.pairs.on_bad to skip to train without them")
    plan = PairPlan([MemoryDataset(records)], data_config(folder, {**section, "on_bad": "skip"}), 0)
    assert plan.num_pairs == 10 and {m.pair.pair_id for m in plan.matched.pairs} == {other.pair_id for other in others}
    count, record = plan.left_out()
    assert count == "1 of 11 pairs are not used: bad records (data.pairs.on_bad is skip)"
    assert record.startswith("record 11, pair ") and told in record


def merge(folder: Path, tmp_path: Path, pair: PreferencePair) -> None:
    """Append the file of a second folder to the header of the first."""
    other = write_preferences(tmp_path / "other", [pair], "clips")
    header, more = (json.loads((path / "preferences.json").read_text()) for path in (folder, other))
    (folder / "pairs" / "pairs-00001.jsonl").write_bytes((other / "pairs" / "pairs-00000.jsonl").read_bytes())
    header["files"].append({**more["files"][0], "name": "pairs/pairs-00001.jsonl"})
    (folder / "preferences.json").write_text(json.dumps(header))


def test_many_bad_records_are_named_in_part_and_counted(tmp_path: Path) -> None:
    pairs = [replace(pair, weight=-1.0) for pair in neighbours(RECORDS)]
    with pytest.raises(DataError, match=r"^11 of the 11 records .*; and 1 more\. Repair or remove them"):
        plan_of(tmp_path / "fail", pairs)
    with pytest.raises(DataError, match=r"no pair to train on: of 11 records 11 are bad \(the first: record 1, pair .*-1;"):
        plan_of(tmp_path / "skip", pairs, {"on_bad": "skip"})


def test_ties_are_read_where_they_are_wanted(tmp_path: Path) -> None:
    pairs = neighbours(RECORDS)
    pairs[3:5] = [replace(pair, tie=True, weight=3.0) for pair in pairs[3:5]]
    without = plan_of(tmp_path / "a", pairs)
    assert without.num_pairs == 9
    assert without.left_out() == ["2 of 11 pairs are not used: they are ties (data.pairs.ties is false)"]
    plan = plan_of(tmp_path / "b", pairs, {"ties": True})
    assert plan.num_pairs == 11 and plan.left_out() == []
    for step in islice(plan.steps(), 11):
        for batch in step.micro_batches:
            fields, ties = plan.batch_fields(batch), [draw.pair in {p.pair_id for p in pairs[3:5]} for draw in batch[:2]]
            assert fields["pair_ties"].tolist() == ties and fields["pair_ties"].dtype == torch.bool
            assert fields["pair_weights"].tolist() == [0.0 if tie else 1.0 for tie in ties]
    with pytest.raises(DataError, match=r"of 2 records 0 are bad and 2 are ties, which data.pairs.ties leaves out"):
        plan_of(tmp_path / "c", pairs[3:5])


def test_weights_and_rewards(tmp_path: Path) -> None:
    """Rewards are those of the winners, then those of the losers; where one clip has none, no batch has any."""
    pairs = [
        replace(pair, weight=n / 2, winner=replace(pair.winner, scores={"overall": n + 0.5}),
                loser=replace(pair.loser, scores={"overall": n - 0.5}))
        for n, pair in enumerate(neighbours(RECORDS))
    ]  # fmt: skip
    numbers = {pair.pair_id: n for n, pair in enumerate(pairs)}
    plan = plan_of(tmp_path / "a", pairs)
    for step in islice(plan.steps(), 3):
        for batch in step.micro_batches:
            fields, n = plan.batch_fields(batch), [numbers[draw.pair] for draw in batch]
            assert fields["pair_weights"].tolist() == [n[0] / 2, n[1] / 2] and "frame_labels" not in fields
            assert fields["rewards"].tolist() == [n[0] + 0.5, n[1] + 0.5, n[2] - 0.5, n[3] - 0.5]
    lacking = plan_of(tmp_path / "b", [replace(pairs[0], loser=FIRST.loser), *pairs[1:]])
    assert "rewards" not in lacking.batch_fields(next(lacking.steps()).micro_batches[0])


def test_labels_of_frames_are_those_of_their_time() -> None:
    """Segments of 0.1 seconds at 30 frames a second are three frames each, whichever are read; a segment of n
    frames has n frames, for lengths in seconds that floats cannot hold."""
    pair = replace(FIRST, segments=Segments(0.1, (1, -1, 0, 1)))
    assert frame_labels(pair, range(12), 30.0).tolist() == [1, 1, 1, -1, -1, -1, 0, 0, 0, 1, 1, 1]
    assert frame_labels(pair, range(1, 11, 3), 30.0).tolist() == [1, -1, 0, 1]
    assert frame_labels(FIRST, range(2, 7, 2), 30.0).tolist() == [1, 1, 1]
    for frames in range(1, 60):  # a segment of `frames` frames at 24 a second begins at each multiple of `frames`
        labels = tuple((-1, 0, 1)[n % 3] for n in range(math.ceil(240 / frames)))
        found = frame_labels(replace(FIRST, segments=Segments(frames / 24.0, labels)), range(240), 24.0)
        assert found.tolist() == [labels[frame // frames] for frame in range(240)], frames


def test_labels_in_a_batch(tmp_path: Path) -> None:
    """Where one pair of the data has segments every batch has labels, 1 for pairs without; they follow the frames drawn."""
    labelled = replace(FIRST, segments=Segments(0.25, (-1, 1)))  # six frames each
    plan = plan_of(tmp_path, [labelled, *neighbours(RECORDS)[1:]])
    starts = set()
    for step in islice(plan.steps(), 22):
        for batch in step.micro_batches:
            found = plan.batch_fields(batch)["frame_labels"]
            assert found.shape == (2, 9) and found.dtype == torch.float32
            for draw, row in zip(batch[:2], found.tolist(), strict=True):
                starts |= {draw.start_frame} if draw.pair == labelled.pair_id else set()
                expected = [-1.0 if frame < 6 else 1.0 for frame in draw.frames]
                assert row == (expected if draw.pair == labelled.pair_id else [1.0] * 9)
    assert len(starts) > 1


def test_the_identity_of_the_order_has_the_preferences(tmp_path: Path) -> None:
    """A checkpoint is refused where pairs, ties or policies are others; where they lie does not matter."""
    pairs = neighbours(RECORDS)
    plan = plan_of(tmp_path / "a", pairs)
    plan_of(tmp_path / "moved", pairs, {"on_bad": "skip"}).check(plan.identity)
    with pytest.raises(CheckpointError, match=r"pairs.preferences was '\w+', now '\w+'\. Restore"):
        plan_of(tmp_path / "b", pairs[1:]).check(plan.identity)
    with pytest.raises(CheckpointError, match=r"pairs.ties was False, now True; pairs.policies was None, now \['a+'\]\."):
        plan_of(tmp_path / "c", pairs, {"ties": True, "policies": [POLICY]}).check(plan.identity)
    with pytest.raises(CheckpointError, match=r"micro_batch_size was 2, now 1"):
        plan_of(tmp_path / "d", pairs, micro_batch_size=1).check(plan.identity)


REFUSED: dict[str, dict[str, Any]] = {
    "mix \\(keys are those of one dataset": {"manifest": None, "mix": [{"name": "a", "manifest": "a", "weight": 1.0}]},
    "view \\(pairs name the clips": {"view": "v.yaml"},
    "image_share \\(pairs are of videos\\)": {"image_share": 0.5},
    "online \\(encode the clips once": {"online": {}},
    "window_shards \\(all pairs of an epoch": {"window_shards": 4},
    "buckets \\(pairs have clips of one size\\)": {
        "buckets": {
            "sizes": [{"num_frames": 9, "height": 32, "width": 32}], "token": {"num_frames": 4, "height": 8, "width": 8}
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("told", REFUSED)
def test_what_pairs_do_not_go_together_with(tmp_path: Path, told: str) -> None:
    changes: dict[str, Any] = {"crop": "none", **REFUSED[told]}
    with pytest.raises(ValueError, match=f"pairs does not go together with {told}"):
        data_config(tmp_path, **changes)


def test_numbers_of_a_step_count_pairs(tmp_path: Path) -> None:
    config = data_config(tmp_path)
    assert (config.mean_step_samples, config.mean_step_clips) == (4, 8)
    assert describe_steps(config) == "4 pairs of 9x32x32"
    plain = DataConfig.model_validate(config.model_dump() | {"pairs": None})
    assert (plain.mean_step_samples, plain.mean_step_clips) == (4, 4) and describe_steps(plain) == "4 clips of 9x32x32"


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    write_neighbours(tmp_path / "there", RECORDS)
    with pytest.raises(DataError, match=r"gone has no preferences"):
        PairPlan([MemoryDataset(RECORDS)], data_config(tmp_path / "gone"), 0)
