"""Copies of remote shards: one download a node, checked, bounded, out of the way where they cannot be had."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.http_store import Bucket, serve
from videofm.data import cache, storage
from videofm.data.cache import ShardCache
from videofm.errors import ConfigError, DataError, MissingError

FILES = {f"set/{name}.tar": name.encode() * 1000 for name in "abcd"}


@pytest.fixture
def bucket():
    with serve(FILES) as running:
        yield running


def read(copies: ShardCache, bucket: Bucket, name: str, offset: int = 10, size: int = 20) -> bytes | None:
    content = FILES[f"set/{name}.tar"]
    place, sha256 = f"{bucket.url}/set/{name}.tar", hashlib.sha256(content).hexdigest()
    found = copies.read(place, sha256, len(content), offset, size)
    assert found in (None, content[offset : offset + size])
    return found


def downloads(bucket: Bucket) -> list[str]:
    return [path for method, path, span in bucket.seen if method == "GET"]


def names(folder: Path) -> set[str]:
    return {path.suffix for path in folder.iterdir()} - {""}


def test_a_shard_is_downloaded_once(bucket, tmp_path):
    copies = ShardCache(tmp_path, 1 << 20)
    assert all(read(copies, bucket, name) for name in "abba")
    assert all(read(ShardCache(tmp_path, 1 << 20), bucket, name) for name in "ab")  # another process on the node
    assert downloads(bucket) == ["set/a.tar", "set/b.tar"]
    assert copies.counts == {"download": 2, "hit": 2}
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == sorted(
        hashlib.sha256(FILES[f"set/{name}.tar"]).hexdigest() + ".tar" for name in "ab"
    )


def test_many_processes_download_a_shard_once(bucket, tmp_path):
    """Threads with a cache each open the files for themselves, so that locks hold between them as between processes."""
    found: list[bytes | None] = []
    gate = threading.Barrier(8)

    def one() -> None:
        gate.wait()
        found.append(read(ShardCache(tmp_path, 1 << 20), bucket, "a"))

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and any(found)  # those who came during the download were sent to the store
    assert downloads(bucket) == ["set/a.tar"]


def test_another_process_that_downloads_is_not_waited_for(bucket, tmp_path):
    copies, name = ShardCache(tmp_path, 1 << 20), hashlib.sha256(FILES["set/a.tar"]).hexdigest() + ".tar.lock"
    holder = [
        sys.executable,
        "-c",
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print(flush=True); input()",
    ]
    with subprocess.Popen([*holder, str(tmp_path / name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdin is not None
        other.stdout.readline()
        assert read(copies, bucket, "a") is None and copies.counts == {"busy": 1}
        other.kill()  # which frees its lock, and leaves the file
    assert read(copies, bucket, "a") and copies.counts == {"busy": 1, "download": 1}


def test_the_least_recently_used_make_room(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "KEEP_SECONDS", -1.0)
    copies = ShardCache(tmp_path, 2500)
    for at, name in enumerate("ab"):
        read(copies, bucket, name)
        for path in tmp_path.glob("*.tar"):
            os.utime(path, (at, at)) if path.stat().st_mtime > 1000 else None
    assert read(copies, bucket, "a")  # b is the one that was not used for longest, now
    assert read(copies, bucket, "c")
    assert len(list(tmp_path.glob("*.tar"))) == 2
    assert [read(ShardCache(tmp_path, 0), bucket, name) is not None for name in "abc"] == [True, False, True]


def test_what_is_in_use_stays_and_the_rest_is_read_from_the_store(bucket, tmp_path):
    copies = ShardCache(tmp_path, 2500)
    assert [read(copies, bucket, name) is not None for name in "abcdab"] == [True, True, False, False, True, True]
    assert copies.counts == {"download": 2, "no_room": 2, "hit": 2}


def test_a_file_that_is_read_is_not_removed(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "KEEP_SECONDS", -1.0)
    copies = ShardCache(tmp_path, 1500)
    read(copies, bucket, "a")
    with next(tmp_path.glob("*.tar")).open() as lease:
        fcntl.flock(lease, fcntl.LOCK_SH)
        assert read(copies, bucket, "b") is None
    assert read(copies, bucket, "b")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_leads_to_the_store(bucket, tmp_path, monkeypatch, code):
    copies = ShardCache(tmp_path, 1 << 20)

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(storage.os, "fsync", full)
    assert read(copies, bucket, "a") is None and read(copies, bucket, "b") is None
    assert copies.counts == {"disk_full": 2} and names(tmp_path) <= {".lock"}
    assert downloads(bucket) == ["set/a.tar"]  # the disk is left alone for a while
    with pytest.raises(DataError, match="the disk of .* is full: .*/set/c.tar does not fit; free some space, or set"):
        copies.fetch(f"{bucket.url}/set/c.tar", hashlib.sha256(FILES["set/c.tar"]).hexdigest())


def test_a_damaged_shard_is_not_kept(bucket, tmp_path):
    copies = ShardCache(tmp_path, 1 << 20)
    bucket.files["set/a.tar"] = b"x" * 1000
    assert read(copies, bucket, "a") is None and read(copies, bucket, "a") is None
    assert copies.counts == {"damaged": 2} and not list(tmp_path.glob("*.tar")) and downloads(bucket) == ["set/a.tar"]


def test_leftovers_of_a_crash_are_invisible_and_removed(bucket, tmp_path):
    name = hashlib.sha256(FILES["set/a.tar"]).hexdigest() + ".tar"
    (tmp_path / f".{name}.part-1-00").write_bytes(b"half")
    (tmp_path / f"{name}.lock").write_text("1000")
    copies = ShardCache(tmp_path, 1 << 20)
    assert read(copies, bucket, "b")  # making room finds them
    assert not list(tmp_path.glob(".*.part-*")) and not list(tmp_path.glob("*.tar.lock"))
    assert read(copies, bucket, "a")


def test_small_files_are_fetched_checked_and_missed(bucket, tmp_path):
    copies, sha256 = ShardCache(tmp_path, 1 << 20), hashlib.sha256(FILES["set/a.tar"]).hexdigest()
    for _ in range(2):
        assert copies.fetch(f"{bucket.url}/set/a.tar", sha256).read_bytes() == FILES["set/a.tar"]
    assert downloads(bucket) == ["set/a.tar"]
    with pytest.raises(DataError, match="is damaged: SHA-256 expected 0{64}"):
        copies.fetch(f"{bucket.url}/set/b.tar", "0" * 64)
    with pytest.raises(MissingError, match="set/z.tar does not exist"):
        copies.fetch(f"{bucket.url}/set/z.tar", sha256[::-1])
    with pytest.raises(MissingError, match="set/z.tar does not exist"):
        copies.read(f"{bucket.url}/set/z.tar", sha256[::-1], 10, 0, 5)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"copies of shards .*file/inner cannot be made \(Not a directory\); set cache_dir"):
        ShardCache(tmp_path / "file" / "inner", 1)
