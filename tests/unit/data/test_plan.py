"""Laws of the data order: coverage, resume anywhere, independence of the number of ranks, refusal of another order."""

from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest

from videofm.config.data import DataConfig
from videofm.data.plan import DataPlan, PlanState
from videofm.data.shards import ClipRecord
from videofm.errors import CheckpointError, DataError


def config(**changes) -> DataConfig:
    values = {"manifest": "m", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 3, "num_micro_batches": 4}
    return DataConfig.model_validate({**values, "window_shards": 2, **changes})


def records(count: int = 100, shards: int = 7) -> list[ClipRecord]:
    return [
        ClipRecord(f"k{i:04d}", f"shards/{i % shards}.tar", 0, 1, "", 9 + i % 5, 25.0, 32, 32, "", f"s{i}", "train", {})
        for i in range(count)
    ]


def ids(steps) -> list:
    return [[[draw.sample_id for draw in batch] for batch in step.micro_batches] for step in steps]


def test_every_clip_comes_once_an_epoch():
    """25 epochs of 100 clips in steps of 12: 208 full steps hold 2,496 draws; no clip is drawn twice in one epoch, and after
    k epochs each clip was drawn k times but for the at most 11 that are carried."""
    steps = islice(DataPlan(records(), "h", config(), 0).steps(), 208)
    drawn = [draw for step in steps for batch in step.micro_batches for draw in batch]
    assert max(Counter(draw.sample_id for draw in drawn).values()) == 1
    per_epoch = Counter(draw.epoch for draw in drawn)
    assert all(per_epoch[epoch] == 100 for epoch in range(24))
    assert 100 - per_epoch[24] == 25 * 100 - 208 * 12


@pytest.mark.parametrize("k", [0, 1, 2, 3, 7, 8, 9, 26, 100])
def test_resuming_after_any_step_gives_the_same_order(k):
    """The state after step k, through JSON, continues as the straight run does: within windows and at their edges."""
    plan = DataPlan(records(), "h", config(), 5)
    straight = list(islice(plan.steps(), k + 30))
    state = straight[k - 1].after if k else PlanState()
    resumed = list(islice(DataPlan(records(), "h", config(), 5).steps(PlanState.from_json(state.to_json())), 30))
    assert ids(resumed) == ids(straight[k:])
    assert [step.after for step in resumed] == [step.after for step in straight[k:]]


def test_ranks_share_a_step_without_changing_it():
    """Any degree that divides the 4 micro-batches deals the same micro-batches: slot a of rank r is number a * W + r."""
    step = next(DataPlan(records(), "h", config(), 1).steps())
    for degree in (1, 2, 4):
        shares = [step.share(rank, degree) for rank in range(degree)]
        dealt = [shares[index % degree][index // degree] for index in range(4)]
        assert dealt == step.micro_batches


def test_order_depends_on_seed_and_epoch_but_not_on_the_order_of_records():
    plan = DataPlan(records(), "h", config(), 0)
    first = ids(islice(plan.steps(), 8))
    assert first != ids(islice(DataPlan(records(), "h", config(), 1).steps(), 8))
    assert first == ids(islice(DataPlan(records()[::-1], "h", config(), 0).steps(), 8))
    keys = [draw.key for step in islice(plan.steps(), 100) for batch in step.micro_batches for draw in batch]
    assert keys[:100] != keys[100:200], "the second epoch must be in another order"


def test_start_frames_cover_what_fits():
    """Clips have 9 to 13 frames and 9 are read: starts lie in 0 to 4 and every start occurs."""
    plan = DataPlan(records(), "h", config(), 0)
    draws = [draw for step in islice(plan.steps(), 80) for batch in step.micro_batches for draw in batch]
    assert all(draw.start_frame + 9 <= plan.records[draw.key].num_frames for draw in draws)
    assert {draw.start_frame for draw in draws} == {0, 1, 2, 3, 4}


def test_a_dataset_smaller_than_a_step_fills_it_from_several_epochs():
    step = next(DataPlan(records(5, 1), "h", config(), 0).steps())
    drawn = [draw for batch in step.micro_batches for draw in batch]
    assert len(drawn) == 12 and len({draw.sample_id for draw in drawn}) == 12
    assert Counter(draw.epoch for draw in drawn) == {0: 5, 1: 5, 2: 2}


def test_another_order_is_refused_by_field():
    old = DataPlan(records(), "h", config(), 0).identity
    with pytest.raises(CheckpointError, match="num_micro_batches was 4, now 2"):
        DataPlan(records(), "h", config(num_micro_batches=2), 0).check(old)
    with pytest.raises(CheckpointError, match="manifest was 'h', now 'other'"):
        DataPlan(records(), "other", config(), 0).check(old)
    DataPlan(records(), "h", config(), 0).check(old)


def test_unusable_clips_are_explained():
    with pytest.raises(DataError, match=r"no clip of split 'train' is stored at 64x64; stored are 32x32"):
        DataPlan(records(), "h", config(height=64, width=64), 0)
    with pytest.raises(DataError, match=r"no clip of split 'train' has 33 frames; the longest has 13"):
        DataPlan(records(), "h", config(num_frames=33), 0)
    short = [replace(record, num_frames=5) for record in records(10)]
    assert len(DataPlan([*short, *records(20)[10:]], "h", config(), 0).records) == 10
