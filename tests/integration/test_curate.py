"""A small demo set through the whole of curation, on Ray."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import curate, demo, engine
from data_pipelines.plan import config_hash
from videofm import shapes
from videofm.config import CurateConfig, DemoDataConfig
from videofm.config.curate import EngineConfig
from videofm.data import decode
from videofm.data.manifest import Manifest
from videofm.data.shards import read_clip
from videofm.errors import DataError, Interrupted
from videofm.run_dir import RunDirectory


def config(source, **engine):
    stages = [{"kind": kind} for kind in ("probe", "dedup", "split", "scores", "filter", "caption")]
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
    """A run with a Ray node of its own, after one that was stopped before its first group. It leaves no trace of Ray."""
    run = RunDirectory(tmp_path_factory.mktemp("curated"))
    run.request_stop()
    with pytest.raises(Interrupted, match="stopped with 0 of 2 groups done .probe.; run it again"):
        curate.run(config(source, group_size=8), run)
    run = RunDirectory(run.path)  # what the next command makes; the object that was told to stop remembers it
    (run.path / "control/stop").unlink()
    before, homes = signal.getsignal(signal.SIGTERM), Path.home() / ".ray"
    existed = homes.exists()
    result = curate.run(config(source, group_size=8), run)
    assert signal.getsignal(signal.SIGTERM) is before
    assert homes.exists() == existed and not list(Path("/tmp").glob(f"vfm-ray-*-{os.getpid()}-*"))
    return run, result


@pytest.fixture(scope="module")
def node(curated):
    """A Ray node for the runs that come after."""
    with engine.cluster(EngineConfig(num_workers=2)):
        yield


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
        "probe": (14, 10, 10), "dedup": (10, 8, 8), "split": (8, 8, 26), "scores": (26, 26, 26), "filter": (26, 24, 24),
        "caption": (24, 24, 24), "transcode": (24, 24, 24),
    }  # fmt: skip
    assert sum(result["num_clips"].values()) == 24 and min(result["num_clips"].values()) > 0
    assert json.loads((run.path / "funnel.json").read_text()) == result
    assert result["config_hash"] == config_hash(config(run.path, group_size=8))
    assert (run.path / "manifest/snapshot.parquet").exists()
    assert not {"scans", "exchange"} & {path.name for path in run.path.iterdir()}


def test_metrics_add_up_while_it_runs(curated):
    """The last line of metrics.jsonl has every group of a run without a break: the same counts as the funnel."""
    run, result = curated
    rows = run.metrics()
    works = ["probe", "dedup", "split+scores+filter+caption+transcode"]
    assert [row["work"] for row in rows if row["groups_done"] == row["groups_total"]] == works
    for live, final in zip(rows[-1]["stages"], result["funnel"], strict=True):
        assert live["num_in"] == live["num_out"] + sum(
            sum(live[kind].values()) for kind in ("dropped", "errors", "quarantined")
        )
        same = set(live) - {"cpu_seconds", "wall_seconds"}  # sums of floating-point numbers in another order
        assert {name: live[name] for name in same} == {name: final[name] for name in same}
    stages = {stage["stage"]: stage for stage in result["funnel"]}
    assert stages["transcode"]["bytes_out"] == sum(record.size for record in Manifest.load(run.path).records())
    assert stages["probe"]["bytes_in"] > 0 and 0 < stages["split"]["latency_p50"] <= stages["split"]["latency_p95"]


def test_clips_show_their_captions(curated):
    run, result = curated
    manifest = Manifest.load(run.path)
    manifest.verify()
    assert manifest.hash == result["manifest_hash"] and len(manifest.entries) == 2
    for record in manifest.records():
        motif = shapes.parse(record.caption)
        frames = decode.get("pyav").read(read_clip(run.path, record), range(record.num_frames)).astype(float)
        assert frames.shape == (24, 32, 32, 3) and record.fps == 25.0 and {"motion", "brightness"} <= set(record.scores)
        spread = frames.max(-1) - frames.min(-1)
        weights = np.where(spread > 90, spread, 0)  # (T, H, W)
        colour = (frames * weights[..., None]).sum((0, 1, 2)) / weights.sum()
        assert min(shapes.COLOURS, key=lambda name: np.abs(np.array(shapes.COLOURS[name]) - colour).sum()) == motif.colour
        grid = np.mgrid[:32, :32]  # (2, H, W)
        centres = (weights[:, None] * grid).sum((2, 3)) / weights.sum((1, 2))[:, None]  # (T, 2)
        assert (centres[-1] - centres[0]) @ np.array(shapes.DIRECTIONS[motif.direction]) > 12


def test_long_sources_in_spans_give_the_same_clips(curated, source, node, tmp_path):
    """Four shots of 24 frames, cut into spans of 48: no shot crosses an edge, so each clip is that of the undivided run."""
    run, _ = curated
    whole = config(source, group_size=8)
    parts = config(source, group_size=8, chunk_seconds=2.0)
    other = RunDirectory(tmp_path / "spans")
    result = curate.run(parts, other)
    funnel = {stage["stage"]: (stage["num_in"], stage["num_made"]) for stage in result["funnel"]}
    assert funnel["chunk"][0] == 8 and funnel["chunk"][1] == funnel["split"][0] > 8
    manifest = Manifest.load(other.path)
    assert any("-0001" in group for group in manifest.table["group"].to_pylist())
    found = sorted((record.source_id, record.sha256) for record in manifest.records())
    assert found == sorted((record.source_id, record.sha256) for record in Manifest.load(run.path).records())
    assert whole.engine.chunk_seconds is None and len({record.key for record in manifest.records()}) == len(found)


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
        fewer = tmp_path / "fewer"
        fewer.mkdir()
        for path in sorted(source.glob("*.m*"))[1:]:
            (fewer / path.name).symlink_to(path)
        with pytest.raises(DataError, match="was committed from other files than .* holds now; choose another run directory"):
            curate.run(config(fewer, group_size=8), run)
        with pytest.raises(DataError, match="holds shards of another config"):
            curate.run(config(source, group_size=7), run)
    assert curate.run(config(source, group_size=8), run)["manifest_hash"] == Manifest.load(run.path).hash


def test_folder_without_a_usable_clip(node, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_text("text")
    with pytest.raises(DataError, match=r"no usable clip: of 1 sources none passed. Refused at probe: not_video \(1\). See "):
        curate.run(config(tmp_path / "in"), RunDirectory(tmp_path / "out"))
    assert lines(tmp_path / "out/quarantine.jsonl") == {"a.mp4": "not_video"}
