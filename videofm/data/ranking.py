"""From scored candidates to pairs: a pure function, so that the same scores always give the same preferences."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from videofm.config.rank import RankConfig
from videofm.data.candidates import Candidate
from videofm.data.pair_weights import rarity_weights
from videofm.data.preferences import PreferencePair, Side
from videofm.errors import ConfigError, DataError

OVERALL = "overall"
SOURCE = "videofm dpo rank"


@dataclass(frozen=True)
class Scored:
    """A candidate and its scores: axis -> number, larger is better, `overall` among them."""

    candidate: Candidate
    scores: Mapping[str, float]

    @property
    def overall(self) -> float:
        """What candidates are ordered by."""
        return self.scores[OVERALL]

    @property
    def side(self) -> Side:
        """It, as a side of a pair."""
        candidate = self.candidate
        return Side(candidate.key, candidate.record.sha256, dict(self.scores), candidate.origin)


@dataclass
class Ranking:
    """The pairs, prompt by prompt, and what became of the others.

    Attributes:
        pairs: those that were decided, and ties.
        left_out: reason -> how many pairs, or prompts, do not appear because of it.
    """

    pairs: list[PreferencePair] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def decided(self) -> list[PreferencePair]:
        """The pairs that have a winner."""
        return [pair for pair in self.pairs if not pair.tie]


def rank(groups: Iterable[Sequence[Scored]], config: RankConfig) -> Ranking:
    """The pairs of all prompts; each of `groups` holds the candidates of one.

    Raises:
        ConfigError: an axis of `require_axes` is scored nowhere.
        DataError: clips of one prompt differ in shape, and `on_bad` is `fail`.
    """
    groups = list(groups)
    _check_axes(groups, config.require_axes)
    found = Ranking()
    for group in groups:
        _rank_group(group, config, found)
    _keep_few(found, config)
    decided = found.decided
    differences = [pair.winner.scores[OVERALL] - pair.loser.scores[OVERALL] for pair in decided]
    if decided and config.rarity_alpha:
        weights = rarity_weights(differences, config.rarity_alpha, config.rarity_bins)
        by_id = {pair.pair_id: weight for pair, weight in zip(decided, weights, strict=True)}
        found.pairs = [replace(pair, weight=by_id.get(pair.pair_id, pair.weight)) for pair in found.pairs]
    return found


def axes_of(better: Mapping[str, float], worse: Mapping[str, float]) -> dict[str, str]:
    """Axis -> `winner`, `loser` or `tie`, for the axes besides `overall` that both sides have."""
    axes = {}
    for axis in better:
        if axis != OVERALL and axis in worse:
            axes[axis] = "tie" if better[axis] == worse[axis] else "winner" if better[axis] > worse[axis] else "loser"
    return axes


def _check_axes(groups: Sequence[Sequence[Scored]], wanted: Sequence[str]) -> None:
    known = {axis for group in groups for scored in group for axis in scored.scores}
    unknown = [axis for axis in wanted if axis not in known]
    if known and unknown:
        raise ConfigError(
            f"require_axes names {', '.join(unknown)}, which the reward does not score; it gives {', '.join(sorted(known))}"
        )


def _rank_group(group: Sequence[Scored], config: RankConfig, found: Ranking) -> None:
    """Append the pairs of one prompt, those whose scores differ most first."""
    if len(group) < 2:
        found.left_out["prompts with fewer than two candidates"] += 1
        return
    ordered = sorted(group, key=lambda scored: (-scored.overall, scored.candidate.key))
    kept = []
    for place, other in _places(len(ordered), config.pairs):
        better, worse = ordered[place], ordered[other]
        pair = _pair(better, worse, config.margin)
        reason = _different_shape(better, worse, config.on_bad)
        if reason is None and not pair.tie:
            reason = _contradiction(pair, config.require_axes)
        if reason is None:
            kept.append(pair)
        else:
            found.left_out[reason] += 1
    kept.sort(key=lambda pair: pair.loser.scores[OVERALL] - pair.winner.scores[OVERALL])  # stable: equal ones stay in order
    limit = config.num_pairs or (1 if config.pairs == "best_worst" else len(kept))
    found.left_out["more than num_pairs of a prompt"] += len(kept[limit:])
    found.pairs += kept[:limit]


def _different_shape(one: Scored, other: Scored, on_bad: str) -> str | None:
    """Why two clips make no pair; None where they have one shape.

    Raises:
        DataError: they have not, and bad records stop the stage.
    """
    first, second = (
        f"{record.num_frames} frames of {record.height}x{record.width} at {record.fps:g} fps"
        for record in (one.candidate.record, other.candidate.record)
    )
    if first == second:
        return None
    if on_bad == "fail":
        raise DataError(
            f"candidates {one.candidate.key} and {other.candidate.key} of {one.candidate.prompt!r} have different shapes "
            f"({first}, and {second}): the clips of a pair have one. Make them alike, or set on_bad: skip."
        )
    return "videos of different shape"


def _contradiction(pair: PreferencePair, required: Sequence[str]) -> str | None:
    """Why the axes of a pair speak against its winner; None where they do not."""
    worse_on = [axis for axis in required if pair.axes.get(axis) == "loser"]
    if worse_on:
        return f"contradicted by {' and '.join(worse_on)}"
    return "contradicted by all axes" if pair.axes and set(pair.axes.values()) == {"loser"} else None


def _places(count: int, rule: str) -> list[tuple[int, int]]:
    """Which places of an order of `count`, best first, make pairs: (better, worse)."""
    match rule:
        case "all":
            return list(itertools.combinations(range(count), 2))
        case "adjacent":
            return list(itertools.pairwise(range(count)))
        case _:
            return [(place, count - 1 - place) for place in range(count // 2)]


def _pair(better: Scored, worse: Scored, margin: float) -> PreferencePair:
    difference = better.overall - worse.overall
    return PreferencePair(
        pair_id=f"{better.candidate.key}_over_{worse.candidate.key}",
        prompt=better.candidate.prompt,
        winner=better.side,
        loser=worse.side,
        tie=difference == 0 or difference < margin,
        axes=axes_of(better.scores, worse.scores),
        source=SOURCE,
    )


def _keep_few(found: Ranking, config: RankConfig) -> None:
    """Of the decided pairs leave `max_pairs`, those whose hash with the seed is smallest."""
    decided = found.decided
    if config.max_pairs is None or len(decided) <= config.max_pairs:
        return

    def place(pair: PreferencePair) -> str:
        return hashlib.sha256(f"{config.seed}:{pair.pair_id}".encode()).hexdigest()

    drawn = {pair.pair_id for pair in sorted(decided, key=place)[: config.max_pairs]}
    found.left_out["more than max_pairs"] += len(decided) - len(drawn)
    found.pairs = [pair for pair in found.pairs if pair.tie or pair.pair_id in drawn]
