"""Which pairs each annotator sees, in which order and on which sides: pure functions of the candidates, the seed and the name.

- The pool holds pairs of candidates of one prompt. Where it is limited, prompts take turns, so that none is left out.
- A share of the pool, the overlap, is seen by all annotators, for agreement and majorities. Every other pair goes to one
  annotator: to whoever comes to it first (`store.Store` keeps who).
- The order is random for each annotator. Shared pairs lie evenly in it, and within blocks of `BLOCK` in the same place for all:
  whenever the annotators stop, they have seen nearly the same ones.
- The side of a candidate is a coin for each annotator and pair.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from videofm.data.candidates import Candidate, by_prompt
from videofm.errors import DataError

BLOCK = 10
"""Shared pairs are shuffled for each annotator within so many of them."""


@dataclass(frozen=True)
class CandidatePair:
    """Two candidates of one prompt; the key of `first` is the lower one. `shared`: all annotators see it."""

    pair_id: str
    first: Candidate
    second: Candidate
    shared: bool = False

    @property
    def prompt(self) -> str:
        """The caption that both were made for."""
        return self.first.prompt


@dataclass(frozen=True)
class Pool:
    """The pairs that are to be judged, and what gave none.

    Attributes:
        pairs: shared ones first, in their common order.
        num_identical: pairs left out because both are the same video.
        num_single: prompts with one candidate only.
    """

    pairs: list[CandidatePair]
    num_identical: int
    num_single: int

    @property
    def num_shared(self) -> int:
        """How many pairs all annotators see."""
        return sum(pair.shared for pair in self.pairs)


def pool_of(candidates: Iterable[Candidate], *, num_pairs: int | None, overlap: float, seed: int) -> Pool:
    """The pool of `candidates`.

    Args:
        candidates: of a dataset; those with one caption are of one prompt.
        num_pairs: at most so many pairs; None: all.
        overlap: share of the pool that all annotators see, 0 to 1.
        seed: of the draw of pairs and of the overlap.

    Raises:
        DataError: no prompt has two candidates that differ.
    """
    prompts = by_prompt(candidates)
    turns: list[tuple[int, float, CandidatePair]] = []
    num_identical = 0
    for clips in prompts.values():
        found = [CandidatePair(f"{a.key}--{b.key}", a, b) for a, b in itertools.combinations(clips, 2)]
        different = [pair for pair in found if pair.first.record.sha256 != pair.second.record.sha256]
        num_identical += len(found) - len(different)
        different.sort(key=lambda pair: _unit(seed, "pool", pair.pair_id))
        turns += [(turn, _unit(seed, "turn", turn, pair.pair_id), pair) for turn, pair in enumerate(different)]
    if not turns:
        raise DataError(
            f"{sum(map(len, prompts.values()))} clips of {len(prompts)} prompts hold no prompt with two candidates that differ "
            f"({num_identical} pairs are one video twice): there is nothing to compare. Make two or more candidates of a "
            "prompt (`videofm dpo generate`)"
        )
    turns.sort(key=lambda item: item[:2])
    pairs = [pair for _, _, pair in turns[:num_pairs]]
    pairs.sort(key=lambda pair: _unit(seed, "shared", pair.pair_id))
    num_shared = round(overlap * len(pairs))
    marked = [replace(pair, shared=index < num_shared) for index, pair in enumerate(pairs)]
    return Pool(marked, num_identical, sum(len(clips) == 1 for clips in prompts.values()))


def order_for(pairs: Sequence[CandidatePair], seed: int, annotator: str) -> list[int]:
    """The numbers of the pool's pairs in the order in which `annotator` sees them."""
    num_shared = sum(pair.shared for pair in pairs)

    def place(number: int) -> float:
        chance = _unit(seed, "order", annotator, pairs[number].pair_id)
        if not pairs[number].shared:
            return chance
        start = number // BLOCK * BLOCK
        return (start + chance * min(BLOCK, num_shared - start)) / num_shared

    return sorted(range(len(pairs)), key=lambda number: (place(number), number))


def first_is_left(seed: int, annotator: str, pair_id: str) -> bool:
    """Whether `annotator` sees the first candidate of the pair on the left."""
    return _unit(seed, "side", annotator, pair_id) < 0.5


def _unit(*words: object) -> float:
    """A number in [0, 1) that follows from `words` and is the same on every machine."""
    digest = hashlib.sha256(json.dumps(words, ensure_ascii=False).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2.0**48
