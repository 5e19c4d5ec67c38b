"""The order of pairs: which two clips of one prompt come next, as a pure function of a seed and the pairs.

The pairs of an epoch are permuted by (seed, epoch), epochs follow each other without a seam, and consecutive runs of pairs are
the optimizer steps: the position is the number of the step. A micro-batch of P pairs is 2P draws, first the winners and then
the losers. Both draws of a pair carry the pair's id, and so the same `sample_id`: every random number that is keyed by it is
the same for winner and loser, and so are the stride, the first frame and the window, which are drawn for the pair.

Pairs are matched with the dataset when the plan is made. A record that does not fit is reported; `on_bad` says what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import torch
from torch import Tensor

from videofm.config.data import DataConfig
from videofm.config.pairs import PairsConfig
from videofm.data.draws import Clip, Draw, PlanState, Shape, generator
from videofm.data.plan import DataPlan, StepPlan
from videofm.data.preferences import PreferencePair, Preferences, Side, describe_pair, pair_problem, read_preferences
from videofm.data.sizes import refusal
from videofm.data.source import Dataset
from videofm.data.view import ResolvedView
from videofm.errors import DataError

_NAMED = 10
"""Bad records that an error names; of the others it says how many there are."""


@dataclass(frozen=True)
class BadPair:
    """A record that cannot be used: its number among all (from 1), the pair in words, and why."""

    number: int
    pair: str
    reason: str

    def __str__(self) -> str:
        return f"record {self.number}, {self.pair}: {self.reason}"


@dataclass(frozen=True)
class StoredClip:
    """What the index says of a clip, and the row of its shard in the manifest."""

    key: str
    shard: int
    shape: Shape
    fps: float
    sha256: str
    caption: str


@dataclass(frozen=True)
class MatchedPair:
    """A pair and the clips that it is about."""

    pair: PreferencePair
    winner: StoredClip
    loser: StoredClip


@dataclass(frozen=True)
class MatchedPairs:
    """The pairs that can be used, by id; the records that cannot; and how many good ones are ties that are not wanted."""

    pairs: list[MatchedPair]
    bad: list[BadPair]
    num_ties: int


def match_pairs(preferences: Preferences, dataset: Dataset, split: str, config: DataConfig) -> MatchedPairs:
    """Look up the clips of every pair.

    Args:
        preferences: the pairs.
        dataset: the clips; mostly `Manifest.load(preferences.clips)`.
        split: where they have to be.
        config: the section `data`, which says which shapes, ties and policies are wanted.
    """
    assert config.pairs is not None
    stored = _stored(dataset, split, {side.key for pair in preferences.pairs for side in (pair.winner, pair.loser)})
    found, bad, num_ties, seen = [], [], 0, set[str]()
    for number, pair in enumerate(preferences.pairs, 1):
        reason = pair_problem(pair) or _policy_problem(pair, config.pairs)
        if reason is None and pair.pair_id in seen:
            reason = "an earlier record has its pair_id, by which draws are keyed"
        reason = reason or _clip_problem(pair, stored, split, preferences.clips) or _shape_problem(pair, stored, config)
        seen.add(pair.pair_id)
        if reason is not None:
            bad.append(BadPair(number, describe_pair(pair), reason))
        elif pair.tie and not config.pairs.ties:
            num_ties += 1
        else:
            found.append(MatchedPair(pair, stored[pair.winner.key], stored[pair.loser.key]))
    return MatchedPairs(sorted(found, key=lambda matched: matched.pair.pair_id), bad, num_ties)


class PairPlan(DataPlan):
    """The endless order of the pairs of `data.pairs`.

    Attributes:
        matched: the pairs that are read, and what became of the others.
    """

    def __init__(
        self, datasets: Sequence[Dataset], config: DataConfig, seed: int, views: Sequence[ResolvedView | None] = ()
    ) -> None:
        """
        Args:
            datasets: the one of `config.manifest`.
            config: the section `data`, with `pairs`.
            seed: of the run.
            views: none; a view is refused with pairs.

        Raises:
            DataError: the preferences cannot be read, a record is bad and `on_bad` is `fail`, or no pair is left.
        """
        super().__init__(datasets, config, seed, views)
        assert config.pairs is not None
        self._section: PairsConfig = config.pairs
        self._source = self.sources[""]
        preferences = read_preferences(config.pairs.path)
        self.matched = match_pairs(preferences, self._source.dataset, self._source.split, config)
        self._refuse_bad(len(preferences.pairs))
        self._pairs = {matched.pair.pair_id: matched for matched in self.matched.pairs}
        self._ids = list(self._pairs)
        self._order: Callable[[int], list[int]] = lru_cache(2)(self._permuted)
        pairs = [matched.pair for matched in self.matched.pairs]
        self._has_segments = any(pair.segments is not None for pair in pairs)
        self._has_axes = any(pair.axes for pair in pairs)
        self._has_rewards = all("overall" in side.scores for pair in pairs for side in (pair.winner, pair.loser))
        policies = sorted(config.pairs.policies) if config.pairs.policies is not None else None
        self.identity["pairs"] = {"preferences": preferences.hash, "ties": config.pairs.ties, "policies": policies}

    @property
    def num_pairs(self) -> int:
        """Pairs of an epoch."""
        return len(self._ids)

    def describe(self) -> str:
        """What is read, in words."""
        return f"{self.num_pairs:,} pairs of {self.num_clips:,} clips"

    def left_out(self) -> list[str]:
        """What is not used, in words: ties, and every bad record."""
        lines, matched = [], self.matched
        total = self.num_pairs + len(matched.bad) + matched.num_ties
        if matched.num_ties:
            lines.append(f"{matched.num_ties:,} of {total:,} pairs are not used: they are ties (data.pairs.ties is false)")
        if matched.bad:
            lines.append(f"{len(matched.bad):,} of {total:,} pairs are not used: bad records (data.pairs.on_bad is skip)")
        return [*lines, *map(str, matched.bad)]

    def _ordered(self, state: PlanState) -> Iterator[StepPlan]:
        for step in range(state.step, 1 << 62):
            drawn = [self._draws(self._pairs[pair_id], epoch, step) for epoch, pair_id in self._drawn(step)]
            parts = [drawn[start : start + self._size] for start in range(0, len(drawn), self._size)]
            batches = [[*(winner for winner, _ in part), *(loser for _, loser in part)] for part in parts]
            yield StepPlan(batches, PlanState(step + 1, epoch=(step + 1) * self._step_size // self.num_pairs))

    def replacement(self, draw: Draw, attempt: int) -> Draw:
        """What is read in place of one side of a pair that cannot be: that side of the spare pair number `attempt` (from 0).

        Pairs of the same step come last, after all others, and every rank finds the same.

        Args:
            draw: as the plan gave it; not a spare.
            attempt: how many spares could not be read either.

        Raises:
            DataError: there are no more pairs.
        """
        assert draw.pair and not draw.instead_of, f"{draw.sample_id} is a spare: ask for another one of the first draw"
        now = {pair_id for _, pair_id in self._drawn(draw.step)}
        order = generator(self.seed, "spare pair", draw.epoch, draw.pair).permutation(self.num_pairs).tolist()
        others = [self._ids[index] for index in order if self._ids[index] != draw.pair]
        spares = sorted(others, key=now.__contains__)  # stable: those of the step behind the rest
        if attempt >= len(spares):
            raise DataError(
                f"the pair {draw.pair} cannot be read, and {self._section.path} has no {'other' if attempt == 0 else 'more'} "
                f"pair to take its place ({attempt} were tried); make more pairs, or repair {draw.key}"
            )
        was_winner = draw.key == self._pairs[draw.pair].winner.key
        winner, loser = self._draws(self._pairs[spares[attempt]], draw.epoch, draw.step)
        return replace(winner if was_winner else loser, instead_of=draw.sample_id)

    def check_replaceable(self, draw: Draw, error: DataError) -> None:
        """Refuse to go on without a clip that cannot be read, where `on_bad` says so.

        Raises:
            DataError: it does.
        """
        if self._section.on_bad == "fail":
            raise DataError(
                f"{describe_pair(self._pairs[draw.pair].pair)} cannot be read: {error}. Restore its clips, or set "
                "data.pairs.on_bad to skip, and another pair takes its place"
            )

    def batch_fields(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """The fields of a `Batch` about its pairs, of the draws that were read: `pair_weights`, `pair_ties`, `frame_labels`
        where any pair has segments, `pair_axes` where any has axes, `rewards` where every pair has two overall scores."""
        winners = draws[: len(draws) // 2]
        pairs = [self._pairs[draw.pair] for draw in winners]
        fields: dict[str, Any] = {
            "pair_weights": torch.tensor([0.0 if m.pair.tie else m.pair.weight for m in pairs], dtype=torch.float32),
            "pair_ties": torch.tensor([m.pair.tie for m in pairs]),
        }
        if self._has_segments:
            rows = [frame_labels(m.pair, draw.frames, m.winner.fps) for m, draw in zip(pairs, winners, strict=True)]
            fields["frame_labels"] = torch.stack(rows)
        if self._has_axes:
            fields["pair_axes"] = [dict(m.pair.axes) for m in pairs]
        if self._has_rewards:
            sides = [*(m.pair.winner for m in pairs), *(m.pair.loser for m in pairs)]
            fields["rewards"] = torch.tensor([side.scores["overall"] for side in sides], dtype=torch.float32)
        return fields

    @property
    def _size(self) -> int:
        """Pairs of a micro-batch."""
        return self.config.micro_batch_size

    @property
    def _step_size(self) -> int:
        """Pairs of a step."""
        return self._size * self.config.num_micro_batches

    def _permuted(self, epoch: int) -> list[int]:
        """The numbers of the pairs, in the order of an epoch."""
        order: list[int] = generator(self.seed, "pairs", epoch).permutation(self.num_pairs).tolist()
        return order

    def _drawn(self, step: int) -> list[tuple[int, str]]:
        """Epoch and id of each pair of a step."""
        places = (divmod(place, self.num_pairs) for place in range(step * self._step_size, (step + 1) * self._step_size))
        return [(epoch, self._ids[self._order(epoch)[number]]) for epoch, number in places]

    def _draws(self, matched: MatchedPair, epoch: int, step: int) -> tuple[Draw, Draw]:
        """The draws of winner and loser. Where they are cut is keyed by the pair, so that both are cut alike."""
        pair_id, winner, loser = matched.pair.pair_id, matched.winner, matched.loser
        cut = self._draw(self._source, Clip(pair_id, epoch, winner.shard, winner.shape), self.config.num_frames, step)
        first = replace(cut, key=winner.key, pair=pair_id)
        return first, replace(first, key=loser.key, shard=loser.shard)

    def _refuse_bad(self, num_records: int) -> None:
        bad, path = self.matched.bad, self._section.path
        if bad and self._section.on_bad == "fail":
            more = f"; and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
            raise DataError(
                f"{len(bad):,} of the {num_records:,} records of {path} are bad: {'; '.join(map(str, bad[:_NAMED]))}{more}. "
                "Repair or remove them, or set data.pairs.on_bad to skip to train without them"
            )
        if not self.matched.pairs:
            first = f" (the first: {bad[0]})" if bad else ""
            raise DataError(
                f"{path} has no pair to train on: of {num_records:,} records {len(bad):,} are bad{first} and "
                f"{self.matched.num_ties:,} are ties, which data.pairs.ties leaves out; make more pairs"
            )


def open_plan(config: DataConfig, seed: int, fetch: Callable[[str, str, str], Path] | None = None) -> DataPlan:
    """The plan of clips or, with `data.pairs`, of pairs; see `DataPlan.open`."""
    return (PairPlan if config.pairs is not None else DataPlan).open(config, seed, fetch)


def frame_labels(pair: PreferencePair, frames: Iterable[int], fps: float) -> Tensor:
    """The label of each frame that is read, float32 `(T,)`: that of the segment in which the frame is shown; 1 for a pair that
    has no segments.

    Args:
        pair: with or without segments.
        frames: numbers of the frames in the stored clip.
        fps: stored frames a second.
    """
    if pair.segments is None:
        return torch.ones(len(list(frames)))
    labels, seconds = pair.segments.labels, pair.segments.seconds
    # A frame that begins with a segment belongs to it, also where binary fractions fall short of it.
    return torch.tensor([labels[int(frame / fps / seconds + 1e-9)] for frame in frames], dtype=torch.float32)


def _stored(dataset: Dataset, split: str, keys: set[str]) -> dict[str, StoredClip]:
    """What the indexes of a dataset say of the clips of a split with these keys."""
    found, wanted = {}, pyarrow.array(sorted(keys), pyarrow.string())
    columns = ["key", "fps", "sha256", "caption", *Shape._fields]
    for shard in np.flatnonzero(dataset.num_clips(split)).tolist():
        table = dataset.read_shard(shard, [*columns, "split"])
        named = pyarrow.compute.is_in(table["key"], value_set=wanted)
        table = table.filter(pyarrow.compute.and_(named, pyarrow.compute.equal(table["split"], split)))
        for row in table.to_pylist():
            shape = Shape(*(row[name] for name in Shape._fields))
            found[row["key"]] = StoredClip(row["key"], shard, shape, row["fps"], row["sha256"], row["caption"])
    return found


def _policy_problem(pair: PreferencePair, section: PairsConfig) -> str | None:
    """Why the policy of a pair is not one that is wanted."""
    if section.policies is None:
        return None
    for name, side in (("winner", pair.winner), ("loser", pair.loser)):
        policy = side.origin.policy if side.origin is not None else None
        if policy not in section.policies:
            made_by = f"policy {policy}" if policy is not None else "a policy that it does not name"
            return f"its {name} {side.key} was made by {made_by}, which data.pairs.policies does not list"
    return None


def _clip_problem(pair: PreferencePair, stored: Mapping[str, StoredClip], split: str, clips: str) -> str | None:
    """Why the clips of a pair are not those that were judged."""

    def problem(name: str, side: Side) -> str | None:
        clip = stored.get(side.key)
        if clip is None:
            return f"the dataset has no clip {side.key}, its {name}, in split {split!r} (the pairs are of {clips})"
        if clip.sha256 != side.sha256:
            return f"its {name} {side.key} is another file: SHA-256 expected {side.sha256}, found {clip.sha256}"
        if clip.caption != pair.prompt:
            return f"the caption of its {name} {side.key}, {clip.caption!r}, is not its prompt {pair.prompt!r}"
        return None

    return problem("winner", pair.winner) or problem("loser", pair.loser)


def _shape_problem(pair: PreferencePair, stored: Mapping[str, StoredClip], config: DataConfig) -> str | None:
    """Why the clips of a pair do not go together, cannot be cut as configured, or are longer than their labels."""
    winner, loser = stored[pair.winner.key], stored[pair.loser.key]
    if (winner.shape, winner.fps) != (loser.shape, loser.fps):
        return f"its clips have different shapes: the winner {_describe(winner)}, the loser {_describe(loser)}"
    if (reason := refusal(winner.shape, config)) is not None:
        return f"its clips cannot be used: {reason}; they have {_describe(winner)}"
    last = (winner.shape.num_frames - 1) / winner.fps
    if pair.segments is not None and last / pair.segments.seconds + 1e-9 >= len(pair.segments.labels):
        covered = pair.segments.seconds * len(pair.segments.labels)
        return f"its segments label {covered:g} seconds, and the last frame of its clips is shown at {last:g}"
    return None


def _describe(clip: StoredClip) -> str:
    return f"{clip.shape.num_frames} frames of {clip.shape.height}x{clip.shape.width} at {clip.fps:g} fps"
