"""What a training compares with its cache of tokens: tokenizer, codebook and VAE by their hashes, clips by a spot check."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipelines.encode.shard import ShardEncoder, data_config
from tests.demo_shards import write_demo_shards
from tests.unit.encoding import encode_config, save_encoders, save_tokenizer, tokens_section
from videofm import models
from videofm.config.data import DataConfig
from videofm.data.draws import PlanState
from videofm.data.encoded import ClipCache
from videofm.data.encoded_loader import EncodedLoader
from videofm.data.fixed import clip_request, fixed_draw
from videofm.data.manifest import Manifest
from videofm.data.reader import ClipReader, ReaderSettings, video_tensor
from videofm.errors import DataError
from videofm.train import cached
from videofm.train.cached import SpotCheck, compare, open_cache
from videofm.train.encoders import codebook_hash, identity


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("cached-tokens")
    shards, encoders = write_demo_shards(folder / "shards", 3, 1, 11, 32, 0), save_encoders(folder)
    tokenizer = save_tokenizer(folder)
    config = encode_config(shards, encoders, tokens=tokens_section(encoders, tokenizer))
    ShardEncoder(config, folder / "run", "cpu").encode("00000")
    return {"config": config, "encoders": encoders, "tokenizer": tokenizer, "run": folder / "run", "shards": shards}


def training(shared: dict[str, Any], mode: str, run: Path | None = None) -> Any:
    cache = {"path": str(run or shared["run"]), "mode": mode}
    values = data_config(shared["config"]).model_dump() | {"micro_batch_size": 1, "cache": cache}
    return SimpleNamespace(data=DataConfig.model_validate(values))


def roles_of(shared: dict[str, Any], *roles: str) -> dict[str, Any]:
    paths = {"tokenizer": shared["tokenizer"], "fine_tokenizer": shared["tokenizer"], **shared["encoders"]}
    return {role: models.load(paths[role]) for role in roles}


def nudged(tensors: Any) -> None:
    with torch.no_grad():
        next(tensor for tensor in tensors if tensor.is_floating_point()).view(-1)[3] += 1e-6


def test_the_hash_of_a_codebook_is_of_its_codes_alone(shared: dict[str, Any], tmp_path: Path) -> None:
    tokenizer: Any = models.load(shared["tokenizer"])
    before = codebook_hash(tokenizer)
    again = models.load(models.save(tokenizer, tmp_path / "again"))
    assert codebook_hash(again) == before and identity(again) == identity(tokenizer)
    nudged(tokenizer.decoder.parameters())
    assert codebook_hash(tokenizer) == before and identity(tokenizer)["weights"] != identity(again)["weights"]
    nudged(tokenizer.quantizer.parameters())
    assert codebook_hash(tokenizer) != before
    sizes = [{"kind": "fsq", "levels": levels} for levels in ((5, 3), (3, 5))]
    hashes = {codebook_hash(models.build("arlon/tokenizer", size="tiny", quantizer=size)) for size in sizes}
    assert len(hashes) == 2  # no tensor of theirs differs


@pytest.mark.parametrize("mode", ["tokens", "tokens_text"])
def test_tokens_of_another_tokenizer_are_refused(shared: dict[str, Any], mode: str) -> None:
    roles = roles_of(shared, "tokenizer", "text_encoder")
    config = training(shared, mode)
    assert open_cache(config, roles) is not None
    nudged(roles["tokenizer"].decoder.parameters())
    stale = r"cached tokens are stale: models\.tokenizer is not what encoded them; "
    with pytest.raises(DataError, match=stale + r"encoder\.weights was '\w{12}', now '\w{12}'\. Load"):
        open_cache(config, roles)
    nudged(roles["tokenizer"].quantizer.parameters())
    with pytest.raises(DataError, match=stale + r"codebook was '\w{12}', now '\w{12}'; encoder\.weights was"):
        open_cache(config, roles)


def test_the_vae_is_compared_where_the_training_has_it(shared: dict[str, Any]) -> None:
    roles = roles_of(shared, "tokenizer", "vae")
    config = training(shared, "tokens")
    open_cache(config, roles)
    roles["vae"].latents_std.mul_(2)  # which normalises what the tokenizer sees
    with pytest.raises(DataError, match=r"models\.tokenizer with models\.vae is not what .*; vae\.weights was '\w{12}', now"):
        open_cache(config, roles)


def test_the_tokens_beside_latents_are_of_the_fine_tokenizer(shared: dict[str, Any], tmp_path: Path) -> None:
    """Role `tokenizer` is then the coarse one of the features, which is not compared; and the cache has to hold rollouts."""
    roles = roles_of(shared, "fine_tokenizer", "vae")
    roles["tokenizer"] = models.build("arlon/tokenizer", size="tiny_coarse")
    with pytest.raises(
        DataError, match=r"features\.rollouts asks for what an AR model made .* run `videofm encode` with tokens"
    ):
        open_cache(training(shared, "latents_tokens"), roles)
    run = tmp_path / "run"
    shutil.copytree(shared["run"], run)
    header = json.loads((run / "header-tokens.json").read_text())
    (run / "header-tokens.json").write_text(json.dumps({**header, "rollouts": {"keep_frames": 1}}))
    assert open_cache(training(shared, "latents_tokens", run), roles) is not None
    nudged(roles["fine_tokenizer"].quantizer.parameters())
    with pytest.raises(DataError, match=r"models\.fine_tokenizer with models\.vae is not what encoded them; codebook was"):
        open_cache(training(shared, "latents_tokens", run), roles)


def test_a_spot_check_sees_another_clip_and_does_not_need_the_vae(
    shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = training(shared, "tokens")
    cache, dataset = ClipCache(config.data), Manifest.load(shared["shards"])
    record = dataset.records()[0]
    draw = fixed_draw(record, config.data, None)
    assert draw is not None
    video = video_tensor(ClipReader(ReaderSettings()).read(clip_request(dataset, 0, record, draw))[None])
    stored, device = cache.read("", "00000", record, draw), torch.device("cpu")
    roles = roles_of(shared, "tokenizer", "vae")
    share, allowed = compare(roles, cache, "", stored, video, record, device)["tokens"]
    assert stored.tokens is not None
    num_ids = stored.tokens["indices"].numel()
    assert share <= allowed == max(0.01, 1 / num_ids)  # one id of a clip of few
    share, _ = compare(roles, cache, "", stored, -video, record, device)["tokens"]
    assert share > 3 * allowed
    del roles["vae"]
    assert compare(roles, cache, "", stored, video[:, :, :0], record, device) == {}

    def read(self: Any, request: Any) -> None:
        raise AssertionError("no pixel is needed")

    loader = EncodedLoader(config.data, 0, cache)
    job: Any = SimpleNamespace(config=config, loader=loader, models=roles, mesh=SimpleNamespace(device=device))
    monkeypatch.setattr(cached.ClipReader, "read", read)
    SpotCheck(job).check(job, PlanState())
    job.models = roles_of(shared, "tokenizer", "vae")
    with pytest.raises(AssertionError, match="no pixel is needed"):
        SpotCheck(job).check(job, PlanState())


def test_a_clip_whose_tokens_are_others_now_stops_a_run(shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder gives other pixels than the one that encoded."""
    config = training(shared, "tokens")
    loader, reader = EncodedLoader(config.data, 0, ClipCache(config.data)), ClipReader.read
    job: Any = SimpleNamespace(
        config=config,
        loader=loader,
        models=roles_of(shared, "tokenizer", "vae"),
        mesh=SimpleNamespace(device=torch.device("cpu")),
    )
    SpotCheck(job).check(job, PlanState())
    monkeypatch.setattr(cached.ClipReader, "read", lambda self, request: 255 - reader(self, request))
    with pytest.raises(
        DataError, match=r"cached tokens of clip-\d+ are not what models\.tokenizer makes .* of their ids, at most"
    ):
        SpotCheck(job).check(job, PlanState())
