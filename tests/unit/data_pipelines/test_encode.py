"""Encoding a shard: what is stored is what the live encoders give, whoever encodes and however often it is begun again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.encode.run import decoding, dry_run, run
from data_pipelines.encode.shard import ShardEncoder, data_config
from tests.demo_shards import write_demo_shards, write_mixed_shards
from tests.unit.encoding import encode_config, save_encoders
from videofm import models
from videofm.config.data import DataConfig
from videofm.config.encode import EncodeConfig
from videofm.data import processes
from videofm.data.buckets import Buckets
from videofm.data.decode import choose
from videofm.data.encoded import ClipCache, batch_fields
from videofm.data.fixed import fixed_draw, pixels
from videofm.data.index import ClipRecord
from videofm.data.manifest import Manifest
from videofm.data.plan import DataPlan
from videofm.data.reader import video_tensor
from videofm.data.shards import read_clip
from videofm.data.sidecar import Sidecars
from videofm.errors import DataError
from videofm.run_dir import RunDirectory


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A dataset of 5 clips in 2 shards (the last one held out), encoders, and a run that encoded it whole."""
    folder = tmp_path_factory.mktemp("encode")
    shards, encoders = write_demo_shards(folder / "shards", 5, 2, 11, 32, 1), save_encoders(folder)
    config = encode_config(shards, encoders, split="all")
    encoder = ShardEncoder(config, folder / "run", "cpu")
    reports = [encoder.encode(group) for group in ("00000", "00001")]
    return {
        "folder": folder,
        "shards": shards,
        "encoders": encoders,
        "config": config,
        "run": folder / "run",
        "reports": reports,
    }


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a cache."""
    names = ("sidecars", "index", "manifest")
    files = [path for name in names for path in (folder / name).iterdir()] + list(folder.glob("header-*.json"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def cache_of(shared: dict[str, Any], **changes: Any) -> ClipCache:
    values = data_config(shared["config"]).model_dump() | {"cache": {"path": str(shared["run"])}} | changes
    return ClipCache(DataConfig.model_validate(values))


def group_of(record: ClipRecord) -> str:
    return Path(record.shard).name.removeprefix("shard-").removesuffix(".tar")


def test_what_is_stored_is_what_the_live_encoders_give(shared: dict[str, Any]) -> None:
    assert [report.num_clips for report in shared["reports"]] == [{"latents": 3, "text": 3}, {"latents": 2, "text": 2}]
    cache, data = cache_of(shared), data_config(shared["config"])
    vae, text_encoder = (models.load(shared["encoders"][role]) for role in ("vae", "text_encoder"))
    plan = DataPlan.open(data, 0)
    for record in Manifest.load(shared["shards"]).records():
        draw = fixed_draw(record, data, None)
        assert draw is not None
        stored = cache.read("", group_of(record), record, draw)
        video = _pixels(plan, record, draw)
        with torch.no_grad():
            posterior, text = vae.encode(video), text_encoder.encode([record.caption, ""])
        fields = batch_fields([stored], 128)
        torch.testing.assert_close(fields["latents"], posterior.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(fields["logvar"], posterior.logvar, rtol=0, atol=1e-5)
        assert fields["text_lengths"] == text.mask.sum(dim=1).tolist() == [len(record.caption) + 1, 1]
        for row, length in enumerate(fields["text_lengths"]):
            torch.testing.assert_close(fields["text"][row, :length], text.embeddings[row, :length], rtol=0, atol=1e-5)
            assert not fields["text"][row, length:].any()


def _pixels(plan: DataPlan, record: Any, draw: Any) -> torch.Tensor:
    frames = choose("auto").read(read_clip(plan.sources[""].dataset.place, record), draw.frames)
    return video_tensor(frames[None])


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(shared: dict[str, Any], tmp_path: Path) -> None:
    """One shard is done, of the other there is what a killed writer leaves: files under temporary names, one kind committed."""
    run = tmp_path / "run"
    ShardEncoder(shared["config"], run, "cpu").encode("00001")
    for kind in ("latents", "text"):
        (run / f"sidecars/shard-00000.{kind}.tar.tmp-1-ab").write_bytes(b"half of a tar")
    second = ShardEncoder(shared["config"], run, "cpu")
    second.encode("00000")
    before = tree(run)
    assert second.encode("00000") == shared["reports"][0]
    assert tree(run) == before
    found = {name: sha256 for name, sha256 in before.items() if ".tmp-" not in name}
    assert found == tree(shared["run"])


def test_a_stop_commits_nothing_of_the_shard(shared: dict[str, Any], tmp_path: Path) -> None:
    encoder = ShardEncoder(shared["config"], tmp_path, "cpu")
    RunDirectory(tmp_path).request_stop()
    assert encoder.encode("00000") is None
    assert not list((tmp_path / "sidecars").iterdir()) and not list((tmp_path / "manifest").iterdir())


def test_a_clip_that_does_not_decode_is_named_and_the_others_are_there(shared: dict[str, Any], tmp_path: Path) -> None:
    shards = write_demo_shards(tmp_path / "shards", 3, 1, 9, 32, 0)
    record = Manifest.load(shards).records()[1]
    with (shards / record.shard).open("r+b") as file:
        file.seek(record.offset + record.size // 2)
        file.write(b"\0" * 64)
    report = ShardEncoder(encode_config(shards, shared["encoders"]), tmp_path / "run", "cpu").encode("00000")
    assert report is not None
    assert (report.num_clips, report.num_failed) == ({"latents": 2, "text": 3}, 1)
    failed = Sidecars(str(tmp_path / "run"), "latents").entry("00000").failed
    assert list(failed) == [record.key]
    assert "SHA-256" in failed[record.key]


def test_clips_that_hang_or_crash_their_decoder_cost_themselves_alone(
    shared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three clips one hangs and one crashes, in a decoding process as an actor has it; the sidecar holds the third."""
    hangs, crashes, sound = [record for record in Manifest.load(shared["shards"]).records() if "00000" in record.shard]
    monkeypatch.setenv("VIDEOFM_STUB_FAULTS", json.dumps({hangs.sha256: "hang", crashes.sha256: "crash"}))
    monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-m", "tests.stub_nursery"))
    config = encode_config(shared["shards"], shared["encoders"], split="all", text=None, engine={"decode_timeout": 0.5})
    pool = decoding(config)
    assert pool is not None
    with closing(pool):
        report = ShardEncoder(config, tmp_path, "cpu", pool).encode("00000")
    assert report is not None and (report.num_clips, report.num_failed) == ({"latents": 1}, 2)
    failed = Sidecars(str(tmp_path), "latents").entry("00000").failed
    assert "took the process down 2 times (no end within" in failed[hangs.key]
    assert "took the process down 2 times" in failed[crashes.key]
    data = data_config(config)
    mine, whole = (Sidecars(str(run), "latents") for run in (tmp_path, shared["run"]))
    found, wanted = (sidecars.read("00000", sound.key, _made_from(sound, data)) for sidecars in (mine, whole))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_other_weights_in_the_same_run_directory_are_refused(shared: dict[str, Any], tmp_path: Path) -> None:
    other = save_encoders(tmp_path, seed=1)
    config = encode_config(shared["shards"], {**shared["encoders"], "vae": other["vae"]}, split="all")
    with pytest.raises(DataError, match=r"holds latents of another encoder: encoder\.weights was '\w{12}', now '\w{12}'"):
        ShardEncoder(config, shared["run"], "cpu")


def test_a_shard_that_changed_is_refused(shared: dict[str, Any], tmp_path: Path) -> None:
    """The same group in another dataset: its captions are those of other clips."""
    other = write_demo_shards(tmp_path / "shards", 6, 2, 11, 32, 1)
    encoder = ShardEncoder(encode_config(other, shared["encoders"], split="all"), shared["run"], "cpu")
    with pytest.raises(DataError, match=r"the latents of shard 00001 in .* were made from a tar with SHA-256"):
        encoder.encode("00001")


def test_split_and_view_choose_clips(shared: dict[str, Any], tmp_path: Path) -> None:
    views = {frames: tmp_path / f"view-{frames}.yaml" for frames in (11, 12)}
    for frames, path in views.items():
        path.write_text(json.dumps({"rules": {"long": {"field": "num_frames", "min": frames}}}))
    cases = [({"split": "held_out"}, 1), ({"split": "train"}, 4)]
    cases += [({"split": "all", "view": str(views[frames])}, count) for frames, count in ((11, 5), (12, 0))]
    for changes, count in cases:
        config = encode_config(shared["shards"], shared["encoders"], latents=None, **changes)
        encoder = ShardEncoder(config, tmp_path / f"run-{count}", "cpu")
        reports = [encoder.encode(group) for group in ("00000", "00001")]
        assert sum(report.num_clips["text"] for report in reports if report is not None) == count


def test_samples_are_drawn_by_the_clip_and_half_as_large(shared: dict[str, Any], tmp_path: Path) -> None:
    section = {"vae": {"path": shared["encoders"]["vae"]}, "store": "sample", "dtype": "bf16", "precision": "fp32"}
    stored = []
    for batch_size in (1, 2):
        config = encode_config(shared["shards"], shared["encoders"], latents={**section, "batch_size": batch_size}, text=None)
        ShardEncoder(config, tmp_path / str(batch_size), "cpu").encode("00000")
        record = Manifest.load(shared["shards"]).records("train")[0]
        sidecars, data = Sidecars(str(tmp_path / str(batch_size)), "latents"), data_config(config)
        stored.append(sidecars.read("00000", record.key, _made_from(record, data)))
    assert [list(tensors) for tensors in stored] == [["sample"]] * 2
    assert stored[0]["sample"].dtype == torch.bfloat16
    torch.testing.assert_close(stored[0]["sample"], stored[1]["sample"], rtol=0.02, atol=0.02)
    posterior = cache_of(shared).read("", group_of(record), record, fixed_draw(record, data, None)).latents
    distance = (stored[0]["sample"].float() - posterior["mean"]) / (0.5 * posterior["logvar"]).exp()
    assert 0.7 < float(distance.std()) < 1.3


def _made_from(record: Any, data: DataConfig) -> dict[str, Any]:
    draw = fixed_draw(record, data, None)
    assert draw is not None
    return {"video": record.sha256, **pixels(draw)}


BUCKETS = {
    "sizes": [{"num_frames": 9, "height": 32, "width": 32}, {"num_frames": 5, "height": 32, "width": 48}],
    "token": {"num_frames": 8, "height": 32, "width": 16},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"start": "centre"},
        {"start": "first", "frame_stride": 2, "num_frames": 5},
        {"start": "centre", "crop": "centre", "resize_short_side": 36, "height": 32, "width": 40},
        {"crop": "centre", "buckets": BUCKETS},
    ],
    ids=["centre", "stride", "resize", "buckets"],
)
def test_a_plan_that_leaves_nothing_to_chance_draws_what_is_encoded(
    changes: dict[str, Any], shared: dict[str, Any], tmp_path: Path
) -> None:
    shapes = [(11, 32, 32), (17, 40, 48), (9, 32, 48), (20, 48, 64), (12, 64, 40), (10, 32, 32)]
    shards = write_mixed_shards(tmp_path / "shards", shapes)
    config = encode_config(shards, shared["encoders"], **changes)
    data = data_config(config).model_copy(update={"micro_batch_size": 1, "buckets": config.buckets})
    plan, buckets = DataPlan.open(data, 3), Buckets(data) if data.buckets else None
    drawn: dict[str, set[Any]] = {}
    for step in islice(plan.steps(), 24):
        for draw in step.micro_batches[0]:
            drawn.setdefault(draw.key, set()).add(replace(draw, epoch=0, shard=0, step=0))
    fixed = {record.key: fixed_draw(record, data, buckets) for record in Manifest.load(shards).records()}
    assert drawn == {key: {draw} for key, draw in fixed.items() if draw is not None}
    # The section that `videofm encode` makes for itself cuts the same.
    own = data_config(config)
    again = {r.key: fixed_draw(r, own, Buckets(own) if own.buckets else None) for r in Manifest.load(shards).records()}
    assert again == fixed


def test_what_cannot_be_encoded_is_refused(shared: dict[str, Any]) -> None:
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            encode_config(shared["shards"], shared["encoders"], **changes)

    refused("nothing to encode: give latents, tokens, text, or several of them", latents=None, text=None)
    refused("give either `path`", text={"encoder": {}})
    refused(r"'text/t5' would get fresh weights.*overrides\.path", text={"encoder": {"name": "text/t5"}})
    images = {**BUCKETS, "sizes": [*BUCKETS["sizes"], {"num_frames": 1, "height": 32, "width": 32}], "image_share": 0.5}
    refused(r"buckets\.image_share 0\.5 draws other images", buckets=images)
    assert dry_run(shared["config"]) == "latents and text of clips of 9x32x32, 1 actors"
    assert EncodeConfig.model_validate(shared["config"].model_dump()) == shared["config"]


def test_what_killed_writers_left_is_removed_when_it_is_old(shared: dict[str, Any], tmp_path: Path) -> None:
    """All shards are done, so no actor starts; what is young may belong to another run at work."""
    folder = tmp_path / "run"
    shutil.copytree(shared["run"], folder)
    before = tree(folder)
    old = [folder / f"{name}.tmp-{9 + index}-0a1b2c3d" for index, name in enumerate(
        ("sidecars/shard-00000.latents.tar", "index/shard-00000.text.parquet", "manifest/.shard-00000.text.json")
    )]  # fmt: skip
    young = folder / "sidecars/shard-00001.latents.tar.tmp-8-0a1b2c3d"
    for path in (*old, young):
        path.write_bytes(b"half")
    then = time.time() - 25 * 3600
    for path in (folder / "sidecars").iterdir():
        if path != young:
            os.utime(path, (then, then))
    for path in old:
        os.utime(path, (then, then))
    assert run(shared["config"], RunDirectory(folder))["num_shards"] == 2
    assert not any(path.exists() for path in old) and young.exists()
    young.unlink()
    assert tree(folder) == before
