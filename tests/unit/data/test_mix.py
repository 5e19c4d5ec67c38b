"""Shares of a mix: within one of weight * n after any number n of turns, and in the samples of a plan."""

from __future__ import annotations

import random
from itertools import islice

import pytest
from pydantic import ValidationError

from tests.unit.data.test_order import MIX, make
from videofm.config.data import DataConfig
from videofm.data.mix import next_turn, whole_weights


def furthest(choose, weights: list[int], num_turns: int) -> float:
    """The largest distance of a count from weight * n over all prefixes of `num_turns` turns."""
    counts, total, worst = [0] * len(weights), sum(weights), 0
    for turn in range(1, num_turns + 1):
        counts[choose(weights, counts)] += 1
        worst = max(worst, *(abs(weight * turn - count * total) for weight, count in zip(weights, counts, strict=True)))
    return worst / total


def test_counts_stay_within_one_of_their_share():
    """400 random mixes of 2 to 8 datasets, whole periods or 600 turns. Negative control: the dataset that is furthest behind,
    the plain form of error diffusion, is off by 1.19 for one of the mixes."""
    rng = random.Random(0)
    for _ in range(400):
        weights = [rng.randint(1, rng.choice([5, 50, 1000])) for _ in range(rng.randint(2, 8))]
        assert furthest(next_turn, weights, min(sum(weights), 600)) < 1
    hard = [33, 168, 876, 4, 4, 4, 1, 5]
    assert furthest(next_turn, hard, sum(hard)) < 1 < 1.18 < furthest(behind_most, hard, 600)


def behind_most(weights: list[int], counts: list[int]) -> int:
    turn, total = sum(counts) + 1, sum(weights)
    return max(range(len(weights)), key=lambda i: (weights[i] * turn - counts[i] * total, -i))


def test_weights_are_the_decimals_that_were_written():
    """0.1 : 0.2 : 0.3 is 1 : 2 : 3, which floats are not; after a period the counts are the weights."""
    assert whole_weights([0.1, 0.2, 0.3]) == [1, 2, 3] and whole_weights([3.0, 1.5]) == [6, 3]
    counts = [0, 0, 0]
    for _ in range(6):
        counts[next_turn([1, 2, 3], counts)] += 1
    assert counts == [1, 2, 3]


def test_every_prefix_of_the_samples_has_its_shares():
    """Sample by sample over 60 steps, 480 samples; resuming in between is covered by the laws of all orders."""
    plan, _ = make("mix")
    names = [draw.source for step in islice(plan.steps(), 60) for batch in step.micro_batches for draw in batch]
    for n in range(1, len(names) + 1):
        assert abs(names[:n].count("own") - 0.3 * n) < 1
    assert len(names) == 480 and len(set(names[:8])) == 2, "a step is mixed"


def test_with_buckets_every_prefix_of_the_steps_has_its_shares():
    plan, _ = make("mix of buckets")
    names = []
    for step in islice(plan.steps(), 60):
        (name,) = {draw.source for batch in step.micro_batches for draw in batch}
        names.append(name)
        assert abs(names.count("own") - 0.3 * len(names)) < 1
    sources = step.after.sources
    assert {name: position.step for name, position in sources.items()} == {"web": 42, "own": 18}


def test_samples_of_two_datasets_are_told_apart():
    """Both have clips of the same keys: ids have the dataset's name."""
    plan, _ = make("mix")
    ids = [draw.sample_id for step in islice(plan.steps(), 40) for batch in step.micro_batches for draw in batch]
    assert len(set(ids)) == len(ids) and {name.split("/")[0] for name in ids} == {"web", "own"}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"mix": MIX}, "both of manifest and mix is given"),
        ({"manifest": None}, "neither of manifest and mix is given; name one folder of shards in manifest, or several in mix"),
        ({"manifest": None, "mix": [MIX[0], MIX[0]]}, "mix names web twice"),
        ({"manifest": None, "mix": []}, "at least 1 item"),
        ({"manifest": None, "mix": [{**MIX[0], "weight": 0.0}]}, "greater than 0"),
        ({"manifest": None, "mix": [{**MIX[0], "name": "a/b"}]}, "match pattern"),
    ],
)
def test_mixes_that_cannot_be_meant_are_refused(changes, match):
    values = {"manifest": "m", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 2}
    with pytest.raises(ValidationError, match=match):
        DataConfig.model_validate({**values, **changes})


def test_datasets_of_a_mix_take_what_is_not_theirs_from_the_section():
    config = DataConfig.model_validate(
        {
            "mix": [{**MIX[0], "split": "held_out"}, {**MIX[1], "view": "own.yaml"}],
            "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 2, "view": "all.yaml",
        }
    )  # fmt: skip
    assert [(s.name, s.split, s.view) for s in config.sources] == [
        ("web", "held_out", "all.yaml"), ("own", "train", "own.yaml"),
    ]  # fmt: skip
