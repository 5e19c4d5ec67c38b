"""`tools/inspect_shard.py`: the table says what the index says, the sheet shows the frames."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.demo_shards import write_demo_shards
from tests.unit.data.test_foreign import pack
from tools import inspect_shard
from tools.inspect_shard import decode_apart, inspect, main
from videofm.data.manifest import Manifest
from videofm.data.shards import read_clip
from videofm.media import read_video


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    folder = write_demo_shards(tmp_path_factory.mktemp("shards"), num_clips=4, num_shards=1, held_out=1)
    return folder / "shards" / "shard-00000.tar"


def test_the_table_has_every_clip(shard, capsys):
    assert main([str(shard)]) == 0
    text = capsys.readouterr().out
    for record in Manifest.load(shard.parent.parent).records():
        line = next(line for line in text.splitlines() if line.startswith(record.key))
        assert line.split()[1:6] == [f"{record.size:,}", "11", "25", "32x32", record.split] and line.endswith(record.caption)


def test_the_sheet_is_a_picture_of_all_clips(shard, tmp_path):
    assert main([str(shard), "--sheet", str(tmp_path / "a.png"), "--frames", "3"]) == 0
    assert main([str(shard), "--sheet", str(tmp_path / "b.png"), "--frames", "3", "--clips", "1"]) == 0
    all_, one = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert all_.height > 1.5 * one.height and all_.width > 1.5 * one.width
    assert len(one.convert("RGB").getcolors(1 << 20) or []) > 20


def test_frames_are_those_of_the_clip(shard, tmp_path):
    clips, notes = inspect(shard)
    assert clips[0].record is not None and not notes
    (tmp_path / "clip.mp4").write_bytes(read_clip(shard.parent.parent, clips[0].record))
    frames = decode_apart(shard, clips[0].sample, 3)
    assert not isinstance(frames, str)
    assert (frames == read_video(tmp_path / "clip.mp4")[[0, 5, 10]]).all()


def test_a_tar_of_no_dataset_with_broken_clips_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspect_shard, "TIMEOUT", 20.0)
    path = pack(tmp_path / "x.tar", [("a.mp4", b"noise" * 99), ("a.txt", b"a\x1b[31mred"), ("b.txt", b"1"), ("c.pkl", b"1")])
    assert main([str(path), "--sheet", str(tmp_path / "a.png")]) == 0
    text = capsys.readouterr().out
    assert "a?[31mred" in text and "1 are in no committed index" in text
    assert "x.tar:b: no_video" in text and "not read: 1 members with the ending .pkl" in text
    assert (tmp_path / "a.png").is_file()
    assert "PyAV" in str(decode_apart(path, inspect(path)[0][0].sample, 2))


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [(["nowhere.tar"], 1, "nowhere.tar is no file"), (["x.tar", "--clips", "0"], 2, "--clips 0 and --frames 5: both are")],
)
def test_mistakes_are_told(arguments, code, match, capsys):
    assert main(arguments) == code
    assert match in capsys.readouterr().err
