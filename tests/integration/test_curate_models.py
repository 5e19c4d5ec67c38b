"""Models in curation, on Ray: tiny random ones, from raw files to what a shard says of its clips."""

from __future__ import annotations

import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_pipelines import curate, demo, engine
from data_pipelines.plan import config_hash, plan_steps
from data_pipelines.stages.caption_model import CaptionModelStage
from data_pipelines.stages.score_model import ScoreModelStage
from tests.unit.data_pipelines import tiny_models as tiny
from videofm.config import CurateConfig
from videofm.config.curate import EngineConfig
from videofm.config.curation_models import CaptionModelConfig, ScoreModelConfig
from videofm.data.manifest import Manifest
from videofm.errors import CheckpointError
from videofm.run_dir import RunDirectory


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Sources (each of two shots; the last is the first again, in another size) and models."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "videos").mkdir()
    ways = ["left", "right", "up", "down"]
    for i in range(5):
        rng = np.random.default_rng(i)
        shots = [demo.render_shot("red", "circle", ways[(i + j) % 4], 12, 32, rng, (i + j) % 2 == 1) for j in range(2)]
        demo.write_video(folder / "videos" / f"{i}.mp4", np.concatenate(shots), 25)
        if i == 0:
            demo.write_video(folder / "videos" / "copy.mp4", np.concatenate(shots).repeat(2, 1).repeat(2, 2), 25)
    (folder / "videos" / "4.txt").write_text("from a sidecar")
    tiny.save_clip(folder / "clip")
    tiny.save_vlm(folder / "vlm")
    save_file({"weight": torch.linspace(-1, 1, 24)[None]}, folder / "head.safetensors")
    return folder


def sections(place, num_actors):
    clip, pool = str(place / "clip"), {"num_cpus": 0.5, "batch_size": 4, "num_frames": 3}
    return [
        {"kind": "probe"},
        {"kind": "split", "min_frames": 6},
        {"kind": "score_model", "name": "embed", "model": {"kind": "embedding", "weights": clip}, **pool},
        {"kind": "balance", "num_clusters": 2, "max_similarity": 0.9986},
        {
            "kind": "score_model", "name": "beauty", **pool,
            "model": {"kind": "clip_aesthetic", "weights": clip, "head": str(place / "head.safetensors")},
        },
        {"kind": "caption"},
        {
            "kind": "caption_model", "weights": str(place / "vlm"), "height": 384, "width": 384,
            "prompts": {"short": "Describe shortly", "dense": "Describe"}, "max_new_tokens": 5, "max_repetition": 1.0,
            "refusals": [], "num_actors": num_actors, **pool,
        },
        {"kind": "transcode", "height": 32, "width": 32, "fps": 25.0},
    ]  # fmt: skip


def config(place, num_actors, **engine):
    value = {
        "kind": "curate", "source": str(place / "videos"), "stages": sections(place, num_actors), "held_out": 0.2,
        "engine": {"num_workers": 2, "group_size": 3, **engine},
    }  # fmt: skip
    return CurateConfig.model_validate(value)


@pytest.fixture(scope="module")
def node():
    """A Ray node for all runs."""
    with engine.cluster(EngineConfig(num_workers=2)):
        yield


@pytest.fixture(scope="module")
def curated(place, node, tmp_path_factory):
    run = RunDirectory(tmp_path_factory.mktemp("curated"))
    return run, curate.run(config(place, 1), run)


def clips_of(run):
    """Key -> what the shard says of the clip."""
    found = {}
    for path in sorted((run.path / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    found[member.name.removesuffix(".json")] = json.load(tar.extractfile(member))
    return found


def test_scores_and_captions_reach_the_shards_with_their_models(place, curated):
    run, result = curated
    funnel = {stage["stage"]: stage for stage in result["funnel"]}
    assert list(funnel) == ["probe", "split", "embed", "balance", "beauty", "caption", "caption_model", "transcode"]
    assert (funnel["embed"]["num_in"], funnel["embed"]["num_out"]) == (12, 12)
    dropped = [json.loads(line) for line in (run.path / "dropped.jsonl").read_text().splitlines()]
    assert [line["source"] for line in dropped if line["reason"] == "near_duplicate"].count("0.mp4") == 2
    assert "copy.mp4" not in {line["source"] for line in dropped}, "of copies the larger one stays"
    _, beauty, captions = (
        made(schema.model_validate(section)).weights_hash()
        for made, schema, section in (
            (ScoreModelStage, ScoreModelConfig, sections(place, 1)[2]),
            (ScoreModelStage, ScoreModelConfig, sections(place, 1)[4]),
            (CaptionModelStage, CaptionModelConfig, sections(place, 1)[6]),
        )
    )
    found = clips_of(run)
    assert len(found) == funnel["transcode"]["num_out"] > 3
    for value in found.values():
        assert value["scored_by"]["aesthetic"] == beauty
        written = value["source"]["name"] != "4.mp4"
        assert (value["scored_by"].get("caption") == captions) == written
        if written:
            assert value["caption"] == value["captions"]["dense"]
        else:
            assert value["caption"] == "from a sidecar" and "captions" not in value
    scores = [record.scores["aesthetic"] for record in Manifest.load(run.path).records()]
    assert len(set(scores)) > 3


def test_more_actors_and_other_batches_give_the_same_dataset(place, curated, tmp_path):
    """The captions are written once more, from what the steps before left, by two actors; with 1 MiB a batch, every clip of 3
    frames of 384x384 travels by itself, with 16 MiB a group does."""
    run, result = curated
    captions = next(number for number, step in enumerate(plan_steps(config(place, 2))) if "caption_model" in step.names)
    for name in ("sources", *(f"groups/{number}" for number in range(captions))):
        shutil.copytree(run.path / name, tmp_path / name)
    other = curate.run(config(place, 2, batch_mib=1, num_workers=4), RunDirectory(tmp_path))
    assert other["manifest_hash"] == result["manifest_hash"]
    assert {line["work"] for line in RunDirectory(tmp_path).metrics()} == {"caption_model", "transcode"}


def test_other_weights_are_another_dataset(place, tmp_path):
    """One weight of the head changes the hash of the config; without the file nothing begins."""
    from_other_head = config(place, 1)
    first = config_hash(from_other_head)
    head = (place / "head.safetensors").read_bytes()
    try:
        save_file({"weight": torch.linspace(-1, 2, 24)[None]}, place / "head.safetensors")
        assert config_hash(from_other_head) != first
        (place / "head.safetensors").unlink()
        with pytest.raises(CheckpointError, match="head.safetensors are missing"):
            curate.run(from_other_head, RunDirectory(tmp_path))
    finally:
        (place / "head.safetensors").write_bytes(head)
