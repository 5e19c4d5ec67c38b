"""The list of bad clips: what names a clip on it, and what is to be done with it once its dataset is repaired."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from videofm.data.bad_clips import BadClips
from videofm.data.reader import BadClipError, ClipRequest
from videofm.errors import DataError


def request(key: str, place: str = "web/shards/shard-0.tar", sha256: str | None = "s") -> ClipRequest:
    return ClipRequest(key, place, 0, 1, sha256, "s", 1, True, (8, 8), 1, (0, 1, 1), (8, 8), (0, 0, 8, 8))


def test_who_repaired_a_dataset_is_told_to_delete_the_list(tmp_path: Path) -> None:
    """Repaired clips have the SHA-256 of the index, as the damaged ones had, so that they stay on the list."""
    path, clips = tmp_path / "q.jsonl", [request(str(index)) for index in range(4)]
    bad = BadClips(0.0, path)
    for clip in clips[:3]:
        bad.bad(clip, BadClipError("damaged"))
    told = f"they are listed in {path}; run `videofm data verify` on the dataset, and restore its shards or curate again, "
    with pytest.raises(DataError, match=re.escape(f"{told}then delete {path}, or raise the share")):
        bad.bad(clips[3], BadClipError("damaged"))
    assert all(BadClips(0.0, path).problem(clip) for clip in clips)
    path.unlink()
    assert not any(BadClips(0.0, path).problem(clip) for clip in clips)


def test_clips_of_two_datasets_that_share_keys_are_two_clips(tmp_path: Path) -> None:
    """Also where checksums are not verified, and after a restart. What a store's address hides stays out of the list."""
    path, place = tmp_path / "q.jsonl", "https://me:secret@host/web/shard-0.tar?key=secret"
    bad = BadClips(0.0, path)
    bad.bad(request("a", place, None), BadClipError("damaged"))
    bad.bad(request("b"), BadClipError("damaged"))
    for known in (bad, BadClips(0.0, path)):
        assert known.problem(request("a", place, None)) and known.problem(request("b", "moved/shard-0.tar"))
        assert known.problem(request("a", "own/shard-0.tar", None)) is None
        assert known.problem(request("b", sha256="other")) is None
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["sha256"], second["sha256"]) == (None, "s") and "secret" not in path.read_text()


def test_rows_of_an_earlier_version_that_name_no_shard_blame_nobody(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"key": "a", "sha256": null, "reason": "damaged"}\n')
    assert BadClips(0.0, tmp_path / "q.jsonl").problem(request("a", sha256=None)) is None
