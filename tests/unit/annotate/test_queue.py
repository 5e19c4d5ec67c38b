"""The law of the queue: who sees which pairs, in which order, on which sides."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from videofm.annotate.queue import BLOCK, CandidatePair, first_is_left, order_for, pool_of
from videofm.data.candidates import Candidate
from videofm.data.index import ClipRecord
from videofm.errors import DataError


def candidate(prompt: int, number: int, content: str | None = None, caption: str | None = None) -> Candidate:
    key = f"{prompt:06d}-{number:03d}"
    caption = caption or f"prompt {prompt}"
    record = ClipRecord(
        key, "shards/x.tar", 0, 1, content or key, 9, 12.0, 32, 32, caption, f"prompt-{prompt:06d}", "train", {}
    )  # fmt: skip
    return Candidate(record, None)


def candidates(num_prompts: int, num_each: int) -> list[Candidate]:
    return [candidate(prompt, number) for prompt in range(num_prompts) for number in range(num_each)]


def test_a_pool_has_every_pair_of_every_prompt_once() -> None:
    """4 prompts of 5 candidates: 4 * (5 choose 2) = 40 pairs, none across prompts."""
    pool = pool_of(candidates(4, 5), num_pairs=None, overlap=0.25, seed=0)
    assert len(pool.pairs) == 40 == len({pair.pair_id for pair in pool.pairs})
    assert all(pair.first.prompt == pair.second.prompt and pair.first.key < pair.second.key for pair in pool.pairs)
    assert pool.num_shared == 10 and [pair.shared for pair in pool.pairs] == [True] * 10 + [False] * 30


def test_prompts_take_turns_in_a_limited_pool() -> None:
    """10 prompts of 6 pairs each, 25 wanted: every prompt gives 2 or 3."""
    pool = pool_of(candidates(10, 4), num_pairs=25, overlap=0.0, seed=3)
    counts = Counter(pair.first.prompt for pair in pool.pairs)
    assert len(pool.pairs) == 25 and set(counts.values()) == {2, 3} and len(counts) == 10


def test_identical_videos_and_single_candidates_give_no_pair() -> None:
    found = [candidate(0, 0, "same"), candidate(0, 1, "same"), candidate(0, 2), candidate(1, 0)]
    pool = pool_of(found, num_pairs=None, overlap=0.0, seed=0)
    assert sorted(pair.pair_id for pair in pool.pairs) == ["000000-000--000000-002", "000000-001--000000-002"]
    assert (pool.num_identical, pool.num_single) == (1, 1)


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(DataError, match="2 clips of 2 prompts hold no prompt with two candidates that differ"):
        pool_of([candidate(0, 0), candidate(1, 0)], num_pairs=None, overlap=0.2, seed=0)
    with pytest.raises(DataError, match="1 pairs are one video twice"):
        pool_of([candidate(0, 0, "same"), candidate(0, 1, "same")], num_pairs=None, overlap=0.2, seed=0)


def test_a_pool_is_a_function_of_candidates_and_seed() -> None:
    found = candidates(5, 4)
    pools = [pool_of(list(reversed(found)) if turned else found, num_pairs=12, overlap=0.5, seed=1) for turned in (0, 1)]
    assert pools[0] == pools[1]
    other = pool_of(found, num_pairs=12, overlap=0.5, seed=2)
    assert [pair.pair_id for pair in other.pairs] != [pair.pair_id for pair in pools[0].pairs]


def pairs_of(num_shared: int, num_own: int) -> list[CandidatePair]:
    return [CandidatePair(f"p{i}", candidate(i, 0), candidate(i, 1), i < num_shared) for i in range(num_shared + num_own)]


def test_an_order_is_a_permutation_of_its_own_for_each_annotator_and_seed() -> None:
    pairs = pairs_of(20, 80)
    orders = [order_for(pairs, seed, name) for seed in (0, 1) for name in ("ana", "ben")]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert order_for(pairs, 0, "ana") == orders[0]


def test_whoever_stops_early_has_seen_nearly_the_same_shared_pairs() -> None:
    """Shared pairs are in the same blocks of 10 for all: of what two annotators saw of them, all but a block is in common."""
    pairs = pairs_of(60, 240)
    orders = [order_for(pairs, 0, name) for name in ("ana", "ben", "eva")]
    for stop in (50, 100, 200):
        seen = [{number for number in order[:stop] if number < 60} for order in orders]
        for a, b in itertools.combinations(seen, 2):
            assert len(a & b) >= min(len(a), len(b)) - BLOCK
            # And as many as the share of the way says, to four standard deviations of 60 draws.
            assert abs(len(a) - 60 * stop / 300) < 16
    within = [[number for number in order if number < 60] for order in orders]
    assert within[0] != within[1], "shuffled within blocks"


def test_sides_are_a_fair_coin_for_each_annotator_and_pair() -> None:
    """Of 2,000 coins 1,000 are expected, with a deviation of 22; two annotators agree on half."""
    ana, ben = ([first_is_left(0, name, f"pair-{i}") for i in range(2000)] for name in ("ana", "ben"))
    assert 900 < sum(ana) < 1100 and 900 < sum(ben) < 1100
    assert 900 < sum(a == b for a, b in zip(ana, ben, strict=True)) < 1100
    assert ana == [first_is_left(0, "ana", f"pair-{i}") for i in range(2000)]
