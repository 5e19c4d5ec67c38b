"""Copying a finished dataset to a folder elsewhere. A shard exists there once its manifest entry does, as it does here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from videofm.data import storage
from videofm.data.manifest import entry_path, read_entry
from videofm.errors import DataError

CLAIM = "curation.json"
"""Says which dataset a place belongs to, before the first shard is copied: of two curations one wins."""


def claim(output: str, manifest_hash: str) -> None:
    """Make the place ours. The hash of a config is not enough: two curations of other videos may have the same.

    Raises:
        DataError: it belongs to another dataset.
    """
    place = storage.join(output, CLAIM)
    if storage.put_new(place, json.dumps({"manifest_hash": manifest_hash}).encode()):
        return
    try:
        found = str(json.loads(storage.read_bytes(place))["manifest_hash"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{storage.redacted(place)} is no claim of a curation; set `output` to another place") from None
    if found != manifest_hash:
        raise DataError(
            f"{storage.redacted(output)} holds another dataset (manifest hash {found[:12]}, this one has "
            f"{manifest_hash[:12]}); set `output` to another place"
        )


def upload(folder: str, output: str, groups: Sequence[str]) -> None:
    """Copy the shards of `groups`: tar and index first, then the manifest entry if there is none. Copies of an earlier,
    interrupted call are written again with the same bytes.

    Raises:
        DataError: another shard of that name was committed there.
        TransientError: the store did not answer, after retries.
    """
    for group in groups:
        path = entry_path(Path(folder), group)
        place = storage.join(output, f"manifest/{path.name}")
        content = path.read_bytes()
        if not storage.exists(place):
            entry = read_entry(Path(folder), group)
            for name in (entry.tar, entry.index):
                storage.put_file(Path(folder) / name, storage.join(output, name))
            if storage.put_new(place, content):
                continue
        if storage.read_bytes(place) != content:
            raise DataError(f"{storage.redacted(place)} is the entry of another shard; set `output` to another place")
