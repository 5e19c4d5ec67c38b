"""Stages one by one: resampling, cropping, captions, duplicates, cuts, and what probing refuses."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest

from data_pipelines import curate, demo
from data_pipelines.rows import Rejected, Row, SourceInfo, Unusable
from data_pipelines.stages.caption import CaptionStage, find_caption
from data_pipelines.stages.dedup import DedupStage
from data_pipelines.stages.filter import FilterStage
from data_pipelines.stages.probe import ProbeStage
from data_pipelines.stages.split import SplitStage
from data_pipelines.stages.transcode import TranscodeStage, fit, resample
from data_pipelines.workspace import Workspace
from videofm.config import CurateConfig
from videofm.config.curation_stages import CaptionConfig, DedupConfig, FilterConfig, ProbeConfig, SplitConfig, TranscodeConfig
from videofm.data import decode
from videofm.errors import ConfigError, DataError

ALL = [{"kind": kind} for kind in ("probe", "dedup", "split", "filter", "caption")]
TRANSCODE = {"kind": "transcode", "height": 32, "width": 32, "fps": 25.0}


def config(stages, source="videos"):
    return CurateConfig.model_validate({"kind": "curate", "source": str(source), "stages": stages})


def shots(directions, num_frames=24, **kind):
    """Shots with a cut between neighbours, `(T, 32, 32, 3)`."""
    rng = np.random.default_rng(0)
    parts = [demo.render_shot("red", "circle", way, num_frames, 32, rng, i % 2 == 1) for i, way in enumerate(directions)]
    return np.concatenate(parts)


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "video.mp4"
    demo.write_video(path, shots(["left", "right", "up"]), 25)
    return path


def row(path, **changes):
    return Row("0" * 24, path.name, str(path), path.stat().st_size).with_(**changes)


def test_resample_keeps_every_frame_at_the_same_rate():
    assert resample(np.arange(24) / 25, 25.0).tolist() == [1] * 24


@pytest.mark.parametrize(("fps", "length"), [(8.0, 8), (50.0, 48), (24.0, 23), (12.5, 12)])
def test_resample_keeps_the_duration(fps, length):
    counts = resample(np.arange(24) / 25, fps)  # 0.96 s
    assert counts.sum() == length and counts.max() - counts.min() <= 1


def test_resample_of_a_variable_rate_takes_the_nearest_frame():
    # Frames at 0, 0.1, 0.5, 0.6 s; at 10 a second the gap of 0.4 s is filled half by each neighbour (the tie at 0.3 goes back).
    assert resample(np.array([0.0, 0.1, 0.5, 0.6]), 10.0).tolist() == [1, 3, 2, 1]


def test_fit_crops_about_the_centre():
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 200
    assert (fit(image, 20, 20) == 200).all()
    assert fit(image, 64, 32).shape == (64, 32, 3)
    same = np.zeros((20, 20, 3), np.uint8)
    assert fit(same, 20, 20) is same


def test_split_finds_each_cut_and_cuts_long_shots_evenly(video, tmp_path):
    clips = SplitStage(SplitConfig(kind="split")).process(row(video), Workspace(video, tmp_path))
    assert [(clip.start, clip.stop) for clip in clips] == [(0, 24), (24, 48), (48, 72)]
    clips = SplitStage(SplitConfig(kind="split", max_frames=10, min_frames=5)).process(row(video), Workspace(video, tmp_path))
    assert [clip.stop - clip.start for clip in clips] == [8] * 9
    clips = SplitStage(SplitConfig(kind="split", edge_trim=3)).process(row(video), Workspace(video, tmp_path))
    assert [(clip.start, clip.stop) for clip in clips] == [(3, 21), (27, 45), (51, 69)]
    with pytest.raises(Rejected, match="too_short: no shot of 3 has 25 frames"):
        SplitStage(SplitConfig(kind="split", min_frames=25)).process(row(video), Workspace(video, tmp_path))


def test_filter_scores_and_refuses(video, tmp_path):
    work = Workspace(video, tmp_path)
    (kept,) = FilterStage(FilterConfig(kind="filter")).process(row(video, start=24, stop=48), work)
    assert 0.002 < kept.scores["motion"] < 0.1 and 0.05 < kept.scores["brightness"] < 0.6
    for changes, message in (
        ({"min_motion": 0.5}, "static: motion 0.0"),
        ({"min_brightness": 0.9, "max_brightness": 0.95}, "too_dark: brightness"),
        ({"max_brightness": 0.03}, "too_bright: brightness"),
    ):
        with pytest.raises(Rejected, match=message):
            FilterStage(FilterConfig(kind="filter", **changes)).process(row(video), work)


def test_transcode_writes_the_canonical_form(video, tmp_path):
    wanted = TranscodeConfig(kind="transcode", height=48, width=64, fps=12.5, gop=4)
    (clip,) = TranscodeStage(wanted).process(row(video, start=24, stop=48), Workspace(video, tmp_path))
    content = (tmp_path / "000000000000000000000000-00000024.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    info = decode.get("pyav").probe(content)
    assert (info.num_frames, info.fps, info.height, info.width) == (12, 12.5, 48, 64)
    assert (clip.clip.num_frames, clip.clip.fps) == (12, 12.5)
    with av.open(clip.clip.path) as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
        assert not container.streams.audio
    assert keys == [i % 4 == 0 for i in range(12)]
    short = wanted.model_copy(update={"min_frames": 13})
    with pytest.raises(Rejected, match="too_few_frames: 12 frames at 12.5 a second, at least 13"):
        TranscodeStage(short).process(row(video, start=24, stop=48), Workspace(video, tmp_path))


def test_transcode_keeps_pixels_and_bytes(video, tmp_path):
    stage = TranscodeStage(TranscodeConfig(kind="transcode", height=32, width=32, fps=25.0, crf=4))
    work = Workspace(video, tmp_path)
    contents = []
    for start in (48, 0, 48):  # backwards too
        (clip,) = stage.process(row(video, start=start, stop=start + 24), work)
        contents.append((tmp_path / f"{'0' * 24}-{start:08d}.mp4").read_bytes())
    assert contents[0] == contents[2] != contents[1]
    for name in decode.ORDER:
        decoder = decode.get(name)
        if decoder.unavailable() is None:
            before = decoder.read(video, range(48, 72)).astype(float)
            after = decoder.read(contents[0], range(24)).astype(float)
            assert np.abs(before - after).mean() < 2


def test_transcode_is_the_same_every_time(video, tmp_path):
    """With x264's macroblock tree, which is off, about 3 of 100 encodes of such tiny frames differed."""
    stage = TranscodeStage(TranscodeConfig(kind="transcode", height=32, width=32, fps=25.0))
    contents, junk = set(), []
    for number in range(60):
        junk.append(np.full(1000 * number, number, np.uint8))  # move what lies in memory
        stage.process(row(video, start=24, stop=48), Workspace(video, tmp_path))
        contents.add((tmp_path / f"{'0' * 24}-00000024.mp4").read_bytes())
    assert len(contents) == 1
    assert b"mbtree=0" in contents.pop()


def test_find_caption(tmp_path):
    path = tmp_path / "a.mp4"
    assert find_caption(path, 3) == ""
    (tmp_path / "captions.jsonl").write_text('{"file": "b.mp4", "caption": "b"}\n\n{"file": "a.mp4", "caption": "table"}\n')
    assert find_caption(path, 3) == "table"
    spans = [{"start_frame": 0, "end_frame": 4, "caption": "one"}, {"start_frame": 4, "end_frame": 9, "caption": "two"}]
    (tmp_path / "a.json").write_text(json.dumps({"captions": spans}))
    assert [find_caption(path, frame) for frame in (0, 3, 4, 8, 9)] == ["one", "one", "two", "two", ""]
    (tmp_path / "a.json").write_text('{"caption": "whole"}')
    assert find_caption(path, 3) == "whole"
    (tmp_path / "a.txt").write_text("text\n")
    assert find_caption(path, 3) == "text\n"


@pytest.mark.parametrize("content", [b"{", b'"text"', b'{"captions": [{}]}', b"\xff\xfe\x00"])
def test_bad_sidecar_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(Rejected, match="bad_sidecar"):
        find_caption(tmp_path / "a.mp4", 0)


def test_missing_caption_is_kept_or_dropped(video, tmp_path):
    work = Workspace(video, tmp_path)
    (kept,) = CaptionStage(CaptionConfig(kind="caption")).process(row(video, stop=9), work)
    assert kept.caption == "" and work.notes["without_caption"] == 1
    with pytest.raises(Rejected, match="no_caption"):
        CaptionStage(CaptionConfig(kind="caption", missing="drop")).process(row(video, stop=9), work)


def test_dedup_keeps_the_first_by_path():
    def source(name, sha256, packets):
        info = SourceInfo(sha256, packets, "mp4", "h264", 9, 25.0, 32, 32, 1.0)
        return Row(f"id of {name}", name, f"/x/{name}", 1, info)

    rows = [source("c", "1", "p"), source("a", "1", "p"), source("b", "2", "p"), source("d", "3", "q")]
    kept, losses = DedupStage(DedupConfig(kind="dedup")).process_all(rows)
    assert [item.name for item in kept] == ["a", "d"]
    assert [(loss.source, loss.reason, loss.detail) for loss in losses] == [
        ("b", "same_packets", "equals a"), ("c", "same_bytes", "equals a"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_bytes": 10}, "too_many_bytes: .* bytes, at most 10"),
        ({"max_pixels": 1000}, "too_many_pixels: 32x32, at most 1000"),
        ({"min_side": 33}, "too_small: 32x32, at least 33"),
        ({"max_duration": 2.0}, "too_long: 2.9 s, at most 2 s"),
        ({"min_frames": 73}, "too_few_frames: 72 frames, at least 73"),
    ],
)
def test_probe_limits(video, tmp_path, limits, message):
    with pytest.raises(Rejected, match=message):
        ProbeStage(ProbeConfig(kind="probe", **limits)).process(row(video), Workspace(video, tmp_path))


def test_truncated_with_its_index_at_the_front(video, tmp_path):
    wanted = TranscodeConfig(kind="transcode", height=32, width=32, fps=25.0)
    (clip,) = TranscodeStage(wanted).process(row(video), Workspace(video, tmp_path))
    path = tmp_path / "front.mp4"
    content = (tmp_path / f"{'0' * 24}-00000000.mp4").read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])
    with pytest.raises(Unusable, match="truncated: the header promises 72 frames, the file holds"):
        Workspace(path, tmp_path).info()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "not_video"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "not_video"),
        (bytes(np.random.default_rng(0).integers(0, 256, 9999, np.uint8)), "not_video"),
    ],
    ids=["png", "playlist", "noise"],
)
def test_what_is_no_video(tmp_path, content, message):
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    with pytest.raises(Unusable, match=message):
        Workspace(path, tmp_path).info()


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"kind": "dedup"}, TRANSCODE], "'dedup' needs 'probe' before it; the order is dedup, transcode"),
        (ALL, "the last must be 'transcode'"),
        ([{"kind": "split"}, {"kind": "split"}, TRANSCODE], "'split' is named twice"),
    ],
)
def test_stages_that_do_not_fit_together(stages, message):
    with pytest.raises(ConfigError, match=message):
        curate.plan_segments(config(stages))


def test_segments_end_at_barriers():
    segments = curate.plan_segments(config([*ALL, TRANSCODE]))
    assert [[section["kind"] for section in sections] for sections, _ in segments] == [
        ["probe"], ["split", "filter", "caption", "transcode"],
    ]  # fmt: skip
    assert [barrier and barrier.kind for _, barrier in segments] == ["dedup", None]


def test_source_folder_mistakes(tmp_path):
    with pytest.raises(DataError, match="source folder .*nowhere does not exist; set `source`"):
        curate.find_sources(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "readme.md").write_text("x")
    with pytest.raises(DataError, match=r"holds no video file \(looked for .*\.mp4.*\); 1 other files"):
        curate.find_sources(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ConfigError, match="lies in the source folder"):
        curate.find_sources(tmp_path / "in", tmp_path / "in" / "run")
