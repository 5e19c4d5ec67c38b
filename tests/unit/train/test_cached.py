"""What a training compares with its cache: identities of encoders, tensors of a spot check, roles that a pool can load."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipelines.encode.shard import ShardEncoder, data_config
from tests.demo_shards import write_demo_shards
from tests.unit.encoding import encode_config, save_encoders
from videofm import models
from videofm.config.data import DataConfig
from videofm.config.encode import EncoderConfig, LatentsConfig
from videofm.config.train import TrainConfig
from videofm.data.draws import PlanState
from videofm.data.encoded import ClipCache
from videofm.data.encoded_loader import EncodedLoader
from videofm.data.fixed import clip_request, fixed_draw
from videofm.data.loader import reader_settings
from videofm.data.manifest import Manifest
from videofm.data.reader import ClipReader, ReaderSettings, video_tensor
from videofm.errors import ConfigError
from videofm.train import cached
from videofm.train.cached import SpotCheck, compare, open_pool
from videofm.train.encoders import LatentEncoder, identity, tokenizer_hash, weights_hash


def test_one_weight_changes_the_identity(tmp_path: Path) -> None:
    roles = save_encoders(tmp_path)
    for path in roles.values():
        model, again = models.load(path), models.load(path)
        assert identity(model) == identity(again)
        with torch.no_grad():
            next(again.parameters()).view(-1)[5] += 1e-6
        assert weights_hash(again) != weights_hash(model)
        assert {**identity(again), "weights": weights_hash(model)} == identity(model)


def test_places_of_files_are_no_part_of_it_and_the_tokenizer_is(tmp_path: Path) -> None:
    model = models.load(save_encoders(tmp_path)["text_encoder"])
    assert identity(model)["tokenizer"] == "bytes"
    assert not {"path", "tokenizer_path"} & set(identity(model)["config"])
    for name, vocabulary in (("a", "{}"), ("b", "{}"), ("c", '{"x": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(vocabulary)
        (tmp_path / name / "model.safetensors").write_text(name)
    hashes = [tokenizer_hash(str(tmp_path / name)) for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_spot_check_sees_another_clip_and_another_caption(tmp_path: Path) -> None:
    shards, encoders = write_demo_shards(tmp_path / "shards", 3, 1, 9, 32, 0), save_encoders(tmp_path)
    config = encode_config(shards, encoders)
    ShardEncoder(config, tmp_path / "run", "cpu").encode("00000")
    data = DataConfig.model_validate(data_config(config).model_dump() | {"cache": {"path": str(tmp_path / "run")}})
    cache, dataset = ClipCache(data), Manifest.load(shards)
    roles: dict[str, Any] = {role: models.load(path) for role, path in encoders.items()}
    first, second = dataset.records()[:2]
    draw = fixed_draw(first, data, None)
    assert draw is not None
    video = video_tensor(ClipReader(ReaderSettings()).read(clip_request(dataset, 0, first, draw))[None])
    stored = cache.read("", "00000", first, draw)
    apart = compare(roles, cache, "", stored, video, first, torch.device("cpu"))
    assert all(distance < 1e-5 < allowed for distance, allowed in apart.values())
    other = dataclasses.replace(first, caption=second.caption)
    wrong = compare(roles, cache, "", stored, video.flip(2), other, torch.device("cpu"))
    assert all(distance > allowed for distance, allowed in wrong.values()), wrong


def test_a_spot_check_does_without_a_clip_that_does_not_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No step needs its pixels. The reader is that of `data.reading`."""
    shards, encoders = write_demo_shards(tmp_path / "shards", 1, 1, 9, 32, 0), save_encoders(tmp_path)
    config = encode_config(shards, encoders)
    ShardEncoder(config, tmp_path / "run", "cpu").encode("00000")
    values = {"cache": {"path": str(tmp_path / "run")}, "reading": {"read_timeout": 7.0}, "micro_batch_size": 1}
    train = SimpleNamespace(data=DataConfig.model_validate(data_config(config).model_dump() | values))
    loader = EncodedLoader(train.data, 0, ClipCache(train.data))
    (clip,) = Manifest.load(shards).records()
    with (shards / clip.shard).open("r+b") as file:
        file.seek(clip.offset + clip.size // 2)
        file.write(b"\0" * 64)
    used: list[ReaderSettings] = []

    class Reader(ClipReader):
        def __init__(self, settings: ReaderSettings) -> None:
            used.append(settings)
            super().__init__(settings)

    monkeypatch.setattr(cached, "ClipReader", Reader)
    monkeypatch.setattr(cached.LOG, "propagate", True)
    job: Any = SimpleNamespace(config=train, loader=loader, models={}, mesh=SimpleNamespace(device=torch.device("cpu")))
    SpotCheck(job).check(job, PlanState())
    assert used == [reader_settings(train.data)] and used[0].read_timeout == 7.0
    assert f"{clip.key} is not checked: " in caplog.text


def test_tiles_are_told_in_the_header_and_give_latents_of_the_same_shape(tmp_path: Path) -> None:
    path = save_encoders(tmp_path)["vae"]
    config = LatentsConfig(vae=EncoderConfig(path=path), precision="fp32", dtype="fp32", tile=64, tile_overlap=32)
    whole = config.model_copy(update={"tile": None})
    tiled, plain = LatentEncoder.load(config, "cpu"), LatentEncoder.load(whole, "cpu")
    assert (tiled.header()["tiles"], plain.header()["tiles"]) == ([64, 32], None)
    video = torch.rand(1, 3, 1, 96, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found, expected = tiled.encode(video, ["x"])[0]["mean"], plain.encode(video, ["x"])[0]["mean"]
    assert found.shape == expected.shape
    assert not torch.equal(found, expected)


def test_a_pool_needs_weights_that_it_can_load() -> None:
    config = TrainConfig.model_validate(
        {
            "kind": "train",
            "models": {"vae": {"name": "vae/ltx"}, "text_encoder": {"name": "text/t5"}, "dit": {"name": "dit/ltx"}},
            "objective": {"kind": "flow_matching"},
            "data": {"manifest": "m", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 1, "online": {}},
            "optimizer": {"lr": 1e-3},
            "trainer": {"max_steps": 1},
        }
    )
    assert config.data.online is not None
    with pytest.raises(ConfigError, match=r"data\.online: models\.vae cannot be loaded by an actor: .*fresh weights"):
        open_pool(config, config.data.online, {})
