"""Votes to preferences: one record a pair, with every vote on it.

The candidate that more than half of the votes on a pair name wins; a tie and `both bad` are votes for neither. Where nobody has
more than half, the pair is a tie, unless votes name both candidates: then it is contradictory. So is a pair whose winner loses
on all axes that were voted on. Axes are decided in the same way, each by its own votes; one on which the votes contradict each
other is left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from videofm.annotate.queue import CandidatePair, Pool
from videofm.annotate.store import Store, Vote
from videofm.data.candidates import Candidate
from videofm.data.preferences import PreferencePair, Side, pair_problem, write_preferences
from videofm.errors import DataError

OnContradiction = Literal["fail", "skip", "tie"]
SOURCE = "votes of people (videofm dpo annotate)"


@dataclass
class Report:
    """What became of the pool. `contradictions`: a line for each contradictory pair."""

    num_pairs: int = 0
    num_ties: int = 0
    num_both_bad: int = 0
    num_without_votes: int = 0
    num_votes: int = 0
    num_skips: int = 0
    num_axes_left_out: int = 0
    contradictions: list[str] = field(default_factory=list)

    def as_text(self, on_contradiction: OnContradiction) -> str:
        """For people."""
        became = {"skip": "left out", "tie": "written as ties", "fail": ""}[on_contradiction]
        lines = [
            f"{self.num_pairs} pairs of {self.num_votes} votes: {self.num_pairs - self.num_ties} with a winner, "
            f"{self.num_ties} ties ({self.num_both_bad} of them both bad)",
            f"{self.num_without_votes} pairs have no vote; {self.num_skips} votes were skips",
        ]
        if self.num_axes_left_out:
            lines.append(f"{self.num_axes_left_out} axes of pairs left out: their votes contradict each other")
        if self.contradictions:
            lines.append(f"{len(self.contradictions)} contradictory pairs {became}:")
            lines += [f"  {line}" for line in self.contradictions]
        return "\n".join(lines)


def export(
    folder: str | Path, candidates: Path, pool: Pool, store: Store, on_contradiction: OnContradiction = "fail"
) -> Report:
    """Write the votes of `store` as preferences into `folder`.

    Raises:
        DataError: there is no vote, or votes on a pair contradict each other and `on_contradiction` is "fail"; all of these
            pairs are named, and nothing is written.
    """
    votes, settings = store.votes(), store.settings
    report = Report(num_votes=sum(vote.choice != "skip" for vote in votes), num_skips=sum(v.choice == "skip" for v in votes))
    if not report.num_votes:
        raise DataError(f"{store.path} holds no vote besides {report.num_skips} skips; there is nothing to export")
    by_pair: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes:
        if vote.choice != "skip":
            by_pair[vote.pair_id].append(vote)
    records = [
        found
        for pair in sorted(pool.pairs, key=lambda pair: pair.pair_id)
        if (found := _record(pair, by_pair[pair.pair_id], report, on_contradiction)) is not None
    ]
    if report.contradictions and on_contradiction == "fail":
        listed = "\n  ".join(report.contradictions)
        raise DataError(
            f"the votes on {len(report.contradictions)} pairs contradict each other; decide with --on-contradiction skip or "
            f"tie, or let more annotators vote:\n  {listed}"
        )
    report.num_pairs, report.num_ties = len(records), sum(record.tie for record in records)
    facts = {
        "annotation": {
            "settings": asdict(settings),
            "annotators": store.annotators(),
            "on_contradiction": on_contradiction,
            "report": asdict(report),
        }
    }
    write_preferences(folder, records, candidates, facts)
    return report


def decided(answers: Iterable[str]) -> str | None:
    """What several answers say together: "first" or "second" where more than half do, else "tie"; None where they contradict
    each other."""
    counts = Counter(answers)
    total = sum(counts.values())
    for side in ("first", "second"):
        if 2 * counts[side] > total:
            return side
    return None if counts["first"] and counts["second"] else "tie"


def _record(
    pair: CandidatePair, votes: Sequence[Vote], report: Report, on_contradiction: OnContradiction
) -> PreferencePair | None:
    """The record of a pair; None where it gives none, which is counted."""
    if not votes:
        report.num_without_votes += 1
        return None
    outcome = decided(vote.choice for vote in votes)
    axes, num_left_out = _axes(votes)
    report.num_axes_left_out += num_left_out
    record = _built(pair, outcome or "tie", axes, votes)
    problem = None if outcome is not None else f"its votes name both candidates: {_counted(votes)}"
    problem = problem or pair_problem(record)
    if problem is not None:
        report.contradictions.append(f"{pair.pair_id} ({pair.prompt!r}): {problem}")
        if on_contradiction != "tie":
            return None
        record = _built(pair, "tie", axes, votes)
    report.num_both_bad += record.tie and all(vote.choice == "both_bad" for vote in votes)
    return record


def _axes(votes: Sequence[Vote]) -> tuple[dict[str, str], int]:
    """Axis -> what its votes say together, and how many axes contradict themselves."""
    said: dict[str, list[str]] = defaultdict(list)
    for vote in votes:
        for axis, answer in vote.axes.items():
            said[axis].append(answer)
    outcomes = {axis: decided(answers) for axis, answers in sorted(said.items())}
    return {axis: outcome for axis, outcome in outcomes.items() if outcome is not None}, list(outcomes.values()).count(None)


def _built(pair: CandidatePair, outcome: str, axes: dict[str, str], votes: Sequence[Vote]) -> PreferencePair:
    """The record of a pair with this outcome; in a tie the first candidate stands for the winner."""
    better = "second" if outcome == "second" else "first"
    words = {"first": "winner", "second": "loser"} if better == "first" else {"first": "loser", "second": "winner"}
    sides = [_side(pair.first), _side(pair.second)]
    winner, loser = sides if better == "first" else sides[::-1]
    return PreferencePair(
        pair_id=pair.pair_id,
        prompt=pair.prompt,
        winner=winner,
        loser=loser,
        tie=outcome == "tie",
        axes={axis: words.get(answer, answer) for axis, answer in axes.items()},
        source=SOURCE,
        votes=tuple(_vote(vote, words) for vote in votes),
    )


def _vote(vote: Vote, words: dict[str, str]) -> dict[str, Any]:
    """A vote as others read it: of winner and loser, with who was on the left."""
    return {
        "annotator": vote.annotator,
        "choice": words.get(vote.choice, vote.choice),
        "axes": {axis: words.get(answer, answer) for axis, answer in sorted(vote.axes.items())},
        "left": words[vote.left],
        "shown": _time(vote.opened),
        "voted": _time(vote.voted),
        "id": vote.client_id,
    }


def _side(candidate: Candidate) -> Side:
    # No scores: those of the dataset are not what people judged, and may disagree with them.
    return Side(candidate.key, candidate.record.sha256, {}, candidate.origin)


def _counted(votes: Sequence[Vote]) -> str:
    counts = Counter(vote.choice for vote in votes)
    return ", ".join(f"{counts[choice]} {choice.replace('_', ' ')}" for choice in sorted(counts))


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
