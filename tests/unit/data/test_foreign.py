"""Webdataset shards of others: what can be used trains, and everything else is told with its reason."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset

from data_pipelines import foreign
from data_pipelines.demo import render_shot
from data_pipelines.foreign import Execution, Options, as_text, index_folder
from data_pipelines.foreign_samples import BadMember, describe, samples_of, split_name
from tests.unit.data.test_tar import FILES
from videofm.config.data import DataConfig
from videofm.data.loader import StepLoader
from videofm.data.manifest import Manifest
from videofm.data.tar import scan_tar
from videofm.data.verify import verify
from videofm.errors import ConfigError, DataError
from videofm.media import read_video, write_video
from videofm.shapes import motifs


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[bytes]:
    """Six videos of 11 frames, 32x32."""
    path, found = tmp_path_factory.mktemp("clips") / "clip.mp4", []
    for index, motif in enumerate(motifs()[:6]):
        write_video(path, render_shot(motif.colour, motif.shape, motif.direction, 11, 32, np.random.default_rng(index)), 25)
        found.append(path.read_bytes())
    return found


def pack(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def losses(folder: Path, group: str) -> dict[str, str]:
    found = json.loads((folder / "indexing" / f"{group}.json").read_text())["losses"]
    return {loss["source"].partition(":")[2]: f"{loss['kind']} {loss['reason']}" for loss in found}


def test_a_folder_of_webdataset_trains_after_indexing(tmp_path, clips):
    """Written by webdataset itself, read by our loader: pixels are those of the files, and the tars stay as they are."""
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{shard:05d}.tar")) as writer:
            for index in range(3):
                facts = {"url": f"https://host/{shard}", "clip_score": 0.25 * index, "caption": "in json"}
                sample = {"__key__": f"{index:09d}", "mp4": clips[3 * shard + index], "json": facts}
                writer.write(sample | ({"txt": f"caption {shard} {index}"} if index else {}))
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("*.tar")}
    found = index_folder(tmp_path, Options(scores=("clip_score", "taste")), Execution(num_workers=2))
    assert (found.num_tars, found.num_samples, found.num_indexed) == (2, 6, 6) and not found.lost
    assert before == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.glob("*.tar")}
    manifest = Manifest.load(tmp_path)
    assert manifest.entries[0].config_hash.startswith("foreign:") and not verify(tmp_path).damage
    records = manifest.records()
    assert [r.key for r in records] == [f"{shard:05d}-{index:09d}" for shard in range(2) for index in range(3)]
    assert [r.caption for r in records[:3]] == ["in json", "caption 0 1", "caption 0 2"]
    assert {(r.num_frames, r.fps, r.height, r.width) for r in records} == {(11, 25.0, 32, 32)}
    assert [r.scores for r in records[:2]] == [{"clip_score": 0.0}, {"clip_score": 0.25}]
    assert [r.source_id for r in records[:3]] == [records[0].source_id] * 3 != [r.source_id for r in records[3:]]
    config = DataConfig.model_validate(
        {"manifest": str(tmp_path), "num_frames": 11, "height": 32, "width": 32, "micro_batch_size": 3, "num_micro_batches": 2}
    )
    step = next(StepLoader(config, 0).steps())
    pixels = dict(zip((r.key for r in records), clips, strict=True))
    for batch in step.batches:
        for video, sample_id in zip(batch.to("cpu").video, batch.sample_ids, strict=True):
            path = tmp_path / "one.mp4"
            path.write_bytes(pixels[sample_id.split("@")[0]])
            frames = read_video(path).astype(np.float32) / 127.5 - 1
            assert np.abs(video.permute(1, 2, 3, 0).numpy() - frames).max() <= 4 / 127.5


def test_webdataset_would_read_what_is_refused(tmp_path, clips):
    """Each fault of spec section 5 in one tar: the sound samples are indexed, each other one is told once."""
    good = clips[0]
    members = [
        ("good.mp4", good), ("good.txt", "ein schöner Tag".encode()),
        ("twice.mp4", good), ("twice.txt", b"1"), ("twice.mp4", clips[1]),
        ("apart.mp4", good), ("apart.txt", b"first"),
        ("clip.001.mp4", good), ("clip.001.txt", b"one"), ("clip.002.mp4", clips[1]),
        ("apart.txt", b"second"),
        ("silent.mp4", good),
        ("empty.mp4", good), ("empty.txt", b" \n"),
        ("latin.mp4", good), ("latin.txt", "schön".encode("latin-1")),
        ("nojson.mp4", good), ("nojson.json", b"{'a': 1}"),
        ("list.mp4", good), ("list.json", b"[1]"),
        ("only.txt", b"no video"),
        ("both.mp4", good), ("both.webm", good),
        ("a b.mp4", good),
        ("../../etc/x.mp4", good), ("/abs/y.mp4", good),
        ("cut.mp4", good[: len(good) // 2]), ("noise.mp4", bytes(range(256)) * 8), ("zero.mp4", b""),
        ("./sub/deep.mp4", good), ("big.mp4", good + bytes(300_000)),
        ("last.webm", clips[2]), ("last.npy", b"1"),
    ]  # fmt: skip
    pack(tmp_path / "00000.tar", members)
    found = index_folder(tmp_path, Options(max_member_bytes=200_000))
    records = {record.key: record for record in Manifest.load(tmp_path).records()}
    assert sorted(records) == [f"00000-{key}" for key in ("empty", "good", "last", "silent", "sub-deep")]
    assert (records["00000-good"].caption, records["00000-silent"].caption) == ("ein schöner Tag", "")
    told = losses(tmp_path, "00000")
    quarantined = {
        "twice.mp4": "duplicate_key", "apart.mp4": "duplicate_key", "clip.001.mp4": "dotted_key", "clip.002.mp4": "dotted_key",
        "latin.mp4": "caption_not_utf8", "nojson.mp4": "bad_json", "list.mp4": "bad_json", "only": "no_video",
        "both.mp4": "several_videos", "a b.mp4": "bad_key", "../../etc/x.mp4": "unsafe_name", "/abs/y.mp4": "unsafe_name",
        "noise.mp4": "not_video", "zero.mp4": "empty", "big": "member_too_large",
    }  # fmt: skip
    assert {name: told[name] for name in quarantined} == {name: f"quarantined {why}" for name, why in quarantined.items()}
    assert set(told) == {*quarantined, "cut.mp4"} and told["cut.mp4"].startswith("quarantined ")
    assert found.num_samples == found.num_indexed + found.lost.total() == 5 + len(told)
    assert found.notes["without_caption"] == 4 and found.notes["ignored .npy"] == 1
    assert "quarantined: dotted_key" in as_text(found)


@pytest.mark.parametrize("field", ["caption", "url"])
def test_half_a_character_costs_its_sample(tmp_path, field):
    """JSON can write a lone surrogate, which neither a hash nor an index can hold."""
    pack(tmp_path / "0.tar", [("a.mp4", b"x"), ("a.json", json.dumps({field: "\ud800"}).encode())])
    (sample,) = samples_of(scan_tar(tmp_path / "0.tar"), "0", "0.tar").found
    with pytest.raises(BadMember, match=f"{field}: 'utf-8' codec can't encode") as raised:
        describe(tmp_path / "0.tar", sample, (), "url")
    assert raised.value.reason == "not_text"


def test_numbers_beyond_a_float_are_no_scores(tmp_path):
    facts = '{"a": 1e999, "b": -1' + "0" * 400 + ', "c": NaN, "d": true, "e": 2, "f": 1.7e308}'
    pack(tmp_path / "0.tar", [("a.mp4", b"x"), ("a.json", facts.encode())])
    (sample,) = samples_of(scan_tar(tmp_path / "0.tar"), "0", "0.tar").found
    assert describe(tmp_path / "0.tar", sample, tuple("abcdef"), "url").scores == {"e": 2.0, "f": 1.7e308}


def test_a_tar_whose_name_is_not_utf8_is_told_of(tmp_path):
    pack(tmp_path / os.fsdecode(b"a\xff.tar"), [])
    found = index_folder(tmp_path)
    assert [(name, reason) for name, (reason, _) in found.damaged.items()] == [("a\\xff.tar", "bad_name")]
    as_text(found).encode()


def test_uncaptioned_samples_can_be_dropped(tmp_path, clips):
    pack(
        tmp_path / "a.tar", [("a.mp4", clips[0]), ("b.mp4", clips[0]), ("b.txt", b"words"), ("c.mp4", clips[0]), ("c.txt", b"")]
    )
    found = index_folder(tmp_path, Options(missing_caption="drop"))
    assert (found.num_indexed, dict(found.lost)) == (1, {"dropped: no_caption": 2})


def test_a_payload_of_pickle_is_never_run(tmp_path, clips):
    """Invariant 13: not while indexing, not while verifying, not while reading batches."""

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "it ran"),)

    payload = pickle.dumps(Payload())
    members = [(f"{key}.{ending}", payload) for key in "ab" for ending in ("pyd", "pkl", "pickle", "pth", "pt")]
    pack(tmp_path / "d" / "0.tar", sorted([*members, ("a.mp4", clips[0]), ("b.mp4", clips[1]), ("c.mp4", payload)]))
    found = index_folder(tmp_path / "d")
    assert found.num_indexed == 2 and found.notes["ignored .pkl"] == 2 and dict(found.lost) == {"quarantined: not_video": 1}
    assert not verify(tmp_path / "d").damage
    values = {"manifest": str(tmp_path / "d"), "num_frames": 5, "height": 32, "width": 32, "micro_batch_size": 2}
    list(islice(StepLoader(DataConfig.model_validate(values), 0).steps(), 2))
    assert not (tmp_path / "it ran").exists()


def test_tars_that_cannot_be_trusted_get_no_entry_and_the_others_do(tmp_path, clips):
    whole = pack(tmp_path / "good.tar", [("a.mp4", clips[0]), ("a.txt", b"1")]).read_bytes()
    (tmp_path / "between.tar").write_bytes(whole[: len(whole) // 10240 * 10240 - 9216])
    (tmp_path / "inside.tar").write_bytes(whole[:700])
    (tmp_path / "garbage.tar").write_bytes(b"\x01" * 2000)
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "more.tar.gz").write_bytes(b"\x1f\x8b" + bytes(600))
    pack(tmp_path / "dotted.name.tar", [("a.mp4", clips[0])])
    found = index_folder(tmp_path)
    assert {name: reason for name, (reason, _) in found.damaged.items()} == {
        "between.tar": "truncated", "inside.tar": "truncated", "garbage.tar": "not_tar", "empty.tar": "empty",
        "more.tar.gz": "compressed", "dotted.name.tar": "bad_name",
    }  # fmt: skip
    assert [entry.tar for entry in Manifest.load(tmp_path).entries] == ["good.tar"]
    assert "between.tar: truncated" in as_text(found)


def test_a_second_run_does_what_is_missing(tmp_path, clips, monkeypatch):
    for name in "ab":
        pack(tmp_path / f"{name}.tar", [("k.mp4", clips[0]), ("bad.mp4", b"nothing")])
    first = index_folder(tmp_path)
    (tmp_path / "manifest" / "shard-b.json").unlink()
    done = []
    again = index_folder(tmp_path, tell=lambda report: done.append(report.tar))
    assert done == ["b.tar"] and again.num_skipped == 1
    assert (again.num_indexed, again.lost) == (first.num_indexed, first.lost)
    monkeypatch.setattr(foreign, "index_tar", lambda *_: pytest.fail("done again"))
    hash_before = Manifest.load(tmp_path).hash
    assert index_folder(tmp_path).num_skipped == 2 and Manifest.load(tmp_path).hash == hash_before


def test_other_options_and_replaced_tars_are_refused(tmp_path, clips):
    pack(tmp_path / "a.tar", [("k.mp4", clips[0])])
    index_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"indexed with other options .*Delete .*manifest and .*index to index it anew"):
        index_folder(tmp_path, Options(held_out=0.5))
    pack(tmp_path / "a.tar", [("k.mp4", clips[0]), ("l.mp4", clips[1] + bytes(20_000))])
    with pytest.raises(DataError, match="is not the tar that was indexed"):
        index_folder(tmp_path)


def test_folders_without_tars_and_names_that_meet_are_refused(tmp_path, clips):
    with pytest.raises(DataError, match="is no folder"):
        index_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no tar"):
        index_folder(tmp_path)
    for name in ("x/0.tar", "x-0.tar"):
        pack(tmp_path / name, [("k.mp4", clips[0])])
    with pytest.raises(DataError, match=r"would be called the same: x-0.tar \(x-0\), x/0.tar \(x-0\)"):
        index_folder(tmp_path)
    with pytest.raises(ConfigError, match="held_out 1.5 is a share"):
        Options(held_out=1.5)
    with pytest.raises(ConfigError, match="Score: a score is named in lower case"):
        Options(scores=("Score",))


def test_a_hanging_and_a_crashing_decoder_cost_one_sample(tmp_path, clips):
    """A child that never answers about one video and dies of another; the third is indexed."""
    stub = tmp_path / "stub.py"
    stub.write_text(
        "import json, os, time\n"
        "from data_pipelines import foreign_child\n"
        "real = foreign_child.CountStage.process\n"
        "def process(self, row, work):\n"
        "    time.sleep(60 if 'hang' in row.name else 0)\n"
        "    os.abort() if 'crash' in row.name else None\n"
        "    return real(self, row, work)\n"
        "foreign_child.CountStage.process = process\n"
        "foreign_child.main()\n"
    )
    pack(tmp_path / "d" / "0.tar", [(f"{name}.mp4", clips[0]) for name in ("hang", "crash", "sound")])
    execution = Execution(timeout=6.0, max_attempts=1, command=(sys.executable, str(stub)))
    found = index_folder(tmp_path / "d", execution=execution)
    assert found.num_indexed == 1 and losses(tmp_path / "d", "0") == {
        "hang.mp4": "quarantined timeout", "crash.mp4": "quarantined crash",
    }  # fmt: skip


def test_variable_frame_rates_are_dropped_unless_kept(tmp_path):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options={"threads": "1"})
        stream.width = stream.height = 32
        for number, pts in enumerate((0, 1, 2, 3, 10, 11, 12, 13)):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), number * 9, np.uint8), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for name, options in (("drop", Options()), ("keep", Options(variable_rate="keep"))):
        pack(tmp_path / name / "0.tar", [("v.mp4", buffer.getvalue())])
        found = index_folder(tmp_path / name, options)
        assert (found.num_indexed, found.lost["dropped: variable_frame_rate"]) == ((0, 1) if name == "drop" else (1, 0))
    record = Manifest.load(tmp_path / "keep").records()[0]
    assert (record.num_frames, record.fps) == (8, pytest.approx(7 / (13 / 25), rel=0.02))


def test_held_out_sources_stay_together(tmp_path, clips):
    members = [m for i in range(24) for m in ((f"{i:02d}.mp4", clips[0]), (f"{i:02d}.json", b'{"url": "u%d"}' % (i // 2)))]
    pack(tmp_path / "0.tar", members)
    index_folder(tmp_path, Options(held_out=0.5))
    splits: dict[str, set[str]] = {}
    for record in Manifest.load(tmp_path).records():
        splits.setdefault(record.source_id, set()).add(record.split)
    assert len(splits) == 12 and {len(found) for found in splits.values()} == {1}
    assert {split for found in splits.values() for split in found} == {"train", "held_out"}


def test_names_are_split_at_the_first_dot():
    assert split_name("./a/b.MP4") == ("a-b", "mp4") and split_name("a.caption.txt") == ("a", "caption.txt")


def test_grouping_agrees_with_webdataset_on_sound_tars(tmp_path):
    """The reference: webdataset's own grouping of the same tar."""
    path = pack(tmp_path / "a.tar", list(FILES.items()))
    ours = samples_of(scan_tar(path), "g", "a.tar")
    theirs = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    expected = [(sample["__key__"], sample["mp4"]) for sample in theirs]
    content = path.read_bytes()
    found = [(s.key.removeprefix("g-"), content[s.video.offset : s.video.offset + s.video.size]) for s in ours.found]
    assert found == expected and not ours.losses


def test_the_verb_tells_and_exits(tmp_path, clips):
    pack(tmp_path / "00000.tar", [("a.mp4", clips[0]), ("b.txt", b"alone")])
    command = [sys.executable, "-m", "videofm", "data", "index", str(tmp_path), "--held-out", "0.1"]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0 and "2 samples, 1 indexed, 1 not taken" in done.stdout, done.stderr
    assert "00000.tar: 1 of 2 samples" in done.stderr
