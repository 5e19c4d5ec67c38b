"""Stage `dpo_rank`: score the candidates of each prompt, and write which of two is better.

```
scores.jsonl               every candidate by key: its scores, or the problem that it has
preferences/               pairs of candidates, see videofm/data/preferences.py
winners_vs_losers.png      some pairs
evaluation.json            what the report shows
```
Scores are pure: those of a run that was stopped are kept in `scores.partial.jsonl`, and the next attempt goes on from there.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from videofm import media
from videofm.config.rank import RankConfig
from videofm.data import decode
from videofm.data.candidates import Candidate, by_prompt, read_candidates
from videofm.data.manifest import Manifest
from videofm.data.preferences import write_preferences
from videofm.data.ranking import OVERALL, Ranking, Scored, rank
from videofm.data.shards import read_clip
from videofm.errors import ConfigError, DataError, Interrupted
from videofm.progress import LOG, progress
from videofm.reward import Reward, reward_of
from videofm.run_dir import RunDirectory, read_jsonl, write_atomic, write_json

SHEET = "winners_vs_losers.png"
_PAIRS_ON_SHEET = 12
_MOST_TOLD = 20
"""Bad candidates that the log names one by one."""
_PARTIAL = "scores.partial.jsonl"


def run(config: RankConfig, run: RunDirectory) -> dict[str, Any]:
    """Score, rank, write.

    Returns:
        the numbers of evaluation.json: counts of prompts, candidates, pairs and ties, why others were left out, mean scores by
        axis, and how often the axes agree with the winner.

    Raises:
        DataError: no candidates, a bad one where `on_bad` is `fail`, or no pair is left.
        ConfigError: `require_axes` names an axis that the reward does not give.
        Interrupted: stopped on request; what was scored is kept.
    """
    manifest = Manifest.load(config.manifest)
    candidates = read_candidates(manifest)
    if not candidates:
        raise DataError(f"{config.manifest} has no clip in split 'train': give the run directory of `videofm dpo generate`.")
    rows = _Scorer(config, run, manifest).rows(candidates)
    groups = [[Scored(one, rows[one.key]["scores"]) for one in group if "scores" in rows[one.key]]
              for group in by_prompt(candidates).values()]  # fmt: skip
    ranking = rank(groups, config)
    if not ranking.pairs:
        raise DataError(
            f"no pair is left of {len(candidates)} candidates of {len(groups)} prompts ({_told(ranking.left_out)}): generate "
            "more candidates a prompt, or relax require_axes."
        )
    numbers = summary(config, rows, groups, ranking)
    write_atomic(run.path / "scores.jsonl", "".join(f"{json.dumps(row, sort_keys=True)}\n" for row in rows.values()))
    reward = config.reward.model_dump(mode="json")
    write_preferences(run.path / "preferences", ranking.pairs, config.manifest, {"reward": reward, "counts": numbers["counts"]})
    _write_sheet(ranking, manifest, candidates, run.path / SHEET)
    write_json(
        run.path / "evaluation.json", {"metrics": [{"kind": "dpo_rank", "of": config.manifest, "sheet": SHEET, **numbers}]}
    )
    (run.path / _PARTIAL).unlink(missing_ok=True)  # last: an attempt that ends before goes on from it
    LOG.info("%s", _told(numbers["counts"]))
    return {"preferences": str(run.path / "preferences"), **numbers}


def summary(
    config: RankConfig, rows: dict[str, dict[str, Any]], groups: Sequence[Sequence[Scored]], ranking: Ranking
) -> dict[str, Any]:
    """The numbers of a ranking; nothing that was left out is missing in them.

    Returns:
        `counts`; `left_out` (reason -> pairs, or prompts); `problems` (reason -> candidates); `mean_by_place` (mean overall
        score of the best of each prompt, the second best, ...; of prompts that have as many); `rows`, one for each axis: its
        mean over candidates, winners and losers, and in how many decided pairs it speaks for the winner, the loser, neither.
    """
    scored = [one for group in groups for one in group]
    decided = ranking.decided
    axes = list(dict.fromkeys(axis for one in scored for axis in one.scores))
    places = [sorted((one.overall for one in group), reverse=True) for group in groups]
    counts = {
        "prompts": len(groups),
        "candidates": len(rows),
        "scored": len(scored),
        "pairs": len(decided),
        "ties": len(ranking.pairs) - len(decided),
    }
    return {
        "counts": counts,
        "left_out": {reason: count for reason, count in sorted(ranking.left_out.items()) if count},
        "problems": dict(
            sorted(Counter(row["problem"].partition(":")[0] for row in rows.values() if "problem" in row).items())
        ),
        "mean_by_place": [
            _mean([scores[place] for scores in places if len(scores) > place]) for place in range(max(map(len, places)))
        ],
        "rows": [_axis_row(axis, scored, ranking) for axis in axes],
    }


def _axis_row(axis: str, scored: Sequence[Scored], ranking: Ranking) -> dict[str, Any]:
    decided = ranking.decided
    says = Counter(pair.axes[axis] for pair in decided if axis in pair.axes)
    said = {} if axis == OVERALL else {f"{side}_better": says[side] for side in ("winner", "loser")} | {"equal": says["tie"]}
    return {
        "axis": axis,
        "mean": _mean([one.scores[axis] for one in scored if axis in one.scores]),
        "mean_of_winners": _mean([pair.winner.scores[axis] for pair in decided if axis in pair.winner.scores]),
        "mean_of_losers": _mean([pair.loser.scores[axis] for pair in decided if axis in pair.loser.scores]),
        **said,
    }


class _Scorer:
    """Scores candidates in batches, and keeps what is done."""

    def __init__(self, config: RankConfig, run: RunDirectory, manifest: Manifest) -> None:
        self.config, self.run, self.manifest = config, run, manifest
        self._partial = run.path / _PARTIAL
        self._decoder = _decoder(manifest)
        self._num_bad = 0

    def rows(self, candidates: Sequence[Candidate]) -> dict[str, dict[str, Any]]:
        """Key -> a row with `scores`, or with the `problem` of a candidate, in the order of `candidates`.

        Raises:
            DataError: a candidate is bad and `on_bad` is `fail`.
            Interrupted: stopped on request.
        """
        done = self._kept({candidate.key: candidate.record.sha256 for candidate in candidates})
        seen: dict[tuple[str, str], str] = {}  # of a prompt, by content -> the first that has it
        todo = []
        for candidate in candidates:
            first = seen.setdefault((candidate.prompt, candidate.record.sha256), candidate.key)
            if first != candidate.key:
                done[candidate.key] = self._bad(
                    candidate, f"same file: it is the file of {first}, another candidate of its prompt"
                )
            elif candidate.key not in done:
                todo.append(candidate)
        if todo:
            reward = reward_of(self.config.reward)
            with progress("candidates", len(candidates)) as bar, self._partial.open("a", encoding="utf-8") as file:
                bar.start_at(len(candidates) - len(todo))
                for batch in _batches(todo, self.config.batch_size):
                    if self.run.stop_requested:
                        raise Interrupted(f"ranking stopped on request with {len(done)} of {len(candidates)} candidates scored")
                    rows = list(self._score(batch, reward))
                    file.write("".join(f"{json.dumps(row)}\n" for row in rows))
                    file.flush()
                    done |= {row["key"]: row for row in rows}
                    bar.advance(len(batch))
        return {candidate.key: done[candidate.key] for candidate in candidates}

    def _kept(self, hashes: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Rows of an earlier attempt, of files that are still the same; a last line that was cut goes."""
        rows = [row for row in read_jsonl(self._partial) if hashes.get(row["key"]) == row["sha256"]]
        if rows:
            write_atomic(self._partial, "".join(f"{json.dumps(row)}\n" for row in rows))
        else:
            self._partial.unlink(missing_ok=True)
        return {row["key"]: row for row in rows}

    def _score(self, batch: Sequence[Candidate], reward: Reward) -> Iterator[dict[str, Any]]:
        """A row for each; what does not decode, or cannot be judged, has a problem."""
        videos: list[tuple[Candidate, media.Frames]] = []
        for candidate in batch:
            try:
                videos.append((candidate, _frames(self.manifest, candidate, self._decoder)))
            except DataError as error:
                yield self._bad(candidate, f"does not decode: {error}")
        try:
            scores = _scores(reward, videos)
        except DataError:  # somebody's fault: ask one by one
            for one in videos:
                try:
                    yield self._row(one[0], _scores(reward, [one])[0])
                except DataError as error:
                    yield self._bad(one[0], f"cannot be judged: {error}")
            return
        for (candidate, _), found in zip(videos, scores, strict=True):
            yield self._row(candidate, found)

    def _row(self, candidate: Candidate, scores: dict[str, float]) -> dict[str, Any]:
        wrong = [axis for axis, score in scores.items() if not math.isfinite(score)]
        if wrong:
            return self._bad(candidate, f"score not finite: {', '.join(wrong)}")
        return {"key": candidate.key, "prompt": candidate.prompt, "sha256": candidate.record.sha256, "scores": scores}

    def _bad(self, candidate: Candidate, problem: str) -> dict[str, Any]:
        """A row that says what is wrong.

        Raises:
            DataError: bad candidates stop the stage.
        """
        if self.config.on_bad == "fail":
            raise DataError(
                f"candidate {candidate.key} of {self.config.manifest} ({candidate.prompt!r}): {problem}. Make it again, or "
                "leave such candidates out with on_bad: skip."
            )
        self._num_bad += 1
        if self._num_bad <= _MOST_TOLD:
            more = ", and so on: scores.jsonl has all" if self._num_bad == _MOST_TOLD else ""
            LOG.warning("candidate %s is left out: %s%s", candidate.key, problem, more)
        return {"key": candidate.key, "prompt": candidate.prompt, "sha256": candidate.record.sha256, "problem": problem}


def _scores(reward: Reward, videos: Sequence[tuple[Candidate, media.Frames]]) -> list[dict[str, float]]:
    if not videos:
        return []
    found = reward.score([frames for _, frames in videos], [candidate.prompt for candidate, _ in videos])
    if len(found) != len(videos) or any(OVERALL not in scores for scores in found):
        raise ConfigError(f"a reward gives one dict of scores a video, each with {OVERALL!r}; this one gave {found}")
    return [{axis: float(score) for axis, score in scores.items()} for scores in found]


def _batches(items: Sequence[Candidate], size: int) -> Iterator[Sequence[Candidate]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _decoder(manifest: Manifest) -> decode.Decoder:
    return decode.choose("auto", canonical=not str(manifest.table["config_hash"][0].as_py()).startswith("foreign:"))


def _frames(manifest: Manifest, candidate: Candidate, decoder: decode.Decoder) -> media.Frames:
    """All frames of a candidate, `(T, H, W, 3)`."""
    record = candidate.record
    return decoder.read(read_clip(manifest.folder, record), range(record.num_frames))


def _write_sheet(ranking: Ranking, manifest: Manifest, candidates: Sequence[Candidate], path: Path) -> None:
    """Winners above losers, of as many prompts as fit; ties where no pair was decided."""
    by_key = {candidate.key: candidate for candidate in candidates}
    pairs = ranking.decided or ranking.pairs
    first = {pair.prompt: pair for pair in reversed(pairs)}  # of each prompt its first pair, and then the rest
    shown = sorted(pairs, key=lambda pair: pair is not first[pair.prompt])[:_PAIRS_ON_SHEET]
    decoder = _decoder(manifest)
    stacks = [[_frames(manifest, by_key[side.key], decoder) for side in (pair.winner, pair.loser)] for pair in shown]
    media.stacked_sheet(stacks, [pair.prompt for pair in shown], path)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _told(counts: dict[str, int] | Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "none"
