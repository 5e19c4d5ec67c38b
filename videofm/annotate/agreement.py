"""How far annotators agree beyond chance: Cohen's kappa of two (Cohen 1960) and Fleiss' kappa of any number (Fleiss 1971).

Both are (observed - expected) / (1 - expected) agreement; 1 is full agreement, 0 is what chance gives with the same shares of
answers. Where everybody always says the same, chance explains everything and kappa is not defined: it is None, never 0 or 1.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from videofm.annotate.store import Vote


@dataclass(frozen=True)
class Kappa:
    """Agreement on `num_items` items: the share of equal answers, and kappa, None where it is not defined."""

    num_items: int
    observed: float | None
    kappa: float | None


@dataclass(frozen=True)
class Agreement:
    """On one question: Cohen's kappa of each two annotators who share pairs, and Fleiss' kappa of all."""

    pairs: dict[tuple[str, str], Kappa]
    all: Kappa


def cohen(answers: Sequence[tuple[Hashable, Hashable]]) -> Kappa:
    """Of two annotators; each item has the answer of the one and of the other. The expected agreement is that of each one's
    own shares of answers."""
    count = len(answers)
    if not count:
        return Kappa(0, None, None)
    first, second = Counter(a for a, _ in answers), Counter(b for _, b in answers)
    observed = sum(a == b for a, b in answers) / count
    return _kappa(count, observed, sum(first[answer] * second[answer] for answer in first) / count**2)


def fleiss(items: Iterable[Mapping[Hashable, int]]) -> Kappa:
    """Of any number of annotators; each item says how many gave each answer. The expected agreement is that of the shares of
    answers over all.

    Items may have different numbers of answers: the share of equal pairs of answers is averaged over items, and the shares of
    answers are taken over all answers; with equal numbers that is Fleiss' own. Items with less than two answers are left out.
    """
    counted = [item for item in items if sum(item.values()) >= 2]
    if not counted:
        return Kappa(0, None, None)
    agreement, totals = [], Counter[Hashable]()
    for item in counted:
        number = sum(item.values())
        agreement.append(sum(n * (n - 1) for n in item.values()) / (number * (number - 1)))
        totals.update(item)
    total = sum(totals.values())
    return _kappa(len(counted), sum(agreement) / len(counted), sum(n * n for n in totals.values()) / total**2)


def agreement(votes: Iterable[Vote], axis: str | None = None) -> Agreement:
    """How far annotators agree on which candidate is better, or on an axis. Answers are about candidates, not about sides;
    skipped pairs, and votes that say nothing of the axis, are left out."""
    answers: dict[str, dict[str, str]] = defaultdict(dict)
    for vote in votes:
        answer = vote.choice if axis is None else vote.axes.get(axis)
        if answer is not None and vote.choice != "skip":
            answers[vote.pair_id][vote.annotator] = answer
    names = sorted({name for given in answers.values() for name in given})
    pairs = {}
    for a, b in itertools.combinations(names, 2):
        both = [(given[a], given[b]) for given in answers.values() if a in given and b in given]
        if both:
            pairs[a, b] = cohen(both)
    return Agreement(pairs, fleiss(Counter[Hashable](given.values()) for given in answers.values()))


def as_text(votes: Sequence[Vote], axes: Sequence[str]) -> str:
    """Tables for people: votes of each annotator, then agreement on the whole and on each axis."""
    lines = [f"{len(votes)} votes"]
    for name, count in sorted(Counter(vote.annotator for vote in votes).items()):
        mine = Counter(vote.choice for vote in votes if vote.annotator == name)
        left = [vote for vote in votes if vote.annotator == name and vote.choice in ("first", "second")]
        on_left = f", {sum(v.choice == v.left for v in left) / len(left):.0%} of the better ones on the left" if left else ""
        said = ", ".join(f"{mine[choice]} {word}" for choice, word in _WORDS.items() if mine[choice])
        lines.append(f"  {name}: {count} ({said}{on_left})")
    for axis in (None, *axes):
        found = agreement(votes, axis)
        lines.append(f"agreement on {'the better video' if axis is None else axis}:")
        if not found.pairs:
            lines.append("  no pair has votes of two annotators")
            continue
        lines += [
            f"  {a} and {b}: {_said(kappa)}, Cohen's kappa {_number(kappa.kappa)}" for (a, b), kappa in found.pairs.items()
        ]
        lines.append(f"  all: {_said(found.all)}, Fleiss' kappa {_number(found.all.kappa)}")
    return "\n".join(lines)


_WORDS = {"tie": "ties", "both_bad": "both bad", "skip": "skipped"}


def _kappa(count: int, observed: float, expected: float) -> Kappa:
    # Shares are ratios of whole numbers: an expectation of 1 is exact.
    return Kappa(count, observed, None if expected == 1 else (observed - expected) / (1 - expected))


def _said(kappa: Kappa) -> str:
    return f"{kappa.num_items} pairs, {kappa.observed:.0%} alike"


def _number(kappa: float | None) -> str:
    return "not defined (all answers are the same)" if kappa is None else f"{kappa:.3f}"
