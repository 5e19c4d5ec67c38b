"""Micro-batches that were encoded before: the loss is that of the pixels, a clip that is missing gets a spare, and what a cache
cannot hold is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.encode.shard import ShardEncoder, data_config
from tests.demo_shards import write_demo_shards, write_mixed_shards
from tests.unit.encoding import encode_config, save_encoders
from videofm import models
from videofm.config.data import DataConfig
from videofm.config.flow_matching import FlowMatchingConfig
from videofm.config.train import TrainConfig
from videofm.data.encoded import ClipCache, batch_fields
from videofm.data.encoded_loader import EncodedLoader
from videofm.data.index import write_index
from videofm.data.loader import StepLoader
from videofm.data.manifest import Manifest, entry_path, publish
from videofm.errors import DataError
from videofm.objectives.flow_matching import FlowMatchingObjective
from videofm.parallel.rng import KeyedRng


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Six clips in two shards of which one does not decode, and a cache of them."""
    folder = tmp_path_factory.mktemp("encoded")
    shards, encoders = write_demo_shards(folder / "shards", 6, 2, 11, 32, 0), save_encoders(folder)
    bad = Manifest.load(shards).records()[2]
    with (shards / bad.shard).open("r+b") as file:
        file.seek(bad.offset + bad.size // 2)
        file.write(b"\0" * 64)
    config = encode_config(shards, encoders)
    encoder = ShardEncoder(config, folder / "run", "cpu")
    for group in ("00000", "00001"):
        encoder.encode(group)
    return {"config": config, "encoders": encoders, "run": folder / "run", "bad": bad.key}


def data(shared: dict[str, Any], **changes: Any) -> DataConfig:
    values = data_config(shared["config"]).model_dump() | {"micro_batch_size": 2, "num_micro_batches": 2}
    return DataConfig.model_validate(values | {"cache": {"path": str(shared["run"])}} | changes)


@pytest.mark.parametrize("mode", ["full", "latents"])
def test_the_loss_of_a_cache_is_that_of_the_pixels(shared: dict[str, Any], mode: str) -> None:
    """Three steps, on which every clip comes once or more, with dropped captions; the bad clip has the same spare in both."""
    config = data(shared, cache={"path": str(shared["run"]), "mode": mode})
    roles: dict[str, Any] = {role: models.load(path) for role, path in shared["encoders"].items()}
    torch.manual_seed(3)
    roles["dit"] = models.build("dit/ltx", size="tiny")
    objective = FlowMatchingObjective(FlowMatchingConfig(kind="flow_matching", caption_dropout=0.5))
    live = islice(StepLoader(config, 0).steps(), 3)
    cached = islice(EncodedLoader(config, 0, ClipCache(config)).steps(), 3)
    replaced, dropped = 0, 0
    for step, other in zip(live, cached, strict=True):
        assert (step.after, step.num_replaced) == (other.after, other.num_replaced)
        replaced += other.num_replaced
        for batch, encoded in zip(step.batches, other.batches, strict=True):
            assert (encoded.sample_ids, encoded.captions) == (batch.sample_ids, batch.captions)
            assert encoded.video.numel() == 0 and (encoded.text is None) == (mode == "latents")
            rng = KeyedRng(0, batch.step, batch.sample_ids)
            dropped += int((rng.uniform("caption") < 0.5).sum())
            losses = [objective.loss(roles, part.to("cpu"), rng, "train") for part in (batch, encoded)]
            torch.testing.assert_close(losses[1].total, losses[0].total, rtol=1e-6, atol=1e-6)
            for name, value in losses[0].metrics.items():
                torch.testing.assert_close(losses[1].metrics[name], value, rtol=1e-5, atol=1e-6)
    assert replaced == 2 and 0 < dropped < 12  # the bad clip comes once an epoch, and twelve samples are two epochs


def test_packs_of_a_cache(tmp_path: Path) -> None:
    """Clips of 48 and 32 tokens in packs of 130, encoded before: the loss is that of the pixels."""
    shards, encoders = write_mixed_shards(tmp_path / "shards", [(10, 32, 32), (6, 32, 32)] * 4), save_encoders(tmp_path)
    sizes = [{"num_frames": num_frames, "height": 32, "width": 32} for num_frames in (9, 5)]
    buckets = {"sizes": sizes, "token": {"num_frames": 4, "height": 8, "width": 8}}
    encoding = encode_config(shards, encoders, buckets=buckets)
    for group in ("00000", "00001"):
        ShardEncoder(encoding, tmp_path / "run", "cpu").encode(group)
    packs = {"buckets": buckets, "micro_batch_size": 2, "num_micro_batches": 1, "packing": {"num_tokens": 130}}
    config = DataConfig.model_validate(
        data_config(encoding).model_dump() | packs | {"cache": {"path": str(tmp_path / "run")}},
    )
    roles: dict[str, Any] = {role: models.load(path) for role, path in encoders.items()}
    roles["dit"] = models.build("dit/ltx", size="tiny")
    objective = FlowMatchingObjective(FlowMatchingConfig(kind="flow_matching", caption_dropout=0.5))
    live = islice(StepLoader(config, 0).steps(), 3)
    cached = islice(EncodedLoader(config, 0, ClipCache(config)).steps(), 3)
    num_parts = []
    for step, other in zip(live, cached, strict=True):
        assert (step.after, step.fill, step.num_samples) == (other.after, other.fill, other.num_samples)
        (batch,), (encoded,) = step.batches, other.batches
        assert (encoded.sample_ids, encoded.captions) == (batch.sample_ids, batch.captions)
        assert [part.sample_ids for part in encoded.parts] == [part.sample_ids for part in batch.parts]
        assert all(part.video.numel() == 0 and part.latents is not None for part in encoded.parts)
        num_parts.append(len(encoded.parts))
        rng = KeyedRng(0, batch.step, batch.sample_ids)
        losses = [objective.loss(roles, one.to("cpu"), rng, "train") for one in (batch, encoded)]
        torch.testing.assert_close(losses[1].total, losses[0].total, rtol=1e-6, atol=1e-6)
        for name, value in losses[0].metrics.items():
            torch.testing.assert_close(losses[1].metrics[name], value, rtol=1e-5, atol=1e-6)
    assert max(num_parts) == 2


def test_text_alone_comes_with_pixels(shared: dict[str, Any]) -> None:
    config = data(shared, cache={"path": str(shared["run"]), "mode": "text"}, start="random", frame_strides=[1])
    step = next(EncodedLoader(config, 0, ClipCache(config)).steps())
    for batch in step.batches:
        assert batch.video.shape == (2, 3, 9, 32, 32) and batch.latents is None
        assert batch.text is not None and batch.text_lengths == [len(caption) + 1 for caption in [*batch.captions, ""]]
        moved = replace(batch, latents=batch.text).to("meta")
        assert moved.latents is not None and moved.latents.device.type == moved.video.device.type == "meta"


def test_damaged_text_gets_a_spare(shared: dict[str, Any], tmp_path: Path) -> None:
    """Only the text of one clip is damaged; each decodes but one, whose place is taken as always."""
    run = tmp_path / "run"
    shutil.copytree(shared["run"], run)
    config = data(shared, cache={"path": str(run), "mode": "text"})
    loader = EncodedLoader(config, 0, ClipCache(config))
    hurt = next(r for r in Manifest.load(str(config.manifest)).records() if r.key != shared["bad"])
    index = ClipCache(config).sidecars["data"]["text"]._index("00000")
    with (run / index.tar).open("r+b") as file:
        file.seek(index.value(hurt.key, "offset") + index.value(hurt.key, "size") // 2)
        file.write(b"\xff\x00\xff")
    steps = list(islice(loader.steps(), 3))
    used = {sample_id for step in steps for batch in step.batches for sample_id in batch.sample_ids}
    assert sum(step.num_replaced for step in steps) >= 3
    assert not any(sample_id.startswith(hurt.key) for sample_id in used)
    assert any(sample_id.endswith(f"~{hurt.key}@0") for sample_id in used)


def test_padding_is_to_a_multiple_of_32_tokens_or_to_the_encoders_limit(shared: dict[str, Any]) -> None:
    config = data(shared)
    loader = EncodedLoader(config, 0, ClipCache(config))
    asked = next(loader._asked(None))
    clips = [clip for clip in next(loader.source.follow(iter([asked]))) if not isinstance(clip, Exception)]
    longest = max(len(clip.text["text"]) for clip in clips if clip.text is not None)
    assert 0 < longest < 32
    assert batch_fields(clips, None)["text"].shape[1] == batch_fields(clips, 128)["text"].shape[1] == 32
    assert batch_fields(clips, longest + 1)["text"].shape[1] == longest + 1


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"start": "random"}, r"start: random \(take first or centre\)"),
        ({"crop": "random"}, r"crop: random \(take centre or none\)"),
        ({"frame_strides": [1, 2]}, r"frame_strides \[1, 2\] \(name one\)"),
        ({"image_share": 0.5}, r"image_share 0\.5 \(set it to 0\)"),
        ({"num_workers": 2}, r"cache\.mode full decodes no clip for a step: num_workers 2 would have no effect"),
        ({"reading": {"decode_timeout": 3.0}}, r"reading\.decode_timeout 3\.0 would have no effect; leave it out"),
        (
            {"cache": None, "online": {}, "num_workers": 1, "verify_checksums": False},
            "online decodes and encodes in its actors, which check every clip: num_workers 1, verify_checksums False would",
        ),
        ({"online": {}}, "both cache and online are given"),
        ({"cache": {}}, r"give either cache\.path or cache\.mix"),
        ({"cache": {"mix": {"a": "x"}}}, r"cache\.mix goes with data\.mix, cache\.path with data\.manifest"),
        (
            {"cache": {"mix": {"a": "x"}}, "manifest": None, "mix": [{"name": "b", "manifest": "m", "weight": 1}]},
            r"cache\.mix names a; the datasets of data\.mix are b",
        ),
    ],
    ids=str,
)
def test_what_a_cache_cannot_hold_is_refused(shared: dict[str, Any], changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        data(shared, **changes)


def test_latents_of_a_mix_are_all_stored_in_one_way(shared: dict[str, Any], tmp_path: Path) -> None:
    """A micro-batch of both would have the mean of some clips and a sample of others."""
    header = json.loads((shared["run"] / "header-latents.json").read_text())
    for name, store in (("a", "mean_logvar"), ("b", "sample")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "header-latents.json").write_text(json.dumps({**header, "store": store}))
    mix = [{"name": name, "manifest": "m", "weight": 1} for name in ("a", "b")]

    def cache(b: str) -> ClipCache:
        places = {"a": str(tmp_path / "a"), "b": str(tmp_path / b)}
        return ClipCache(data(shared, manifest=None, mix=mix, cache={"mix": places, "mode": "latents"}))

    cache("a").check({"a": [], "b": []})
    with pytest.raises(DataError, match=r"data\.cache\.mix holds latents stored as `sample` .* encode all .* latents\.store"):
        cache("b").check({"a": [], "b": []})


def test_only_frozen_encoders_can_be_cached(shared: dict[str, Any]) -> None:
    def config(objective: dict[str, Any], data: DataConfig = data(shared)) -> TrainConfig:  # noqa: B008
        rest = {"optimizer": {"lr": 1e-3}, "trainer": {"max_steps": 1}, "models": {"vae": {"path": "x"}}}
        return TrainConfig.model_validate({"kind": "train", "objective": objective, "data": data.model_dump()} | rest)

    with pytest.raises(ValueError, match=r"data\.cache: objective autoencoder needs pixels"):
        config({"kind": "autoencoder"})
    with pytest.raises(ValueError, match=r"data\.cache holds the text of a frozen encoder, and .*train_text_encoder"):
        config({"kind": "flow_matching", "train_text_encoder": True})
    latents = data(shared, cache={"path": "x", "mode": "latents"})
    assert config({"kind": "flow_matching", "train_text_encoder": True}, latents).data.cache is not None


def test_the_dataset_must_be_the_one_that_was_encoded(shared: dict[str, Any]) -> None:
    config = data(shared)
    cache = ClipCache(config)
    shards = {"data": [("00000", Manifest.load(str(config.manifest)).entries[0].sha256)]}
    cache.check(shards)
    with pytest.raises(DataError, match="are stale: they were made from"):
        cache.check({"data": [("00000", "f" * 64)]})


def test_a_cache_of_foreign_shards_is_found_by_the_groups_of_the_manifest(shared: dict[str, Any], tmp_path: Path) -> None:
    """A tar `part1/00000.tar` has the group part1-00000, which its name alone does not tell from 00000."""
    source = Manifest.load(write_demo_shards(tmp_path / "own", 2, 1, 11, 32, 0))
    folder, group, tar = tmp_path / "foreign", "part1-00000", "part1/00000.tar"
    for name in ("part1", "index", "manifest"):
        (folder / name).mkdir(parents=True)
    (entry,) = source.entries
    (source.folder / entry.tar).rename(folder / tar)
    records = [replace(record, shard=tar) for record in source.records()]
    index = f"index/shard-{group}.parquet"
    sha256 = write_index(folder / index, records)
    changed = replace(entry, group=group, tar=tar, index=index, index_sha256=sha256, config_hash="foreign:0")
    publish(entry_path(folder, group), changed)
    encoding = encode_config(folder, shared["encoders"])
    ShardEncoder(encoding, tmp_path / "run", "cpu").encode(group)
    config = data({**shared, "config": encoding, "run": tmp_path / "run"}, micro_batch_size=1)
    step = next(EncodedLoader(config, 0, ClipCache(config)).steps())
    assert step.num_replaced == 0 and all(batch.latents is not None for batch in step.batches)
