"""`videofm encode` through Ray, and training on what it wrote."""

from __future__ import annotations

import hashlib
import math
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from data_pipelines import engine
from data_pipelines.encode import run as encode_stage
from data_pipelines.encode.shard import data_config
from tests.demo_shards import write_demo_shards
from tests.unit.encoding import encode_config, save_encoders, save_tokenizer, tokens_section
from videofm import models
from videofm.config.curate import EngineConfig
from videofm.config.encode import EncodeEngineConfig
from videofm.config.train import TrainConfig
from videofm.errors import DataError
from videofm.run_dir import RunDirectory
from videofm.stages.execute import execute
from videofm.train.cached import open_loader

OBJECTIVE = {"kind": "flow_matching", "caption_dropout": 0.3, "conditioning": {"first_frame": 0.3}}


@pytest.fixture(scope="module")
def node() -> Iterator[None]:
    """A Ray node for all tests."""
    with engine.cluster(EngineConfig(num_workers=4)):
        yield


@pytest.fixture(scope="module")
def shared(node: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A dataset of 12 clips in 4 shards, encoders, and a run of two actors that encoded it."""
    folder = tmp_path_factory.mktemp("encode")
    shards, encoders = write_demo_shards(folder / "shards", 12, 4, 11, 32, 2), save_encoders(folder)
    tokens = tokens_section(encoders, save_tokenizer(folder))
    config = encode_config(shards, encoders, split="all", tokens=tokens, engine={"num_actors": 2})
    result = execute(config, folder / "two")
    return {"folder": folder, "shards": shards, "encoders": encoders, "config": config, "two": folder / "two", "result": result}


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a cache."""
    names = ("sidecars", "index", "manifest")
    files = [path for name in names for path in (folder / name).iterdir()] + list(folder.glob("header-*.json"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class DyingActor(encode_stage.EncodeActor):
    """Kills its process over the second shard, once: the mark says that it happened."""

    def work(self, group: str) -> Any:
        mark = self._folder / "died"
        if group == "00001" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().work(group)


def test_one_actor_that_is_killed_and_replaced_writes_what_two_write(
    shared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shared["result"] == {"num_shards": 4, "num_failed": 0, "num_latents": 12, "num_tokens": 12, "num_text": 12}
    monkeypatch.setattr(encode_stage, "EncodeActor", DyingActor)
    config = shared["config"].model_copy(update={"engine": EncodeEngineConfig(num_actors=1)})
    result = encode_stage.run(config, RunDirectory.create(tmp_path / "run", config))
    assert (tmp_path / "run" / "died").exists()
    assert result == shared["result"]
    assert tree(tmp_path / "run") == tree(shared["two"])


def train_config(shared: dict[str, Any], **data: Any) -> TrainConfig:
    values = data_config(shared["config"]).model_dump() | {"micro_batch_size": 2, "num_micro_batches": 2} | data
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "models": {
                "vae": {"path": shared["encoders"]["vae"]},
                "text_encoder": {"path": shared["encoders"]["text_encoder"]},
                "dit": {"name": "dit/ltx", "size": "tiny"},
            },
            "objective": OBJECTIVE,
            "data": values,
            "optimizer": {"lr": 1e-3, "ema_decay": 0.0},
            "trainer": {"max_steps": 4, "precision": "fp32", "device": "cpu", "num_threads": 1},
            "wandb": {"mode": "disabled"},
        }
    )


def losses(config: TrainConfig, folder: Path) -> list[tuple[float, float]]:
    execute(config, folder)
    return [(row["loss"], row["grad_norm"]) for row in RunDirectory(folder).metrics()]


def test_training_on_a_cache_is_training(shared: dict[str, Any], tmp_path: Path) -> None:
    """Same draws, same noise: four steps of fp32 give the same losses and gradients, whatever is cached."""
    live = losses(train_config(shared), tmp_path / "live")
    assert len(live) == 4
    for mode in ("full", "text"):
        cache = {"path": str(shared["two"]), "mode": mode, "spot_check_every": 4}
        cached = losses(train_config(shared, cache=cache), tmp_path / mode)
        for found, expected in zip(cached, live, strict=True):
            assert found == pytest.approx(expected, rel=2e-5)


def test_an_ar_model_trains_on_tokens_without_a_byte_of_video_and_rolls_out(shared: dict[str, Any], tmp_path: Path) -> None:
    """Two steps on a dataset whose tars are gone; captions that were encoded before give the same losses as live ones. The run
    that it leaves then continues clips for `videofm encode`."""
    blind = tmp_path / "shards"
    blind.mkdir()
    for name in ("manifest", "index"):
        (blind / name).symlink_to(Path(shared["shards"]) / name)
    tokenizer, text_encoder = shared["config"].tokens.tokenizer.path, shared["encoders"]["text_encoder"]
    roles = {
        "ar": {"name": "ar/transformer", "size": "tiny", "overrides": {"vocab_size": 64}},
        "tokenizer": {"path": tokenizer},
        "text_encoder": {"path": text_encoder},
    }
    found = {}
    for mode in ("tokens", "tokens_text"):
        cache = {"path": str(shared["two"]), "mode": mode, "spot_check_every": 1}
        values = train_config(shared, manifest=str(blind)).model_dump(exclude_unset=True)
        values |= {"models": roles, "objective": {"kind": "next_token", "caption_dropout": 0.3}}
        config = TrainConfig.model_validate(values | {"data": values["data"] | {"cache": cache}})
        found[mode] = losses(config, tmp_path / mode)
    assert len(found["tokens"]) == 4
    for live, cached in zip(found["tokens"], found["tokens_text"], strict=True):
        assert cached == pytest.approx(live, rel=2e-5)
    assert found["tokens"][0][0] == pytest.approx(math.log(64), rel=0.1)  # it knows nothing yet
    section = {**shared["config"].tokens.model_dump(), "rollouts": {"run": str(tmp_path / "tokens"), "keep_frames": 1}}
    config = encode_config(shared["shards"], shared["encoders"], split="all", tokens=section, latents=None, text=None)
    assert execute(config, tmp_path / "rollouts") == {"num_shards": 4, "num_failed": 0, "num_tokens": 12}


def test_a_stale_cache_is_refused(shared: dict[str, Any], tmp_path: Path) -> None:
    cache = {"path": str(shared["two"])}
    torch.manual_seed(7)
    other = str(models.save(models.build("vae/ltx", size="tiny"), tmp_path / "vae"))
    config = train_config({**shared, "encoders": {**shared["encoders"], "vae": other}}, cache=cache)
    mesh, text_encoder = SimpleNamespace(data_rank=0, data_degree=1), models.load(shared["encoders"]["text_encoder"])
    with pytest.raises(DataError, match=r"cached latents are stale: models\.vae .*encoder\.weights was '\w{12}', now '\w{12}'"):
        open_loader(config, mesh, {"vae": models.load(other), "text_encoder": text_encoder})
    roles = {"vae": models.load(shared["encoders"]["vae"]), "text_encoder": text_encoder}
    with pytest.raises(DataError, match=r"holds other windows than the training asks for: start was 'first', now 'centre'"):
        open_loader(train_config(shared, cache=cache, start="centre"), mesh, roles)


def test_a_pool_feeds_what_the_trainer_would_encode_itself(shared: dict[str, Any]) -> None:
    """Two actors; the one that owes the next micro-batch is killed in the middle. The sequence is that of the offline cache,
    and a loader that starts in the middle goes on as the first one would have."""
    cache = train_config(shared, cache={"path": str(shared["two"])})
    online = train_config(shared, online={"num_actors": 2, "max_in_flight": 3, "precision": "fp32"})
    roles = {role: models.load(shared["encoders"][role]) for role in ("vae", "text_encoder")}
    mesh = SimpleNamespace(data_rank=0, data_degree=1)
    expected = list(islice(open_loader(cache, mesh, roles).steps(), 6))
    loader = open_loader(online, mesh, roles)
    pool: Any = loader.source
    try:
        found = []
        for number, step in enumerate(islice(loader.steps(), 6)):
            found.append(step)
            if number == 1:
                os.kill(ray.get(pool._waiting[0].actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
        assert pool.counts["deaths"] == 1
        counts = pool.metrics()
        assert counts["online_consumed"] == 12
        assert 12 <= counts["online_produced"] <= pool.counts["asked"] <= 12 + 3
        resumed = next(loader.steps(found[2].after))
    finally:
        loader.close()
    for step, other in zip([*found, resumed], [*expected, expected[3]], strict=True):
        assert step.after == other.after
        for batch, same in zip(step.batches, other.batches, strict=True):
            assert (batch.sample_ids, batch.captions, batch.text_lengths) == (same.sample_ids, same.captions, same.text_lengths)
            assert batch.video.shape == (2, 3, 0, 0, 0)
            for name in ("latents", "logvar", "text", "fps"):
                torch.testing.assert_close(getattr(batch, name), getattr(same, name), rtol=0, atol=1e-5)


def test_a_pool_of_other_weights_is_refused(shared: dict[str, Any]) -> None:
    online = train_config(shared, online={"precision": "fp32"})
    roles = {role: models.load(shared["encoders"][role]) for role in ("vae", "text_encoder")}
    with torch.no_grad():
        next(roles["vae"].parameters()).view(-1)[0] += 1
    loader = open_loader(online, SimpleNamespace(data_rank=0, data_degree=1), roles)
    with (
        closing(loader),
        pytest.raises(DataError, match=r"the encoders of the pool are not those of the training: latents\.weights was"),
    ):
        next(loader.steps())
