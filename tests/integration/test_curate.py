"""A small demo set through the whole of curation, on Ray."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import curate, demo
from videofm import shapes
from videofm.config import CurateConfig, DemoDataConfig
from videofm.data import decode
from videofm.data.manifest import Manifest
from videofm.data.shards import read_clip
from videofm.errors import DataError, Interrupted
from videofm.run_dir import RunDirectory


def config(source, **engine):
    stages = [{"kind": kind} for kind in ("probe", "dedup", "split", "filter", "caption")]
    stages.append({"kind": "transcode", "height": 32, "width": 32, "fps": 25.0})
    value = {"kind": "curate", "source": str(source), "stages": stages, "held_out": 0.2, "engine": {"num_workers": 2, **engine}}
    return CurateConfig.model_validate(value)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    run = RunDirectory(tmp_path_factory.mktemp("demo"))
    demo.run(DemoDataConfig(kind="demo_data", num_videos=6), run)
    return run.path / "videos"


@pytest.fixture(scope="module")
def curated(source, tmp_path_factory):
    run = RunDirectory(tmp_path_factory.mktemp("curated"))
    before = signal.getsignal(signal.SIGTERM)
    result = curate.run(config(source, group_size=8), run)
    assert signal.getsignal(signal.SIGTERM) is before
    return run, result


def lines(path):
    return {line["source"]: line["reason"] for line in map(json.loads, path.read_text().splitlines())}


def test_funnel_and_reasons(curated):
    run, result = curated
    assert lines(run.path / "quarantine.jsonl") == {
        "odd-truncated.mp4": "truncated", "odd-audio-only.mp4": "no_video", "odd-empty.mp4": "empty",
        "odd-text.mp4": "not_video",
    }  # fmt: skip
    assert lines(run.path / "dropped.jsonl") == {
        "odd-duplicate.mp4": "same_bytes", "odd-remuxed.mkv": "same_packets", "odd-static.mp4": "static",
        "odd-black.mp4": "too_dark",
    }  # fmt: skip
    funnel = {stage["stage"]: (stage["num_in"], stage["num_out"], stage["num_made"]) for stage in result["funnel"]}
    assert funnel == {
        "probe": (14, 10, 10), "dedup": (10, 8, 8), "split": (8, 8, 26), "filter": (26, 24, 24), "caption": (24, 24, 24),
        "transcode": (24, 24, 24),
    }  # fmt: skip
    assert sum(result["num_clips"].values()) == 24 and min(result["num_clips"].values()) > 0
    assert json.loads((run.path / "funnel.json").read_text()) == result


def test_clips_show_their_captions(curated):
    run, result = curated
    manifest = Manifest.load(run.path)
    manifest.verify()
    assert manifest.hash == result["manifest_hash"] and len(manifest.entries) == 2
    for record in manifest.records():
        motif = shapes.parse(record.caption)
        frames = decode.get("pyav").read(read_clip(run.path, record), range(record.num_frames)).astype(float)
        assert frames.shape == (24, 32, 32, 3) and record.fps == 25.0 and set(record.scores) == {"motion", "brightness"}
        spread = frames.max(-1) - frames.min(-1)
        weights = np.where(spread > 90, spread, 0)  # (T, H, W)
        colour = (frames * weights[..., None]).sum((0, 1, 2)) / weights.sum()
        assert min(shapes.COLOURS, key=lambda name: np.abs(np.array(shapes.COLOURS[name]) - colour).sum()) == motif.colour
        grid = np.mgrid[:32, :32]  # (2, H, W)
        centres = (weights[:, None] * grid).sum((2, 3)) / weights.sum((1, 2))[:, None]  # (T, 2)
        assert (centres[-1] - centres[0]) @ np.array(shapes.DIRECTIONS[motif.direction]) > 12


def test_second_run_does_nothing(curated, source):
    run, result = curated
    files = [path for folder in ("shards", "index", "manifest") for path in (run.path / folder).iterdir()]
    before = {path: path.stat().st_mtime_ns for path in files}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipelines.engine.cluster", None)  # would fail if Ray were started
        assert curate.run(config(source, group_size=8), run) == result
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_changed_source_folder_is_refused(curated, source, tmp_path):
    run, _ = curated
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipelines.engine.cluster", None)
        find = curate.find_sources
        patch.setattr(curate, "find_sources", lambda *a: (find(*a)[0][1:], 0))
        with pytest.raises(DataError, match="was committed from other files than .* holds now; choose another run directory"):
            curate.run(config(source, group_size=8), run)
        patch.setattr(curate, "find_sources", find)
        with pytest.raises(DataError, match="holds shards of another config"):
            curate.run(config(source, group_size=7), run)


def test_stop_then_go_on_and_nothing_left_behind(source, tmp_path):
    """A stop before the first group, then a whole run in one group with one source a side at least; Ray leaves no trace."""
    run = RunDirectory(tmp_path / "run")
    run.request_stop()
    with pytest.raises(Interrupted, match="stopped with 0 of 1 groups done .probe.; run it again"):
        curate.run(config(source), run)
    (run.path / "control/stop").unlink()
    homes = Path.home() / ".ray"
    existed = homes.exists()
    result = curate.run(config(source), run)
    assert min(result["num_clips"].values()) > 0
    assert homes.exists() == existed and not list(Path("/tmp").glob(f"vfm-ray-{os.getpid()}-*"))


def test_folder_without_a_usable_clip(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_text("text")
    with pytest.raises(DataError, match=r"no usable clip: of 1 sources none passed. Refused at probe: not_video \(1\). See "):
        curate.run(config(tmp_path / "in"), RunDirectory(tmp_path / "out"))
    assert lines(tmp_path / "out/quarantine.jsonl") == {"a.mp4": "not_video"}
