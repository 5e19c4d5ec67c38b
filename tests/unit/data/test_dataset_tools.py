"""verify names all damage at once, stats agree with counting, gc removes what no reader sees and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from videofm.cli import main
from videofm.data import gc, stats
from videofm.data.gc import find_garbage
from videofm.data.index import write_index
from videofm.data.manifest import Manifest, assign_split, count_splits, entry_path, publish, read_entries
from videofm.data.shards import ShardWriter
from videofm.data.verify import verify
from videofm.data.view import View
from videofm.errors import ConfigError, DataError


def write(folder: Path, num_shards: int = 3, num_clips: int = 4) -> Path:
    for shard in range(num_shards):
        with ShardWriter(folder, f"{shard:05d}", "c" * 64) as writer:
            for index in range(num_clips):
                number = shard * num_clips + index
                writer.add(
                    f"k-{number:03d}", bytes([number]) * 900, num_frames=10 + number, fps=12.5, height=32,
                    width=48 + 16 * shard, caption="word " * index, source_id=f"s{number}",
                    split="train" if index else "held_out", scores={"motion": number / 100} if shard else {},
                )  # fmt: skip
            writer.commit()
    return folder


def damage(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_a_sound_dataset_has_no_damage(tmp_path):
    found = verify(write(tmp_path))
    assert (found.num_shards, found.num_clips, found.damage) == (3, 12, [])
    assert found.num_bytes == sum(path.stat().st_size for path in (tmp_path / "shards").iterdir())


def test_all_damage_is_told_and_the_clip_that_it_hit(tmp_path):
    """One byte in a clip, an index, and a tar that is gone: three shards, three faults, in one run."""
    write(tmp_path)
    record = Manifest.load(tmp_path).records()[1]
    damage(tmp_path / "shards/shard-00000.tar", record.offset + 5)
    damage(tmp_path / "index/shard-00001.parquet", 50)
    (tmp_path / "shards/shard-00002.tar").unlink()
    found = {(item.file, item.clip): item.detail for item in verify(tmp_path).damage}
    assert set(found) == {
        ("shards/shard-00000.tar", None), ("shards/shard-00000.tar", record.key), ("index/shard-00001.parquet", None),
        ("shards/shard-00002.tar", None),
    }  # fmt: skip
    assert f"expected {record.sha256}, found " in found["shards/shard-00000.tar", record.key]
    assert "missing" in found["shards/shard-00002.tar", None]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"offset": 1}, "SHA-256 expected"),
        ({"size": 1 << 30}, "of its 1073741824 bytes are there"),
        ({"shard": "shards/other.tar"}, "says that it lies in shards/other.tar"),
        ({"key": "k-001"}, "its key occurs twice"),
    ],
)
def test_an_index_that_lies_is_found(tmp_path, change, match):
    """Its own hash is right, so only the tar can tell."""
    write(tmp_path, num_shards=1)
    entry, records = read_entries(tmp_path)[0], Manifest.load(tmp_path).records()
    records[0] = replace(records[0], **change)
    sha256 = write_index(tmp_path / entry.index, records)
    counts = count_splits(records)
    publish(entry_path(tmp_path, entry.group), replace(entry, index_sha256=sha256, num_clips=counts), overwrite=True)
    assert [match in item.detail for item in verify(tmp_path).damage] == [True]


def test_entries_that_do_not_read_or_do_not_fit_are_told(tmp_path):
    entry = read_entries(write(tmp_path))[2]
    shutil.copy(tmp_path / "manifest/shard-00000.json", tmp_path / "manifest/shard-9.json")
    (tmp_path / "manifest/shard-00001.json").write_text("{")
    publish(entry_path(tmp_path, "00002"), replace(entry, config_hash="d" * 64, num_clips={"train": 9}), overwrite=True)
    found = [f"{item.file}: {item.detail}" for item in verify(tmp_path).damage]
    for text in ("shard-00001.json: it cannot be read", "shard-9.json: it is the entry of group '00000'",
                 "shard-00002.json: made with another config", "the entry says {'train': 9}"):  # fmt: skip
        assert sum(text in line for line in found) == 1, (text, found)
    with pytest.raises(DataError, match="has no committed shard"):
        verify(tmp_path / "shards")


def test_verify_exits_with_one(tmp_path, capsys):
    write(tmp_path)
    assert main(["data", "verify", str(tmp_path)]) == 0
    assert "all as the manifest says" in capsys.readouterr().out
    (tmp_path / "index/shard-00000.parquet").unlink()
    assert main(["data", "verify", str(tmp_path)]) == 1
    assert "index/shard-00000.parquet: it is in the manifest but missing" in capsys.readouterr().out


def test_stats_agree_with_a_loop_over_records(tmp_path, capsys):
    manifest = Manifest.load(write(tmp_path))
    records, found = manifest.records(), stats.stats(manifest).to_json()
    assert found["clips"] == {split: sum(r.split == split for r in records) for split in ("train", "held_out")}
    for split in ("train", "held_out"):
        assert found["hours"][split] == pytest.approx(sum(r.num_frames / r.fps for r in records if r.split == split) / 3600)
    assert found["sizes"] == {"32x48": 4, "32x64": 4, "32x80": 4} and found["fps"] == {"12.5": 12}
    assert found["video_bytes"] == sum(r.size for r in records) == 12 * 900
    assert found["without_caption"] == 3 and found["without_score"]["score_motion"] == 4
    motion = sorted(r.scores["motion"] for r in records if r.scores)
    expected = [motion[max(0, int(np.ceil(q * len(motion))) - 1)] for q in stats.QUANTILES]
    assert found["quantiles"]["score_motion"] == pytest.approx(expected) and found["quantile_rank_error"] == 0
    assert main(["data", "stats", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["data", "stats", str(tmp_path)]) == 0
    assert "12 clips in 3 shards" in capsys.readouterr().out


def age(folder: Path, hours: float) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            then = time.time() - hours * 3600
            os.utime(path, (then, then))


def test_gc_finds_what_no_entry_needs_and_nothing_else(tmp_path, capsys):
    write(tmp_path)
    before = Manifest.load(tmp_path)
    view = tmp_path / "v.yaml"
    view.write_text("rules: {d: {field: duration, min_quantile: 0.1}}")
    View.load(view).resolve(before, scan=True)
    old_index = tmp_path / read_entries(tmp_path)[0].index
    content = old_index.read_bytes()
    assign_split(tmp_path, read_entries(tmp_path)[0], "s1", "held_out")
    old_index.write_bytes(content)  # as if the process had died before it removed it
    current = Manifest.load(tmp_path)
    current.write_snapshot()
    View.load(view).resolve(current, scan=True)
    rubbish = {
        "shards/shard-00000.tar.tmp-12-0a1b2c3d": "left by a writer", "index/shard-00000.parquet.tmp-1-00000000": "left by",
        "manifest/.shard-00009.json.tmp-77-abcdef01": "left by", "shards/shard-00009.tar": "a tar without an entry",
        "manifest/.shard-00009.lock": "a lock",
    }  # fmt: skip
    kept = ["shards/shard-00001.latents.tar", "shards/notes.txt", "captions.jsonl"]
    for name in [*rubbish, *kept]:
        (tmp_path / name).write_bytes(b"1")
    assert find_garbage(tmp_path) == []  # all of it is young: it may be about to be committed
    age(tmp_path, 30)
    found = {item.path: item.reason for item in find_garbage(tmp_path)}
    stale = next(path for path in found if path.startswith("views/"))
    assert before.hash in (tmp_path / stale).read_text()
    assert set(found) == {*rubbish, stale, "index/shard-00000.parquet"}
    assert all(found[name].startswith(reason) for name, reason in rubbish.items())
    assert find_garbage(tmp_path, older_than=31) == []
    assert main(["data", "gc", str(tmp_path)]) == 0
    assert "nothing was deleted" in capsys.readouterr().out and all((tmp_path / name).exists() for name in found)
    assert main(["data", "gc", str(tmp_path), "--delete"]) == 0
    assert not any((tmp_path / name).exists() for name in found) and all((tmp_path / name).exists() for name in kept)
    assert Manifest.load(tmp_path).hash == current.hash and not verify(tmp_path).damage
    assert find_garbage(tmp_path) == [] and gc.as_text([], deleted=False) == "nothing to collect"


@pytest.mark.parametrize("sign", ["an entry", "a report"])
def test_gc_leaves_the_tars_of_others_alone(tmp_path, sign):
    """`data index FOLDER` takes FOLDER/shards/shard-0.tar, and gives a tar that it cannot trust no entry."""
    write(tmp_path, num_shards=1)
    if sign == "an entry":
        entry = read_entries(tmp_path)[0]
        publish(entry_path(tmp_path, "00000"), replace(entry, config_hash="foreign:" + "c" * 64), overwrite=True)
    else:
        (tmp_path / "manifest/shard-00000.json").unlink()
        (tmp_path / "indexing").mkdir()
    for name in ("shards/shard-0.tar", "shards/shard-1.tar.part-12-0a1b2c3d", "index/shard-9.parquet.tmp-1-0a1b2c3d"):
        (tmp_path / name).write_bytes(b"1")
    age(tmp_path, 30)
    found = {item.path for item in find_garbage(tmp_path)}
    assert "index/shard-9.parquet.tmp-1-0a1b2c3d" in found
    assert not any(name.startswith("shards/") for name in found)


def test_gc_does_not_guess(tmp_path):
    with pytest.raises(DataError, match="is not a dataset"):
        find_garbage(tmp_path)
    write(tmp_path)
    with pytest.raises(ConfigError, match="an age of -1 hours"):
        find_garbage(tmp_path, -1)
    (tmp_path / "manifest/shard-00001.json").write_text("{}")
    age(tmp_path, 30)
    with pytest.raises(DataError, match="not a manifest entry"):
        find_garbage(tmp_path)


def test_the_view_verb_prints_its_report(tmp_path, capsys):
    (tmp_path / "wide.yaml").write_text("rules: {long: {field: num_frames, min_quantile: 0.25}, m: {score: motion, min: 0.05}}")
    dataset = str(write(tmp_path / "d"))
    assert main(["data", "view", str(tmp_path / "wide.yaml"), dataset]) == 1
    assert "4 of 12 clips have no score 'motion'" in capsys.readouterr().err
    (tmp_path / "wide.yaml").write_text("rules: {long: {field: num_frames, min_quantile: 0.25}}")
    assert main(["data", "view", str(tmp_path / "wide.yaml"), dataset]) == 0
    text = capsys.readouterr().out
    assert "13 <= num_frames" in text and "9 clips stay (75.0%)" in text
    assert list((tmp_path / "d/views").glob("wide-*.json"))
