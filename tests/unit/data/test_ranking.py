"""Pairs out of scores: which places meet, ties, contradictions, limits, weights."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from videofm.config.rank import RankConfig
from videofm.data.candidates import Candidate
from videofm.data.index import ClipRecord
from videofm.data.preferences import Origin, pair_problem
from videofm.data.ranking import Ranking, Scored, axes_of, rank
from videofm.errors import ConfigError, DataError


def config(**fields: Any) -> RankConfig:
    return RankConfig.model_validate(
        {"kind": "dpo_rank", "manifest": "candidates", "reward": {"kind": "moving_shapes"}, **fields}
    )


def candidate(group: str, name: str, num_frames: int = 9, caption: str | None = None) -> Candidate:
    key, caption = f"{group}-{name}", caption or f"prompt {group}"
    record = ClipRecord(key, "shards/s.tar", 0, 1, f"hash of {key}", num_frames, 8.0, 32, 32, caption, group, "train", {})
    return Candidate(record, Origin("run", "a" * 64, 1, {}))


def group(name: str, **overall: float) -> list[Scored]:
    """Candidates by their name and overall score."""
    return [Scored(candidate(name, key), {"overall": value}) for key, value in overall.items()]


def names(ranking: Ranking) -> list[tuple[str, str]]:
    return [(pair.winner.key[-1], pair.loser.key[-1]) for pair in ranking.pairs]


FIVE = {"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.3, "e": 0.8}
"""In order: b e c d a."""


def test_which_places_meet() -> None:
    """The order is b e c d a. Sorted by difference: b-a 0.8, e-a 0.7, b-d 0.6, e-d 0.5, b-c and c-a 0.4, ..."""
    scored = [group("p", **FIVE)]
    assert names(rank(scored, config())) == [("b", "a")]
    assert names(rank(scored, config(num_pairs=5))) == [("b", "a"), ("e", "d")]
    assert names(rank(scored, config(pairs="adjacent"))) == [("e", "c"), ("c", "d"), ("d", "a"), ("b", "e")]
    every = names(rank(scored, config(pairs="all")))
    assert sorted(every) == sorted(itertools.combinations("becda", 2)) and every[:4] == [
        tuple(x) for x in ["ba", "ea", "bd", "ed"]
    ]
    few = rank(scored, config(pairs="all", num_pairs=2))
    assert names(few) == [("b", "a"), ("e", "a")] and few.left_out["more than num_pairs of a prompt"] == 8


def test_pairs_do_not_depend_on_the_order_of_candidates() -> None:
    forward, backward = [group("p", **FIVE)], [group("p", **FIVE)[::-1]]
    assert rank(forward, config(pairs="all")) == rank(backward, config(pairs="all"))


def test_a_pair_holds_what_is_known_of_both() -> None:
    better = Scored(candidate("p", "a"), {"overall": 0.75, "motion": 1.0, "colour": 0.5, "text": 0.2})
    worse = Scored(candidate("p", "b"), {"overall": 0.25, "motion": 0.0, "colour": 0.5, "text": 0.4})
    (pair,) = rank([[worse, better]], config()).pairs
    assert (pair.winner.key, pair.loser.key, pair.prompt) == ("p-a", "p-b", "prompt p")
    assert pair.winner == better.side and pair.winner.sha256 == "hash of p-a" and pair.winner.origin is not None
    assert pair.winner.scores == better.scores and pair.axes == {"motion": "winner", "colour": "tie", "text": "loser"}
    assert not pair.tie and pair.weight == 1 and pair_problem(pair) is None
    assert axes_of({"overall": 1, "x": 1}, {"overall": 0}) == {}


def test_ties_are_kept_as_ties() -> None:
    """Differences 0.5 and below the margin, at it, and 0 without a margin."""
    found = rank([group("p", a=0.5, b=0.25), group("q", a=1.0, b=0.25)], config(margin=0.5))
    assert [pair.tie for pair in found.pairs] == [True, False]
    assert not rank([group("p", a=0.75, b=0.25)], config(margin=0.5)).pairs[0].tie
    (equal,) = rank([group("p", b=0.5, a=0.5)], config()).pairs
    assert equal.tie and (equal.winner.key, equal.loser.key) == ("p-a", "p-b")


def test_a_winner_that_is_worse_on_a_required_axis_is_no_winner() -> None:
    def scored(name: str, overall: float, motion: float, text: float) -> Scored:
        return Scored(candidate("p", name), {"overall": overall, "motion": motion, "text": text})

    members = [scored("a", 0.9, 0.1, 1.0), scored("b", 0.6, 0.5, 0.6), scored("c", 0.2, 0.3, 0.1)]
    found = rank([members], config(pairs="all", require_axes=["motion"]))
    assert names(found) == [("b", "c")]
    assert found.left_out["contradicted by motion"] == 2
    assert names(rank([members], config(pairs="all", require_axes=["text"]))) == [("a", "c"), ("b", "c"), ("a", "b")]
    against = [Scored(candidate("q", "a"), {"overall": 1.0, "x": 0.0}), Scored(candidate("q", "b"), {"overall": 0.0, "x": 1.0})]
    assert rank([against], config()).left_out["contradicted by all axes"] == 1
    with pytest.raises(
        ConfigError, match="require_axes names sound, which the reward does not score; it gives motion, overall"
    ):
        rank([members], config(require_axes=["sound"]))


def test_max_pairs_is_a_draw_by_the_seed() -> None:
    groups = [group(f"p{number}", a=1.0, b=0.0) for number in range(40)] + [group("tie", a=1.0, b=1.0)]
    all_ids = {pair.pair_id for pair in rank(groups, config()).decided}
    few = rank(groups, config(max_pairs=12))
    assert len(few.decided) == 12 and few.left_out["more than max_pairs"] == 28 and len(few.pairs) == 13
    assert {pair.pair_id for pair in few.decided} < all_ids
    assert rank(groups[::-1], config(max_pairs=12)).pairs == few.pairs[-1:] + few.pairs[:-1][::-1]
    assert rank(groups, config(max_pairs=12, seed=1)).pairs != few.pairs
    more = {pair.pair_id for pair in rank(groups, config(max_pairs=20)).decided}
    assert {pair.pair_id for pair in few.decided} < more, "a larger draw of one seed holds the smaller one"
    assert rank(groups, config(max_pairs=41)).pairs == rank(groups, config()).pairs


def test_rare_differences_weigh_more() -> None:
    """Nine differences of 0.1 and one of 1.0, in two bins: p is 0.9 and 0.1, alpha 1: 0.72 / p = 0.8 and 7.2; the tie stays."""
    groups = [group(f"p{number}", a=0.1, b=0.0) for number in range(9)] + [group("q", a=1.0, b=0.0), group("t", a=1.0, b=1.0)]
    pairs = rank(groups, config(rarity_alpha=1.0, rarity_bins=2)).pairs
    assert [pair.weight for pair in pairs] == pytest.approx([0.8] * 9 + [7.2, 1.0])
    assert {pair.weight for pair in rank(groups, config()).pairs} == {1.0}


def test_bad_groups() -> None:
    found = rank([group("p", a=1.0), group("q", a=1.0, b=0.0)], config())
    assert len(found.pairs) == 1 and found.left_out["prompts with fewer than two candidates"] == 1
    shapes = [Scored(candidate("p", "a"), {"overall": 1.0}), Scored(candidate("p", "b", num_frames=17), {"overall": 0.0})]
    with pytest.raises(
        DataError, match=r"p-a and p-b of 'prompt p' have different shapes \(9 frames .*, and 17 frames of 32x32"
    ):
        rank([shapes], config())
    assert rank([shapes], config(on_bad="skip")).left_out["videos of different shape"] == 1
