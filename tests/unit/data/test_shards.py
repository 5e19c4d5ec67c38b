"""Shards: bytes that depend on the clips alone, a commit that is all or nothing, and damage that is named."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from videofm.data import shards
from videofm.data.manifest import Manifest, assign_split
from videofm.data.shards import ShardWriter, read_clip
from videofm.errors import DataError

CLIPS = {"aa-00000000": b"first clip" * 70, "ab-00000000": b"second" * 99, "b_0": b""}


def write(folder: Path, group: str = "00000", config_hash: str = "c" * 64, split: str = "train") -> ShardWriter:
    writer = ShardWriter(folder, group, config_hash)
    for number, (key, video) in enumerate(CLIPS.items()):
        writer.add(
            f"{key}-{group}", video, num_frames=9 + number, fps=25.0, height=32, width=48, caption=f"caption {number} é",
            source_id=key[:2], split="held_out" if number == 0 else split, scores={"motion": 0.5} if number else {},
        )  # fmt: skip
    return writer


def test_what_is_written_is_read_back(tmp_path):
    write(tmp_path).commit(["b_", "aa", "ab"])
    manifest = Manifest.load(tmp_path)
    manifest.verify()
    records = manifest.records()
    assert [read_clip(tmp_path, record) for record in records] == list(CLIPS.values())
    assert [record.num_frames for record in records] == [9, 10, 11]
    assert (records[1].caption, records[1].scores, records[0].scores) == ("caption 1 é", {"motion": 0.5}, {})
    assert [record.split for record in manifest.records("held_out")] == ["held_out"]
    assert manifest.entries[0].num_clips == {"train": 2, "held_out": 1}
    assert manifest.entries[0].source_ids == ["aa", "ab", "b_"]


def test_tar_is_webdataset_with_fixed_metadata(tmp_path):
    write(tmp_path).commit()
    with tarfile.open(tmp_path / "shards/shard-00000.tar") as archive:
        members = archive.getmembers()
    names = [member.name for member in members]
    assert names == sorted(names)
    assert {name.split(".", 1)[1] for name in names} == {"json", "mp4", "txt"}
    assert {(member.mtime, member.uid, member.gid, member.mode, member.uname) for member in members} == {(0, 0, 0, 0o644, "")}


def test_same_clips_give_the_same_bytes(tmp_path):
    first, second = (write(tmp_path / name).commit() for name in "ab")
    assert first == second
    for name in (first.tar, first.index):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert Manifest.load(tmp_path / "a").hash == Manifest.load(tmp_path / "b").hash


@pytest.mark.parametrize("step", ["write_index", "publish", "sync", "os.replace 1", "os.replace 2", "os.link"])
def test_crash_within_commit_leaves_nothing_visible_and_a_second_run_completes(tmp_path, monkeypatch, step):
    def crash(*_, **__):
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        if step == "os.link":
            patch.setattr(os, "link", crash)
        elif step.startswith("os.replace"):
            calls, replace = iter(range(1, 9)), os.replace
            patch.setattr(os, "replace", lambda *a: crash() if next(calls) == int(step[-1]) else replace(*a))
        else:
            patch.setattr(shards, step, crash)
        with pytest.raises(OSError, match="power cut"), write(tmp_path) as writer:
            writer.commit()
    with pytest.raises(DataError, match="no committed shard"):
        Manifest.load(tmp_path)
    write(tmp_path).commit()
    Manifest.load(tmp_path).verify()
    write(tmp_path / "undisturbed").commit()
    assert Manifest.load(tmp_path).hash == Manifest.load(tmp_path / "undisturbed").hash


def test_leaving_without_commit_removes_the_temporary_files(tmp_path):
    with write(tmp_path):
        pass
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_second_writer_of_a_group_loses_cleanly(tmp_path):
    late = write(tmp_path, split="held_out")  # begins first, commits last
    winner = write(tmp_path).commit()
    assert late.commit() == winner
    Manifest.load(tmp_path).verify()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "shard-00000.json", "shard-00000.parquet", "shard-00000.tar",
    ]  # fmt: skip


def test_group_of_another_config_is_refused(tmp_path):
    write(tmp_path).commit()
    with pytest.raises(DataError, match="committed by another config .hash cccccccccccc, this one is dddddddddddd"):
        write(tmp_path, config_hash="d" * 64).commit()


def test_mixed_configs_are_refused(tmp_path):
    write(tmp_path).commit()
    write(tmp_path, "00001", "d" * 64).commit()
    with pytest.raises(DataError, match="2 different curation configs .cccccccccccc, dddddddddddd"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("name", ["shards/shard-00000.tar", "index/shard-00000.parquet"])
def test_damage_is_named_with_both_hashes(tmp_path, name):
    entry = write(tmp_path).commit()
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    expected = entry.sha256 if name == entry.tar else entry.index_sha256
    with pytest.raises(DataError, match=rf"{path.name} is damaged: SHA-256 expected {expected}, found [0-9a-f]{{64}}"):
        Manifest.load(tmp_path).verify()


def test_missing_and_short_shards_are_named(tmp_path):
    write(tmp_path).commit()
    record = Manifest.load(tmp_path).records()[1]
    path = tmp_path / record.shard
    path.write_bytes(path.read_bytes()[: record.offset + 5])
    with pytest.raises(DataError, match=r"ab-00000000-00000: .* ended early \(5 of 594 bytes at"):
        read_clip(tmp_path, record)
    path.unlink()
    with pytest.raises(DataError, match="shard .* is missing"):
        read_clip(tmp_path, record)
    with pytest.raises(DataError, match="is in the manifest but missing"):
        Manifest.load(tmp_path).verify()


def test_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist; make it with `videofm curate`"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no committed shard"):
        Manifest.load(tmp_path)


def test_entry_of_another_version_is_refused(tmp_path):
    write(tmp_path).commit()
    path = tmp_path / "manifest/shard-00000.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 7}))
    with pytest.raises(DataError, match="not a manifest entry of version 1 .found version 7"):
        Manifest.load(tmp_path)


def test_assign_split_moves_all_clips_of_a_source(tmp_path):
    entry = write(tmp_path).commit()
    updated = assign_split(tmp_path, entry, "ab", "held_out")
    manifest = Manifest.load(tmp_path)
    manifest.verify()
    assert manifest.entries == [updated]
    assert updated.num_clips == {"train": 1, "held_out": 2} and updated.sha256 == entry.sha256
    assert [path.name for path in (tmp_path / "index").iterdir()] == [Path(updated.index).name]


def test_keys_that_webdataset_would_misread_are_refused(tmp_path):
    facts = {"num_frames": 1, "fps": 1.0, "height": 2, "width": 2, "caption": "", "source_id": "s", "split": "train"}
    with ShardWriter(tmp_path, "0", "c") as writer:
        for key in ("clip.001", "../x", "", "a b"):
            with pytest.raises(AssertionError, match="does not match"):
                writer.add(key, b"", **facts)
        writer.add("b", b"", **facts)
        with pytest.raises(AssertionError, match="does not follow"):
            writer.add("a", b"", **facts)


def test_members_are_readable_as_a_plain_tar(tmp_path):
    write(tmp_path).commit()
    record = Manifest.load(tmp_path).records()[0]
    with tarfile.open(fileobj=io.BytesIO((tmp_path / record.shard).read_bytes())) as archive:
        described = json.load(archive.extractfile(f"{record.key}.json"))
        assert archive.extractfile(f"{record.key}.txt").read().decode() == record.caption
    assert described["num_frames"] == record.num_frames
