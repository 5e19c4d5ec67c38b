"""Scores and borders: each number against what was drawn, or against an independent formula."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from data_pipelines import child, measures, video
from data_pipelines.rows import Rejected, Row, unpack_array
from data_pipelines.scan import Wanted
from data_pipelines.stages.borders import BordersStage
from data_pipelines.stages.scores import ScoresStage, evenly_spaced
from data_pipelines.workspace import Workspace
from tests.unit.data_pipelines import media
from videofm.config.curation_stages import MEASURED, BordersConfig, ScoresConfig
from videofm.errors import DataError

H, W = 90, 160
ONE_KEY = {"crf": "4", "g": "250"}
"""With key frames in between, a codec draws a still picture anew, a little differently."""


def texture(seed=0, height=H, width=2 * W, low=30, high=225):
    """A smooth random picture `(H, W, 3)`, wider than a frame, so that it can be panned."""
    small = np.random.default_rng(seed).integers(low, high, (height // 6, width // 6, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def pan(num_frames=25, step=2, seed=0):
    """A texture that moves to the left by `step` pixels a frame."""
    whole = texture(seed)
    return np.stack([whole[:, step * i : step * i + W] for i in range(num_frames)])


def letterbox(frames, bar=18):
    framed = frames.copy()
    framed[:, :bar] = framed[:, -bar:] = 0
    return framed


def file(tmp_path, frames, name="x.mp4", **how):
    return media.write(tmp_path / name, frames, **{"options": {"crf": "4"}, **how})


def row(path, **changes):
    return Row("0" * 24, path.name, str(path), path.stat().st_size).with_(**changes)


def score(path, tmp_path, *, start=0, stop=None, borders=False, work=None, **config):
    """The row of a clip after `borders`, where asked for, and `scores`."""
    work = work or Workspace(path, tmp_path)
    stages = [*([BordersStage(BordersConfig())] if borders else []), ScoresStage(ScoresConfig(**config))]
    for stage in stages:
        stage.prepare(work)
    item = row(path, start=start, stop=stop)
    for stage in stages:
        (item,) = stage.process(item, work)
    return item


def test_all_promised_scores_are_there(tmp_path):
    path = file(tmp_path, pan(9))
    assert tuple(sorted(score(path, tmp_path).scores)) == tuple(sorted(MEASURED))
    assert set(score(path, tmp_path, text=True).scores) == {*MEASURED, *ScoresConfig(text=True).score_names()}


@pytest.mark.parametrize("step", [1, 2, 4])
def test_flow_of_a_pan_is_its_speed(tmp_path, step):
    """`step` pixels a frame at 25 frames a second, of a shorter side of 90 pixels: step x 25 / 90 a second."""
    scores = score(file(tmp_path, pan(step=step)), tmp_path).scores
    assert scores["flow_mean"] == pytest.approx(step * 25 / H, rel=0.15)
    assert scores["flow_min"] <= scores["flow_mean"] <= scores["flow_max"]


def test_motion_and_brightness_are_what_numpy_says(tmp_path):
    frames = pan(12)
    scores = score(file(tmp_path, frames), tmp_path).scores
    values = frames.astype(float) / 255
    assert scores["motion"] == pytest.approx(np.abs(np.diff(values, axis=0)).mean(), rel=0.05)
    assert scores["brightness"] == pytest.approx((values @ [0.299, 0.587, 0.114]).mean(), abs=0.01)
    spread = values.max(axis=-1) - values.min(axis=-1)
    saturation = (spread / values.max(axis=-1).clip(1e-9)).mean(axis=(1, 2))
    assert scores["saturation_mean"] == pytest.approx(saturation.mean(), abs=0.03)
    assert scores["saturation_min"] <= scores["saturation_mean"] <= scores["saturation_max"]


def test_exposure(tmp_path):
    frames = np.full((9, H, W, 3), 128, np.uint8)
    frames[:, :, : W // 4] = 255
    frames[:, :, W // 2 :] = 0
    scores = score(file(tmp_path, frames), tmp_path).scores
    assert (scores["bright_share"], scores["dark_share"]) == pytest.approx((0.25, 0.5), abs=0.02)
    assert scores["saturation_max"] < 0.03


def test_still_frames_and_repeated_frames(tmp_path):
    still = score(file(tmp_path, pan(1).repeat(16, axis=0), options=ONE_KEY), tmp_path).scores
    assert still["static_share"] == still["duplicate_share"] == 1.0 and still["motion"] < 1e-4 and still["flow_max"] < 0.01
    twice = score(file(tmp_path, pan(8).repeat(2, axis=0), "twice.mp4", options=ONE_KEY), tmp_path).scores
    assert twice["static_share"] == pytest.approx(8 / 15, abs=1e-6)  # of 15 steps, 8 lead to the same picture
    moving = score(file(tmp_path, pan(16), "moving.mp4"), tmp_path).scores
    assert moving["static_share"] == moving["duplicate_share"] == 0.0


def test_a_slideshow_is_static_though_it_changes(tmp_path):
    slides = np.concatenate([pan(1, seed=seed).repeat(12, axis=0) for seed in range(3)])
    scores = score(file(tmp_path, slides, options=ONE_KEY), tmp_path).scores
    assert scores["static_share"] == pytest.approx(33 / 35) and scores["motion"] > 0.005


def test_flash(tmp_path):
    frames = np.full((12, H, W, 3), 60, np.uint8)
    frames[6] = 230
    assert score(file(tmp_path, frames), tmp_path).scores["flash"] == pytest.approx(170 / 255, abs=0.02)
    assert score(file(tmp_path, pan(12), "calm.mp4"), tmp_path).scores["flash"] < 0.02


def test_blur_falls_when_a_picture_is_blurred_and_does_not_depend_on_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    sharp = cv2.GaussianBlur(noise, (0, 0), 1)[None].repeat(6, axis=0)
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 4) for frame in sharp])
    large = np.stack([cv2.resize(frame, (W * 2, H * 2), interpolation=cv2.INTER_CUBIC) for frame in sharp])
    values = [
        score(file(tmp_path, frames, f"{i}.mp4"), tmp_path).scores["blur"] for i, frames in enumerate((sharp, blurred, large))
    ]
    assert values[1] < values[0] / 3 and values[2] == pytest.approx(values[0], rel=0.25)


def test_writing_is_told_from_a_texture():
    page = np.full((360, 640), 30, np.uint8)
    for y in (90, 180, 270):
        cv2.putText(page, "THE QUICK BROWN FOX", (40, y), cv2.FONT_HERSHEY_SIMPLEX, 1.4, 230, 3)
    plain = cv2.resize(texture(), (640, 360))[..., 0]
    assert measures.text_area(page) > 0.1 and measures.text_area(np.ascontiguousarray(plain)) < 0.01


def test_a_clip_scores_the_same_alone_and_within_a_longer_source(tmp_path):
    """One pass over the source feeds every clip: the numbers are those of the clip's own frames (lossless here)."""
    lossless = {"crf": "0", "g": "1"}
    clips = [pan(12, step=1, seed=1), pan(16, step=3, seed=2)]
    both = file(tmp_path, np.concatenate(clips), "both.mp4", options=lossless)
    work = Workspace(both, tmp_path)
    for number, (start, clip) in enumerate(zip((0, 12), clips, strict=True)):
        alone = score(file(tmp_path, clip, f"{number}.mp4", options=lossless), tmp_path)
        within = score(both, tmp_path, start=start, stop=start + len(clip), work=work)
        assert within.features == alone.features
        for name in set(MEASURED) - {"flow_mean", "flow_max", "flow_min", "blur"}:
            assert within.scores[name] == alone.scores[name], name
        for name in ("flow_mean", "blur"):  # of other sampled frames
            assert within.scores[name] == pytest.approx(alone.scores[name], rel=0.1)


def test_a_clip_too_short_for_the_sampling_is_measured_anyway(tmp_path):
    path = file(tmp_path, pan(25, step=2))
    scores = score(path, tmp_path, start=1, stop=4, samples_per_second=1.0).scores
    assert scores["flow_mean"] == pytest.approx(2 * 25 / H, rel=0.15) and scores["blur"] > 0
    picture = score(path, tmp_path, start=3, stop=4).scores
    assert (picture["motion"], picture["flow_max"], picture["flash"]) == (0.0, 0.0, 0.0) and picture["blur"] > 0


def test_hashes_are_of_evenly_spaced_frames(tmp_path):
    assert evenly_spaced(16).tolist() == [1, 3, 5, 7, 9, 11, 13, 15] and evenly_spaced(1).tolist() == [0] * 8
    path = file(tmp_path, pan(24, step=5))
    item = score(path, tmp_path, start=4, stop=20)
    hashes = unpack_array(item.features["phash"], "<u8")
    work = Workspace(path, tmp_path)
    work.want(Wanted(scores=True, samples_per_second=4.0))
    assert hashes.tolist() == work.scan().hashes[4 + evenly_spaced(16)].tolist()
    assert item.stop == 20


def test_perceptual_hash_against_its_definition():
    """The signs of the 8x8 lowest DCT-II coefficients of the 32x32 miniature against their median, by the defining sum."""
    grey = texture()[:, :W, 1]
    small = cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(float)
    n, k = np.arange(32), np.arange(8)[:, None]
    basis = np.cos(np.pi * (n + 0.5) * k / 32) * np.where(k == 0, np.sqrt(1 / 32), np.sqrt(2 / 32))
    low = (basis @ small @ basis.T).ravel()
    wanted = sum(1 << (63 - i) for i, value in enumerate(low) if value > np.median(low))
    assert measures.perceptual_hash(np.ascontiguousarray(grey)) == wanted


def test_letterbox_is_found_and_scores_are_of_the_picture_inside(tmp_path):
    plain, boxed = file(tmp_path, pan()[:, 18:72], "plain.mp4"), file(tmp_path, letterbox(pan()), "boxed.mp4")
    inside, whole = score(boxed, tmp_path, borders=True), score(plain, tmp_path, borders=True)
    assert whole.border is None and whole.scores["border_share"] == 0
    top, left, height, width = inside.border
    assert left == 0 and width == W and 18 <= top <= 20 and 50 <= height <= 54 and top + height <= 72
    assert inside.scores["border_share"] == pytest.approx(0.4, abs=0.03)
    for name in ("motion", "brightness", "saturation_mean", "flow_mean"):
        assert inside.scores[name] == pytest.approx(whole.scores[name], rel=0.1), name
    near = np.bitwise_count(unpack_array(inside.features["phash"], "<u8") ^ unpack_array(whole.features["phash"], "<u8"))
    assert near.max() <= 8
    outside = score(boxed, tmp_path).scores
    assert outside["brightness"] == pytest.approx(0.6 * whole.scores["brightness"], rel=0.1)


def test_a_clip_with_another_border_than_its_source_is_measured_by_itself(tmp_path):
    frames = np.concatenate([pan(20), letterbox(pan(20, seed=1))])
    path = file(tmp_path, frames)
    work = Workspace(path, tmp_path)
    open_, boxed = (score(path, tmp_path, start=s, stop=s + 20, borders=True, work=work) for s in (0, 20))
    assert open_.border is None and boxed.border is not None and 18 <= boxed.border[0] <= 20
    alone = score(file(tmp_path, pan(20, seed=1)[:, 18:72], "alone.mp4"), tmp_path).scores
    assert boxed.scores["brightness"] == pytest.approx(alone["brightness"], rel=0.05)


def test_pillarbox_and_rotation(tmp_path):
    frames = pan()
    frames[:, :, :30] = frames[:, :, -30:] = 0
    _, left, _, width = score(file(tmp_path, frames), tmp_path, borders=True).border
    assert 30 <= left <= 32 and 96 <= width <= 100
    turned = media.rotate(file(tmp_path, frames, "turned.mp4"), 90)
    top, _, height, _ = score(turned, tmp_path, borders=True).border
    assert 30 <= top <= 32 and 96 <= height <= 100


def test_a_border_that_changes_within_a_clip_is_refused(tmp_path):
    path = file(tmp_path, np.concatenate([pan(20), letterbox(pan(20))]))
    with pytest.raises(Rejected, match="changing_border: an edge moves by 2.% of the side, at most 3%"):
        score(path, tmp_path, borders=True)


def test_dark_scenes_and_black_frames_have_no_border(tmp_path):
    """A picture that fades to black at its sides, slowly, is a dark scene: nothing is cut off."""
    fade = np.abs(np.linspace(-1, 1, W)) ** 2
    dark = (pan() * (1 - fade[None, None, :, None]) * 0.3).astype(np.uint8)
    assert score(file(tmp_path, dark), tmp_path, borders=True).border is None
    assert score(file(tmp_path, np.zeros((12, H, W, 3), np.uint8), "black.mp4"), tmp_path, borders=True).border is None


def test_writing_on_black_is_mostly_border(tmp_path):
    frames = np.zeros((12, H, W, 3), np.uint8)
    frames[:, 40:52, 50:110] = 255
    with pytest.raises(Rejected, match="mostly_border: 9.% of the picture is black border, at most 60%"):
        score(file(tmp_path, frames), tmp_path, borders=True)


def test_a_kept_scan_that_cannot_be_read_says_so(tmp_path):
    path, kept = file(tmp_path, pan(9)), tmp_path / "scan.npz"
    kept.write_bytes(b"PK\x03\x04 not a scan")
    with pytest.raises(DataError, match="the kept scan .*scan.npz cannot be read .*; delete it and run again"):
        Workspace(path, tmp_path, kept_scan=kept).scan()


def test_a_kept_scan_serves_only_what_it_measured(tmp_path):
    path, kept = file(tmp_path, pan(25)), tmp_path / "scan.npz"
    Workspace(path, tmp_path, kept_scan=kept).scan()
    work = Workspace(path, tmp_path, kept_scan=kept)
    work.want(Wanted(scores=True, samples_per_second=4.0))
    assert len(work.scan().hashes) == 25  # measured now, and kept
    again = Workspace(path, tmp_path, kept_scan=kept).scan()
    assert len(again.hashes) == 25
    assert len(Workspace(path, tmp_path, span=(0.0, 0.5), kept_scan=kept).scan().times) in (12, 13)  # of another source


def test_one_decode_feeds_cuts_borders_and_scores(tmp_path, monkeypatch):
    """All stages of a child process say first what they will measure; then the source is decoded once, for all of them."""
    path = file(tmp_path, np.concatenate([letterbox(pan(20, seed=1)), letterbox(pan(20, seed=2) // 3)]))
    passes, decoded = [], video.decoded
    monkeypatch.setattr(video, "decoded", lambda *arguments: passes.append(arguments) or decoded(*arguments))
    stages = child.build_stages([{"kind": "split"}, {"kind": "borders"}, {"kind": "scores", "text": True}, {"kind": "filter"}])
    *_, last = child.run_stages(stages, [row(path)], Workspace(path, tmp_path))
    assert [(made["start"], made["stop"]) for made in last["rows"]] == [(0, 20), (20, 40)]
    assert all(made["border"] is not None and made["scores"]["text_area"] < 0.5 for made in last["rows"])
    assert len(passes) == 1
