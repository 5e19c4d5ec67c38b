"""Stages one by one: resampling, cropping, captions, duplicates, cuts, and what probing refuses."""

from __future__ import annotations

import json
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from pydantic import ValidationError
from scenedetect.common import FrameTimecode
from scenedetect.detectors import HistogramDetector

from data_pipelines import demo
from data_pipelines.rows import Rejected, Row, Unusable
from data_pipelines.stages.caption import CaptionStage, Part, find_caption
from data_pipelines.stages.filter import FilterStage
from data_pipelines.stages.probe import ProbeStage
from data_pipelines.stages.split import SplitStage, _Detectors
from data_pipelines.stages.transcode import TranscodeStage, fit, resample
from data_pipelines.workspace import Workspace
from videofm.config import CurateConfig
from videofm.config.curation_stages import CaptionConfig, FilterConfig, FilterRule, ProbeConfig, SplitConfig, TranscodeConfig
from videofm.data import decode
from videofm.errors import DataError

ALL = [{"kind": kind} for kind in ("probe", "dedup", "split", "scores", "filter", "caption")]
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


@pytest.mark.parametrize(
    "detectors", [{"histogram": None}, {"adaptive": None}, {"adaptive": None, "histogram": None, "content": 27.0}]
)
def test_each_detector_finds_the_cuts(video, tmp_path, detectors):
    clips = SplitStage(SplitConfig(**detectors)).process(row(video), Workspace(video, tmp_path))
    assert [(clip.start, clip.stop) for clip in clips] == [(0, 24), (24, 48), (48, 72)]


def blobs(seed):
    """A picture of large random patches, not of much contrast, BGR float `(90, 160, 3)` in [0, 255]."""
    small = np.random.default_rng(seed).uniform(150, 235, (9, 16, 3)).astype(np.float32)
    return cv2.resize(small, (160, 90), interpolation=cv2.INTER_CUBIC).clip(0, 255)


def test_the_histogram_sees_a_dissolve_and_not_a_change_of_exposure():
    """Each step of the exposure changes the histogram more than the threshold (asserted), yet the picture stays."""
    ramp = [blobs(0) * 0.85**step for step in range(12)]
    mix = [blobs(0) * (1 - share) + (0.6 * blobs(1)) * share for share in np.linspace(0.0, 1.0, 12)]
    frames = {
        "ramp": ramp,
        "dissolve": [blobs(0)] * 3 + mix + [(0.6 * blobs(1))] * 3,
        "cut": [blobs(0)] * 6 + [(0.6 * blobs(1))] * 6,
    }
    alone, found = {}, {}
    for name, pictures in frames.items():
        detector, plain = _Detectors(SplitConfig(adaptive=None)), HistogramDetector(0.2, min_scene_len=0)
        images = list(enumerate(picture.astype(np.uint8) for picture in pictures))
        alone[name] = [cut for index, image in images for cut in plain.process_frame(FrameTimecode(index, 25.0), image)]
        found[name] = [cut for index, image in images for cut in detector.observe(index, image)]
    assert len(alone["ramp"]) > 5 and found["ramp"] == []
    assert found["cut"] == [6]
    assert found["dissolve"] and all(3 < cut < 15 for cut in found["dissolve"])


def test_without_detectors_a_source_is_one_shot(video, tmp_path):
    (clip,) = SplitStage(SplitConfig(adaptive=None, histogram=None)).process(row(video), Workspace(video, tmp_path))
    assert (clip.start, clip.stop) == (0, 72)


def test_split_limits_in_seconds(video, tmp_path):
    stage = SplitStage(SplitConfig(max_seconds=0.5, min_frames=1))  # shots of 0.96 s
    clips = stage.process(row(video), Workspace(video, tmp_path))
    assert [clip.stop - clip.start for clip in clips] == [12] * 6
    with pytest.raises(Rejected, match="too_short: no shot of 3 has 9 frames and 1 s after trimming"):
        SplitStage(SplitConfig(min_seconds=1.0)).process(row(video), Workspace(video, tmp_path))
    assert len(SplitStage(SplitConfig(min_seconds=0.96)).process(row(video), Workspace(video, tmp_path))) == 3


def test_split_cuts_out_black_gaps(tmp_path):
    path, frames = tmp_path / "gaps.mp4", shots(["left", "right"])
    frames[10:14] = 0
    demo.write_video(path, frames, 25)
    clips = SplitStage(SplitConfig(black=0.02, min_frames=5)).process(row(path), Workspace(path, tmp_path))
    assert [(clip.start, clip.stop) for clip in clips] == [(0, 10), (14, 24), (24, 48)]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"motion": 0.1, "flash": 0.5}, None),
        ({"motion": 0.01, "flash": 0.5}, "static: motion 0.01, at least 0.05"),
        ({"motion": 0.1, "flash": 0.95}, "flashes: flash 0.95, at most 0.9"),
    ],
)
def test_filter_by_rules(video, tmp_path, scores, message):
    rules = [FilterRule(score="motion", min=0.05, reason="static"), FilterRule(score="flash", max=0.9, reason="flashes")]
    stage, clip = FilterStage(FilterConfig(rules=rules)), row(video, scores=scores)
    if message is None:
        assert stage.process(clip, Workspace(video, tmp_path)) == [clip]
    else:
        with pytest.raises(Rejected, match=message):
            stage.process(clip, Workspace(video, tmp_path))


@pytest.mark.parametrize("scores", [{}, {"brightness": float("nan")}, {"motion": 0.5}])
def test_filter_on_a_score_that_is_not_there_never_passes(video, tmp_path, scores):
    with pytest.raises(DataError, match="video.mp4 has no score 'brightness', on which the filter has a rule. It has: "):
        FilterStage(FilterConfig()).process(row(video, scores=scores), Workspace(video, tmp_path))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [{"kind": "filter"}],
            "a rule on 'brightness', which no stage before it gives. There are: none; put the stage `scores`",
        ),
        ([{"kind": "filter"}, {"kind": "scores"}], "a rule on 'brightness', which no stage before it gives"),
        (
            [{"kind": "scores"}, {"kind": "filter", "rules": [{"score": "text_area", "max": 0.1, "reason": "text"}]}],
            "a rule on 'text_area', which no stage before it gives. There are: motion, brightness, ",
        ),
        ([{"kind": "scores"}, {"kind": "filter", "rules": [{"score": "motion", "reason": "x"}]}], "neither min nor max"),
        (
            [{"kind": "scores"}, {"kind": "filter", "rules": [{"score": "motion", "min": 1.0, "max": 0.5, "reason": "x"}]}],
            "min 1.0 must be below max 0.5: no clip could pass the rule on 'motion'",
        ),
        ([{"kind": "probe", "min_side": 9000}], "min_side 9000 is above max_side 8192: no source could pass"),
        ([{"kind": "split", "min_frames": 300}], "min_frames 300 is above max_frames 256: no clip could be cut"),
        ([{"kind": "split", "min_seconds": 2.0, "max_seconds": 1.0}], "min_seconds 2.0 is above max_seconds 1.0: no clip"),
        ([{"kind": "transcode", "height": 32}], "give either height and width, or short_side"),
        ([{"kind": "transcode", "height": 32, "width": 32, "short_side": 32}], "give either height and width, or short_side"),
    ],
)
def test_sections_that_make_no_sense(stages, message):
    with pytest.raises(ValidationError, match=message):
        config([*stages, TRANSCODE] if stages[0]["kind"] != "transcode" else stages)


def test_a_filter_on_what_is_scored_is_taken():
    rules = [{"score": "text_area", "max": 0.1, "reason": "text"}, {"score": "border_share", "max": 0.3, "reason": "borders"}]
    found = config([{"kind": "borders"}, {"kind": "scores", "text": True}, {"kind": "filter", "rules": rules}, TRANSCODE])
    (kept,) = [section.rules for section in found.stages if section.kind == "filter"]
    assert [(rule.score, rule.max) for rule in kept] == [("text_area", 0.1), ("border_share", 0.3)]


def test_transcode_writes_the_canonical_form(video, tmp_path):
    wanted = TranscodeConfig(kind="transcode", height=48, width=64, fps=12.5, gop=4, upscale=True)
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


@pytest.mark.parametrize(
    ("wanted", "size"),
    [
        ({"short_side": 16}, (16, 32)),
        ({"short_side": 24}, (24, 48)),
        ({"short_side": 64}, (32, 64)),
        ({"short_side": 64, "upscale": True}, (64, 128)),
        ({"height": 32, "width": 32}, (32, 32)),
        ({"height": 64, "width": 64, "upscale": True}, (64, 64)),
        ({"height": 64, "width": 64}, None),
    ],
)
def test_size_of_the_stored_frames(tmp_path, wanted, size):
    path = tmp_path / "wide.mp4"
    demo.write_video(path, np.concatenate([shots(["left"])] * 2, axis=2), 25)  # 32x64
    stage = TranscodeStage(TranscodeConfig(**wanted))
    if size is None:
        with pytest.raises(Rejected, match="too_small: 32x64, stored are 64x64 without enlarging"):
            stage.process(row(path), Workspace(path, tmp_path))
        return
    (clip,) = stage.process(row(path), Workspace(path, tmp_path))
    assert (clip.clip.height, clip.clip.width) == size and clip.clip.fps == 25.0


def test_transcode_keeps_the_picture_inside_the_border(tmp_path):
    path, frames = tmp_path / "bars.mp4", np.zeros((24, 64, 32, 3), np.uint8)
    frames[:, 16:48] = shots(["left"])
    demo.write_video(path, frames, 25)
    stage = TranscodeStage(TranscodeConfig(short_side=64, crf=4))
    (clip,) = stage.process(row(path, border=(16, 0, 32, 32)), Workspace(path, tmp_path))
    before, after = (decode.get("pyav").read(Path(x), range(24)).astype(float) for x in (path, clip.clip.path))
    assert after.shape == (24, 32, 32, 3) and np.abs(before[:, 16:48] - after).mean() < 2


PART = Part(3, 0.0, 1.0)


def test_find_caption(tmp_path):
    path = tmp_path / "a.mp4"
    assert find_caption(path, PART) == ""
    (tmp_path / "captions.jsonl").write_text('{"file": "b.mp4", "caption": "b"}\n\n{"file": "a.mp4", "caption": "table"}\n')
    assert find_caption(path, PART) == "table"
    spans = [{"start_frame": 0, "end_frame": 4, "caption": "one"}, {"start_frame": 4, "end_frame": 9, "caption": "two"}]
    lines = "\n".join(map(json.dumps, spans))
    for name, content in (("a.jsonl", lines), ("a.json", json.dumps({"captions": spans}))):
        (tmp_path / name).write_text(content)
        found = [find_caption(path, Part(frame, 0.0, 1.0)) for frame in (0, 3, 4, 8, 9)]
        assert found == ["one", "one", "two", "two", ""]
    (tmp_path / "a.json").write_text('{"caption": "whole"}')
    assert find_caption(path, PART) == "whole"
    (tmp_path / "a.txt").write_text("text\n")
    assert find_caption(path, PART) == "text\n"


SRT = "1\n00:00:00,500 --> 00:00:02,000\n<i>first</i>\nline\n\n2\n00:00:02,000 --> 00:00:04,000\n{\\an8}second\n\n"
VTT = (
    "WEBVTT\n\nNOTE not a cue\n\n00:00.500 --> 00:02.000 align:start\nfirst\nline\n\ncue\n01:00:00.000 --> 01:00:01.000\nlate\n"
)


@pytest.mark.parametrize(
    ("name", "content", "seconds", "text"),
    [
        ("a.srt", SRT, (0.0, 2.0), "first line"),
        ("a.srt", SRT, (0.0, 9.0), "first line second"),
        ("a.srt", SRT, (1.3, 3.0), ""),
        ("a.srt", SRT, (3.0, 4.0), "second"),
        ("a.vtt", VTT, (0.0, 9.0), "first line"),
        ("a.vtt", VTT, (3600.0, float("inf")), "late"),
    ],
)
def test_subtitles(tmp_path, name, content, seconds, text):
    """A cue belongs to the clip that holds its middle: 1.25 s and 3 s, here."""
    (tmp_path / name).write_text(content)
    assert find_caption(tmp_path / "a.mp4", Part(0, *seconds)) == text


def test_the_caption_of_the_list_wins(video, tmp_path):
    video.with_suffix(".txt").write_text("sidecar")
    stage = CaptionStage(CaptionConfig(missing="drop"))
    assert stage.process(row(video, caption="from\n the list"), Workspace(video, tmp_path))[0].caption == "from the list"
    assert stage.process(row(video), Workspace(video, tmp_path))[0].caption == "sidecar"


def test_captions_of_a_span_count_from_the_beginning_of_the_source(video, tmp_path):
    spans = [{"start_frame": i * 24, "end_frame": i * 24 + 24, "caption": f"shot {i}"} for i in range(3)]
    video.with_suffix(".json").write_text(json.dumps({"captions": spans}))
    span = (0.96, 1.92)
    (kept,) = CaptionStage(CaptionConfig()).process(row(video, span=span), Workspace(video, tmp_path, span))
    assert kept.caption == "shot 1"
    video.with_suffix(".json").unlink()
    video.with_suffix(".srt").write_text("00:00:01,000 --> 00:00:01,800\nmiddle\n\n00:00:00,000 --> 00:00:00,500\nbefore\n")
    (kept,) = CaptionStage(CaptionConfig()).process(row(video, span=span, stop=20), Workspace(video, tmp_path, span))
    assert kept.caption == "middle"


@pytest.mark.parametrize("content", [b"{", b'"text"', b'{"captions": [{}]}', b"\xff\xfe\x00"])
def test_bad_sidecar_is_refused(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(Rejected, match="bad_sidecar"):
        find_caption(tmp_path / "a.mp4", PART)


def test_a_caption_that_no_shard_can_hold_is_refused(video):
    """JSON can write half a character; UTF-8 cannot."""
    video.with_suffix(".json").write_text('{"caption": "a \\ud800"}')
    with pytest.raises(Rejected, match="bad_caption: the caption is not plain text: .* can't encode character"):
        CaptionStage(CaptionConfig()).process(Row("0" * 24, "a.mp4", str(video), 1), Workspace(video, video.parent))


def test_missing_caption_is_kept_or_dropped(video, tmp_path):
    work = Workspace(video, tmp_path)
    (kept,) = CaptionStage(CaptionConfig(kind="caption")).process(row(video, stop=9), work)
    assert kept.caption == "" and work.notes["without_caption"] == 1
    with pytest.raises(Rejected, match="no_caption"):
        CaptionStage(CaptionConfig(kind="caption", missing="drop")).process(row(video, stop=9), work)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_bytes": 10}, "too_many_bytes: .* bytes, at most 10"),
        ({"max_pixels": 1000}, "too_many_pixels: 32x32, at most 1000"),
        ({"min_side": 33}, "too_small: 32x32, at least 33"),
        ({"max_duration": 2.0}, "too_long: 2.9 s, at most 2 s"),
        ({"min_frames": 73}, "too_few_frames: 72 frames, at least 73"),
        ({"max_frames": 71}, "too_many_frames: 72 frames, at most 71"),
        ({"max_fps": 20.0}, "frame_rate: 25 frames a second, 1 to 20 are taken"),
        ({"max_side": 31}, "too_large: 32x32, at most 31 a side"),
        ({"max_decoded_gib": 0.0001}, "too_much_output: 0.0 GiB when decoded, at most 0.0001"),
    ],
)
def test_probe_limits(video, tmp_path, limits, message):
    with pytest.raises(Rejected, match=message):
        ProbeStage(ProbeConfig(kind="probe", **limits)).process(row(video), Workspace(video, tmp_path))


def test_probe_checks_what_the_list_promised(video, tmp_path):
    with pytest.raises(Unusable, match="checksum: its SHA-256 is .*, the list of sources says 00ff"):
        ProbeStage(ProbeConfig()).process(row(video, promised_sha256="00ff"), Workspace(video, tmp_path))
    with pytest.raises(Unusable, match="missing: the file vanished"):
        ProbeStage(ProbeConfig()).process(Row("0", "gone.mp4", str(tmp_path / "gone.mp4"), 1), Workspace(tmp_path, tmp_path))
