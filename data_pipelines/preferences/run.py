"""Stage `dpo_import`: preferences of others become a dataset of clips, and preferences that name them.

```
shards/ index/ manifest/   the clips: a key is a hash of prompt and file, so that a video that many pairs name is stored once
preferences/               the pairs, see videofm/data/preferences.py
bad.jsonl                  every record that was not taken, with its place and the reason
evaluation.json            the numbers
```
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipelines.preferences.folders import read_chosen_rejected, read_folder_pairs
from data_pipelines.preferences.lists import read_jsonl, read_video_reward, read_videodpo
from data_pipelines.preferences.records import BadRecord, ForeignPair, Found
from data_pipelines.preferences.videos import Video, VideoReader
from videofm.config.base import result_fields
from videofm.config.import_pairs import ImportPairsConfig
from videofm.data.manifest import Manifest, entry_path
from videofm.data.pair_weights import rarity_weights
from videofm.data.preferences import PreferencePair, Side, pair_problem, write_preferences
from videofm.data.shards import ShardWriter
from videofm.errors import DataError, Interrupted
from videofm.progress import LOG, progress
from videofm.run_dir import RunDirectory, write_atomic, write_json

READERS: dict[str, Callable[..., Found]] = {
    "videodpo": read_videodpo,
    "video_reward": read_video_reward,
    "folder_pairs": read_folder_pairs,
    "chosen_rejected": read_chosen_rejected,
    "jsonl": read_jsonl,
}
"""Kind of a format -> reader(section, source, folder of videos, generator)."""
_CODE_VERSION = 1
_SHOWN = 5


def run(config: ImportPairsConfig, run: RunDirectory) -> dict[str, Any]:
    """Read, decode, store.

    Returns:
        `preferences`, `counts` and `problems` (reason -> records).

    Raises:
        DataError: the list is missing or of another format, a record is bad where `on_bad` is `fail`, or no pair is left.
        Interrupted: stopped on request; what was decoded is not decoded again.
    """
    listed = list(read_pairs(config))
    bad = [record for record in listed if isinstance(record, BadRecord)]
    _report(bad, config, run)
    pairs = [record for record in listed if isinstance(record, ForeignPair)]
    videos = _read_videos(pairs, config, run)
    taken, unfit = resolve(pairs, videos)
    bad += unfit
    _report(bad, config, run)
    if not taken:
        raise DataError(
            f"no pair is left of {len(listed)} records of {config.source} ({_told(_reasons(bad))}); "
            f"see {run.path / 'bad.jsonl'}"
        )
    weighed = weigh(list(taken.values()), config)
    clips = _clips_of(pairs, taken, videos)
    _write_shards(clips, config, run)
    counts = {
        "records": len(listed),
        "pairs": sum(not pair.tie for pair in weighed),
        "ties": sum(pair.tie for pair in weighed),
        "bad": len(bad),
        "videos": len(videos),
        "clips": len(clips),
    }
    results = {"counts": counts, "problems": _reasons(bad)}
    facts = {"imported": config.format.model_dump(mode="json"), **results}
    write_preferences(run.path / "preferences", weighed, run.path, facts)
    write_json(run.path / "evaluation.json", {"metrics": [{"kind": "dpo_import", "of": config.source, **results}]})
    shutil.rmtree(run.path / "work")
    LOG.info("%s", _told(counts))
    return {"preferences": str(run.path / "preferences"), **results}


def read_pairs(config: ImportPairsConfig) -> Found:
    """The records of the list, in its order; no video is opened."""
    source = Path(config.source)
    videos = source if config.videos is None else Path(config.videos)
    return READERS[config.format.kind](config.format, source, videos, config.generator)


def resolve(pairs: Sequence[ForeignPair], videos: Mapping[Path, Video]) -> tuple[dict[str, PreferencePair], list[BadRecord]]:
    """Place in the list -> the pair with keys and hashes of ours; and the records that make none."""
    taken: dict[str, PreferencePair] = {}
    bad: list[BadRecord] = []
    named: dict[str, str] = {}  # pair_id -> place
    judged: dict[frozenset[str], str] = {}  # the two keys -> place
    for foreign in pairs:
        pair = _with_keys(foreign, videos)
        problem = _video_problem(foreign, videos) or _told_problem(pair)
        sides = frozenset((pair.winner.key, pair.loser.key))
        if problem is None and sides in judged:
            other = taken[judged[sides]]
            agrees = (other.winner.key, other.tie) == (pair.winner.key, pair.tie)
            reason = "listed twice" if agrees else "contradictory votes"
            problem = reason, f"{judged[sides]} is about the same two videos{'' if agrees else ' and says otherwise'}"
        if problem is None and pair.pair_id in named:
            problem = "listed twice", f"{named[pair.pair_id]} has the pair_id {pair.pair_id!r}, too"
        if problem is not None:
            bad.append(BadRecord(foreign.where, *problem))
            continue
        taken[foreign.where], named[pair.pair_id], judged[sides] = pair, foreign.where, foreign.where
    return taken, bad


def weigh(pairs: list[PreferencePair], config: ImportPairsConfig) -> list[PreferencePair]:
    """The pairs with weights by how rare their difference of scores is, where the config asks for them."""
    if not config.rarity_alpha:
        return pairs
    scored = [
        n for n, pair in enumerate(pairs) if not pair.tie and all("overall" in s.scores for s in (pair.winner, pair.loser))
    ]
    if not scored:
        raise DataError("rarity_alpha weighs pairs by their overall scores, and no pair of the list has any; set it to 0.")
    differences = [pairs[n].winner.scores["overall"] - pairs[n].loser.scores["overall"] for n in scored]
    weights = rarity_weights(differences, config.rarity_alpha, config.rarity_bins)
    weighed = list(pairs)
    for n, weight in zip(scored, weights, strict=True):
        weighed[n] = replace(weighed[n], weight=weight)
    return weighed


def clip_key(prompt: str, sha256: str) -> str:
    """The key of a clip: a function of its prompt and its file alone."""
    return hashlib.sha256(f"{prompt}\0{sha256}".encode()).hexdigest()[:32]


def _with_keys(foreign: ForeignPair, videos: Mapping[Path, Video]) -> PreferencePair:
    """The pair with our keys. Of a video that cannot be used the key is empty."""
    pair = foreign.pair

    def side(listed: Side, file: Path) -> Side:
        video = videos[file]
        key = "" if video.problem else clip_key(pair.prompt, video.stored_sha256)
        return replace(listed, key=key, sha256=video.stored_sha256)

    winner, loser = side(pair.winner, foreign.winner), side(pair.loser, foreign.loser)
    return replace(pair, pair_id=pair.pair_id or f"{winner.key}_{loser.key}", winner=winner, loser=loser)


def _video_problem(foreign: ForeignPair, videos: Mapping[Path, Video]) -> tuple[str, str] | None:
    """What is wrong with the files of a pair: reason and detail."""
    both = [videos[file] for file in (foreign.winner, foreign.loser)]
    for video, listed in zip(both, (foreign.pair.winner, foreign.pair.loser), strict=True):
        if video.problem:
            reason, _, detail = video.problem.partition(": ")
            return f"video: {reason}", f"{video.file}: {detail}"
        if listed.sha256 and listed.sha256 != video.sha256:
            return "checksum", f"the SHA-256 of {video.file} is {video.sha256}, the list says {listed.sha256}"
    if both[0].sha256 == both[1].sha256:
        return "identical", f"{both[0].file} and {both[1].file} are the same video"
    if both[0].shape != both[1].shape:
        shapes = " and ".join(f"{v.num_frames} frames of {v.height}x{v.width} at {v.fps:g} fps" for v in both)
        return "different shape", f"its videos are {shapes}; `transcode` gives them one size and rate"
    return None


def _told_problem(pair: PreferencePair) -> tuple[str, str] | None:
    """What is wrong with what a record says."""
    problem = pair_problem(pair)
    return None if problem is None else ("contradictory" if problem.startswith("contradictory") else "not a pair", problem)


def _report(bad: Sequence[BadRecord], config: ImportPairsConfig, run: RunDirectory) -> None:
    """Write down every bad record.

    Raises:
        DataError: there are some, and they stop the stage.
    """
    rows = [{"where": record.where, "reason": record.reason, "detail": record.detail} for record in bad]
    write_atomic(run.path / "bad.jsonl", "".join(f"{json.dumps(row, sort_keys=True)}\n" for row in rows))
    if bad and config.on_bad == "fail":
        shown = "\n".join(f"  {record}" for record in bad[:_SHOWN])
        raise DataError(
            f"{len(bad)} bad records in {config.source} ({_told(_reasons(bad))}); the first:\n{shown}\n"
            f"all are in {run.path / 'bad.jsonl'}. Mend them, or leave them out with on_bad: skip"
        )


def _read_videos(pairs: Sequence[ForeignPair], config: ImportPairsConfig, run: RunDirectory) -> dict[Path, Video]:
    """What is known of every file that pairs name, each decoded once."""
    files = list(dict.fromkeys(file for pair in pairs for file in (pair.winner, pair.loser)))
    with progress("videos of pairs", len(files)) as bar:
        videos = VideoReader(config, run.path / "work", lambda: run.stop_requested).read(files, bar.advance)
    if len(videos) < len(files):
        raise Interrupted(f"importing stopped on request with {len(videos)} of {len(files)} videos read")
    return videos


def _clips_of(
    pairs: Iterable[ForeignPair], taken: Mapping[str, PreferencePair], videos: Mapping[Path, Video]
) -> dict[str, tuple[str, Video, dict[str, Any]]]:
    """Key -> prompt, video and metadata of each clip that a pair names, by key."""
    found: dict[str, tuple[str, Video, dict[str, Any]]] = {}
    for foreign in pairs:
        if foreign.where in taken:
            pair = taken[foreign.where]
            for side, listed, file in (
                (pair.winner, foreign.pair.winner, foreign.winner),
                (pair.loser, foreign.pair.loser, foreign.loser),
            ):
                origin = None if side.origin is None else vars(side.origin)
                found.setdefault(side.key, (pair.prompt, videos[file], {"origin": origin, "file": listed.key}))
    return dict(sorted(found.items()))


def _write_shards(clips: Mapping[str, tuple[str, Video, dict[str, Any]]], config: ImportPairsConfig, run: RunDirectory) -> None:
    """Store the clips; a shard that an earlier attempt committed stays.

    Raises:
        DataError: a video changed since it was decoded, or the shards that are there are not those of the list.
    """
    settings = {"code": _CODE_VERSION, "config": result_fields(config)}
    config_hash = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if config.transcode is None:
        config_hash = f"foreign:{config_hash}"  # not in our canonical form: not every decoder may read them
    keys = list(clips)
    for number, start in enumerate(range(0, len(keys), config.clips_a_shard)):
        if run.stop_requested:
            raise Interrupted(f"importing stopped on request with {start} of {len(keys)} clips stored")
        group = f"{number:05d}"
        if entry_path(run.path, group).exists():
            continue
        with ShardWriter(run.path, group, config_hash) as writer:
            for key in keys[start : start + config.clips_a_shard]:
                prompt, video, metadata = clips[key]
                prompt_id = hashlib.sha256(prompt.encode()).hexdigest()[:16]
                writer.add(
                    key, _content(video), num_frames=video.num_frames, fps=video.fps, height=video.height, width=video.width,
                    caption=prompt, source_id=prompt_id, split="train", metadata=metadata,
                )  # fmt: skip
            writer.commit()
    if [record.key for record in Manifest.load(run.path).records("train")] != keys:
        raise DataError(f"the shards in {run.path} are not those of {config.source} as it is now; import into another folder")


def _content(video: Video) -> bytes:
    """The bytes of a clip.

    Raises:
        DataError: they are not those that were decoded.
    """
    content = Path(video.stored).read_bytes()
    if hashlib.sha256(content).hexdigest() != video.stored_sha256:
        raise DataError(f"{video.stored} changed while it was imported; import again when it is complete")
    return content


def _reasons(bad: Iterable[BadRecord]) -> dict[str, int]:
    return dict(sorted(Counter(record.reason for record in bad).items()))


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "none"
