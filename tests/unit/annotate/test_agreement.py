"""Kappas against closed examples, and against values of scikit-learn and statsmodels.

Made once by scikit-learn's `cohen_kappa_score` and statsmodels' `fleiss_kappa`; each test has what it was called with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

import pytest

from videofm.annotate.agreement import agreement, as_text, cohen, fleiss
from videofm.annotate.store import Vote

WORDS = ("first", "second", "tie", "both_bad")

PSYCHIATRISTS = [
    (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
]  # fmt: skip
"""10 items, 14 answers each, 5 categories: a table often used to show Fleiss' kappa."""


def table(rows: list[tuple[int, ...]]) -> list[Counter[Hashable]]:
    return [Counter[Hashable](dict(enumerate(row))) for row in rows]


def test_cohen_of_a_closed_example() -> None:
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed 35/50; expected (25*30 + 25*20)/2500 = 1/2; kappa 0.2/0.5."""
    answers: list[tuple[Hashable, Hashable]] = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    found = cohen(answers)
    assert (found.num_items, found.observed) == (50, 0.7) and found.kappa == pytest.approx(0.4, abs=1e-12)


def test_cohen_against_scikit_learn() -> None:
    """1.9.1: cohen_kappa_score([i * 7 % 4 for i in range(97)], [i * i % 4 for i in range(97)]) = 0.33788395904436863."""
    found = cohen([(i * 7 % 4, i * i % 4) for i in range(97)])
    assert found.kappa == pytest.approx(0.33788395904436863, abs=1e-12)


def test_fleiss_against_statsmodels() -> None:
    """fleiss_kappa(PSYCHIATRISTS) = 0.20993070442195522, of statsmodels 0.15.0; published as 0.210."""
    found = fleiss(table(PSYCHIATRISTS))
    assert found.num_items == 10 and found.kappa == pytest.approx(0.20993070442195522, abs=1e-12)
    assert round(found.kappa or 0, 3) == 0.210


def test_fleiss_of_two_is_scotts_pi() -> None:
    """Of two annotators, in the closed example above: shares (25 + 30)/100 and 45/100, expected 0.505, kappa 0.195/0.495."""
    rows = [(2, 0)] * 20 + [(1, 1)] * 15 + [(0, 2)] * 15
    assert fleiss(table(rows)).kappa == pytest.approx(0.195 / 0.495, abs=1e-12)


def test_items_with_different_numbers_of_answers() -> None:
    """Items AAB and AA, and one with a single answer, which is left out. Observed: (1/3 + 1)/2; shares 4/5 and 1/5, expected
    17/25; kappa (2/3 - 17/25)/(8/25) = -1/24."""
    found = fleiss([{"A": 2, "B": 1}, {"A": 2}, {"B": 1}])
    assert found.num_items == 2 and found.kappa == pytest.approx(-1 / 24, abs=1e-12)


def test_bounds() -> None:
    """All alike in several answers is 1; all opposite with equal shares is -1; one answer only is not defined."""
    assert cohen([("a", "a"), ("b", "b")]).kappa == 1
    assert cohen([("a", "b"), ("b", "a")]).kappa == -1
    assert cohen([("a", "a"), ("a", "a")]).kappa is None and cohen([]).kappa is None
    assert fleiss([{"a": 3}, {"b": 3}]).kappa == 1
    assert fleiss([{"a": 3}]).kappa is None and fleiss([]).kappa is None


def test_independent_annotators_agree_by_chance() -> None:
    """Every combination of two answers once: observed equals expected."""
    assert cohen([(a, b) for a in WORDS for b in WORDS]).kappa == pytest.approx(0, abs=1e-12)


def vote(annotator: str, pair: str, choice: str, axes: dict[str, str] | None = None) -> Vote:
    return Vote(f"{annotator}-{pair}", annotator, pair, choice, axes or {}, "first", 0.0, 1.0)


def test_agreement_of_votes() -> None:
    """On p1 and p2 all three vote, p3 only ana, p4 is skipped by ben: ana and ben share p1, p2; ben calls p2 a tie."""
    votes = [vote(name, "p1", "first", {"motion": "tie"}) for name in ("ana", "ben", "eva")]
    votes += [vote("ana", "p2", "second"), vote("ben", "p2", "tie"), vote("eva", "p2", "second")]
    votes += [vote("ana", "p3", "first"), vote("ana", "p4", "first"), vote("ben", "p4", "skip"), vote("eva", "p4", "first")]
    found = agreement(votes)
    assert {names: (kappa.num_items, kappa.observed) for names, kappa in found.pairs.items()} == {
        ("ana", "ben"): (2, 0.5),
        ("ana", "eva"): (3, 1.0),
        ("ben", "eva"): (2, 0.5),
    }
    assert found.all.num_items == 3
    motion = agreement(votes, "motion")
    assert motion.all.num_items == 1 and motion.all.kappa is None
    text = as_text(votes, ["motion", "text"])
    assert "ana and eva: 3 pairs, 100% alike, Cohen's kappa 1.000" in text
    assert "ben: 3 (1 ties, 1 skipped, 100% of the better ones on the left)" in text
    assert "all: 1 pairs, 100% alike, Fleiss' kappa not defined" in text
    assert text.endswith("agreement on text:\n  no pair has votes of two annotators")
