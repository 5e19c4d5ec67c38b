"""Candidates: the videos that were made of one prompt, as clips of an ordinary dataset, each with where it came from.

What `videofm dpo generate` knows of a candidate stands in the `metadata` of its KEY.json: `{"origin": {generator, policy, seed,
sampler}}`. Any other dataset serves too; its clips then have no origin.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from videofm.data.index import ClipRecord
from videofm.data.manifest import Manifest
from videofm.data.preferences import Origin
from videofm.data.tar import scan_tar
from videofm.errors import DataError


@dataclass(frozen=True)
class Candidate:
    """A clip that was made of a prompt. `origin` is None where nothing is known of it."""

    record: ClipRecord
    origin: Origin | None

    @property
    def key(self) -> str:
        """Its name in the dataset."""
        return self.record.key

    @property
    def prompt(self) -> str:
        """The text that it was made of: its caption."""
        return self.record.caption


def read_candidates(manifest: Manifest, split: str = "train") -> list[Candidate]:
    """The clips of a split with their origins, by key; no video is read.

    Raises:
        DataError: a shard is damaged, or an origin is not one.
    """
    found = []
    for name, records in _by_shard(manifest.records(split)).items():
        described = _described(manifest.folder / name, {f"{record.key}.json" for record in records})
        for record in records:
            value = described.get(f"{record.key}.json", {})
            found.append(Candidate(record, _origin(value.get("origin"), record.key)))
    return sorted(found, key=lambda candidate: candidate.key)


def by_prompt(candidates: Iterable[Candidate]) -> dict[tuple[str, str], list[Candidate]]:
    """(Prompt, SHA-256 of the clip that it was begun from, or "") -> its candidates, both in the order of the keys.

    Candidates that were begun from clips share the motion of theirs; two that were begun from different ones are no pair.
    """
    prompts: dict[tuple[str, str], list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.key):
        clip = (candidate.origin.sampler if candidate.origin else {}).get("from_clip") or {}
        prompts.setdefault((candidate.prompt, str(clip.get("sha256", ""))), []).append(candidate)
    return prompts


def _by_shard(records: Iterable[ClipRecord]) -> dict[str, list[ClipRecord]]:
    shards: dict[str, list[ClipRecord]] = {}
    for record in records:
        shards.setdefault(record.shard, []).append(record)
    return shards


def _described(path: Path, names: set[str]) -> dict[str, dict[str, Any]]:
    """Name of a member -> what its JSON says, for the `names` that the tar has."""
    found = {}
    members = [member for member in scan_tar(path).members if member.name in names]
    with path.open("rb") as file:
        for member in members:
            try:
                value = json.loads(os.pread(file.fileno(), member.size, member.offset))
            except ValueError as error:
                raise DataError(f"{path}: {member.name} is no JSON ({error}); make the shard again") from None
            found[member.name] = value if isinstance(value, dict) else {}
    return found


def _origin(value: Any, key: str) -> Origin | None:
    """The origin of a clip as it was written; None where it has none."""
    if value is None:
        return None
    names = {field.name for field in fields(Origin)}
    if not isinstance(value, dict) or set(value) != names:
        said = ", ".join(sorted(value)) if isinstance(value, dict) else repr(value)
        raise DataError(f"clip {key}: its origin has {said}, and {', '.join(sorted(names))} are wanted; make it again")
    return Origin(**value)
