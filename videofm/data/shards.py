"""Shards of clips: what curation writes and training reads.

```
shards/shard-00003.tar        webdataset: KEY.json, KEY.mp4, KEY.txt for each clip, sorted; KEY matches [A-Za-z0-9_-]+
index/shard-00003.parquet     one row a clip: where its mp4 lies in the tar, its SHA-256, size, frames, caption, split, scores
manifest/shard-00003.json     the commit point: names, sizes and SHA-256 of the two, counts, config hash, source ids
```

A shard exists when its manifest entry does; readers look nowhere else. The bytes of a tar depend on the clips alone (mtime 0,
uid and gid 0, mode 0644, ustar), so that a second run writes the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from videofm.data.files import HashingFile, lock
from videofm.data.index import ClipRecord, write_index
from videofm.data.manifest import SPLITS, VERSION, Entry, count_splits, entry_path, publish, read_entry
from videofm.errors import DataError
from videofm.files import sync

KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")


class ShardWriter:
    """Writes one shard. Nothing is visible to readers before `commit`; leaving the context without it removes what was written.

    Args:
        folder: the dataset's folder.
        group: name of the group, part of the file names.
        config_hash: identifies the pipeline and its parameters; all shards of a dataset share one.
    """

    def __init__(self, folder: Path, group: str, config_hash: str) -> None:
        self.folder, self.group, self.config_hash = Path(folder), group, config_hash
        self.tar, self.index = f"shards/shard-{group}.tar", f"index/shard-{group}.parquet"
        for name in ("shards", "index", "manifest"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._records: list[ClipRecord] = []
        self._suffix = f".tmp-{os.getpid()}-{os.urandom(4).hex()}"
        self._file = HashingFile((self.folder / (self.tar + self._suffix)).open("wb"))
        self._archive = tarfile.TarFile(fileobj=cast(IO[bytes], self._file), mode="w", format=tarfile.USTAR_FORMAT)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._discard()

    def add(
        self,
        key: str,
        video: bytes,
        *,
        num_frames: int,
        fps: float,
        height: int,
        width: int,
        caption: str,
        source_id: str,
        split: str,
        scores: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Append a clip. Keys must come in ascending order; `video` is a whole MP4 file; `metadata` goes into KEY.json."""
        assert KEY_PATTERN.fullmatch(key), f"the key {key!r} does not match {KEY_PATTERN.pattern}"
        assert not self._records or key > self._records[-1].key, f"the key {key!r} does not follow {self._records[-1].key!r}"
        assert split in SPLITS, split
        facts = {"num_frames": num_frames, "fps": fps, "height": height, "width": width, "source_id": source_id}
        described = {**(metadata or {}), **facts, "caption": caption, "scores": dict(scores or {})}
        self._member(f"{key}.json", json.dumps(described, sort_keys=True, ensure_ascii=False).encode())
        offset = self._member(f"{key}.mp4", video)
        self._member(f"{key}.txt", caption.encode())
        self._records.append(
            ClipRecord(
                key, self.tar, offset, len(video), hashlib.sha256(video).hexdigest(), num_frames, fps, height, width,
                caption, source_id, split, dict(scores or {}),
            )
        )  # fmt: skip

    def commit(self, source_ids: Sequence[str] = ()) -> Entry:
        """Make the shard visible: flush, write the index, rename both, and create the manifest entry.

        Args:
            source_ids: all sources of the group, also those that gave no clip.

        Returns:
            the entry; where another writer committed the group first, that writer's.

        Raises:
            DataError: the other writer's entry was made with another config.
        """
        self._archive.close()
        self._file.sync()
        temporary_index = self.folder / (self.index + self._suffix)
        index_sha256 = write_index(temporary_index, self._records)
        entry = Entry(
            VERSION, self.group, self.tar, self._file.count, self._file.hash.hexdigest(), self.index, index_sha256,
            count_splits(self._records), self.config_hash, sorted(source_ids),
        )  # fmt: skip
        with lock(self.folder / "manifest" / f".shard-{self.group}.lock"):
            if not entry_path(self.folder, self.group).exists():
                os.replace(self.folder / (self.tar + self._suffix), self.folder / self.tar)
                os.replace(temporary_index, self.folder / self.index)
                sync(self.folder / "shards")
                sync(self.folder / "index")
                publish(entry_path(self.folder, self.group), entry)
        self._discard()
        committed = read_entry(self.folder, self.group)
        if committed.config_hash != self.config_hash:
            raise DataError(
                f"group {self.group} of {self.folder} was committed by another config (hash {committed.config_hash[:12]}, "
                f"this one is {self.config_hash[:12]}); write to another folder"
            )
        return committed

    def _member(self, name: str, content: bytes) -> int:
        """Append a file to the tar; the position of its first byte."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o644
        self._archive.addfile(info, BytesIO(content))
        return self._file.count - _padded(len(content))

    def _discard(self) -> None:
        try:
            self._file.close()  # fails on a full disk, where what was written must go all the more
        finally:
            for name in (self.tar, self.index):
                (self.folder / (name + self._suffix)).unlink(missing_ok=True)


def read_clip(folder: str | Path, record: ClipRecord) -> bytes:
    """The MP4 file of a clip: one read out of the tar.

    Raises:
        DataError: the shard is missing or shorter than its index says.
    """
    path = Path(folder) / record.shard
    try:
        with path.open("rb") as file:
            content = os.pread(file.fileno(), record.size, record.offset)
    except FileNotFoundError:
        raise DataError(f"clip {record.key}: its shard {path} is missing") from None
    if len(content) != record.size:
        raise DataError(
            f"clip {record.key}: {path} ended early ({len(content)} of {record.size} bytes at {record.offset}); curate again"
        )
    return content


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
