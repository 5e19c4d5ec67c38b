"""Before the first step: frozen tokenizers are of the VAE of the training, or of that of the tokens it reads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipelines.encode.shard import ShardEncoder, data_config
from tests.demo_shards import write_demo_shards
from tests.unit.encoding import encode_config, save_encoders, save_tokenizer, tokens_section
from tests.unit.runs import write_run
from videofm import models
from videofm.config.data import DataConfig
from videofm.config.model import ModelConfig
from videofm.data.encoded import ClipCache
from videofm.errors import ConfigError
from videofm.train.token_origin import check_tokenizers


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of one tokenizer that say that it is of one VAE, and of another; the tokenizer alone; tokens of the first VAE."""
    folder = tmp_path_factory.mktemp("origins")
    encoders, other = save_encoders(folder), save_encoders(folder / "other", seed=1)
    found: dict[str, Any] = {"alone": save_tokenizer(folder), "vae": encoders["vae"], "other_vae": other["vae"]}
    for name, vae in (("run", encoders["vae"]), ("other_run", other["vae"])):
        told = {"objective": {"kind": "latent_tokens"}, "models": {"tokenizer": {}, "vae": {"path": vae}}}
        path = write_run(folder / name, {"tokenizer": models.load(found["alone"])}, {"vae": models.load(vae)}, told)
        found[name] = str(path)
    shards = write_demo_shards(folder / "shards", 2, 1, 11, 32, 0)
    found["config"] = encode_config(shards, encoders, tokens=tokens_section(encoders, found["alone"]))
    ShardEncoder(found["config"], folder / "tokens", "cpu").encode("00000")
    (folder / "tokens" / "config.yaml").write_text(json.dumps(found["config"].model_dump(mode="json")))
    found["tokens"] = folder / "tokens"
    return found


def look(shared: dict[str, Any], vae: str | None, trained: tuple[str, ...] = ("dit",), **roles: dict[str, str]) -> None:
    """Check a training with the VAE at `vae`, or with tokens in its place."""
    sections = {role: ModelConfig.model_validate(section) for role, section in roles.items()}
    values = data_config(shared["config"]).model_dump() | {"cache": {"path": str(shared["tokens"]), "mode": "tokens"}}
    config: Any = SimpleNamespace(models=sections, data=DataConfig.model_validate(values))
    held = {} if vae is None else {"vae": models.load(vae)}
    loader: Any = SimpleNamespace(source=ClipCache(config.data)) if vae is None else SimpleNamespace()
    check_tokenizers(config, held, trained, loader)


def unchecked(name: str) -> str:
    return f"no run of its training tells which VAE {name} is of: that it is this one was not checked"


def test_the_vae_of_the_training(shared: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Each tokenizer is looked at, also one that `init_from` starts from; one that is trained becomes one of this VAE."""
    run, other = {"path": shared["run"]}, {"path": shared["other_run"]}
    with caplog.at_level("WARNING", logger="videofm"):
        look(shared, shared["vae"], tokenizer=run, fine_tokenizer=run)
        look(shared, shared["other_vae"], tokenizer=other)
        look(shared, shared["vae"], ("tokenizer",), tokenizer=other)
        for roles, role in (
            ({"tokenizer": other}, "tokenizer"),
            ({"tokenizer": run, "fine_tokenizer": other}, "fine_tokenizer"),
            ({"tokenizer": {"name": "arlon/tokenizer", "init_from": shared["other_run"]}}, "tokenizer"),
        ):
            with pytest.raises(ConfigError, match=f"models.{role} at .*other_run was .* another VAE than models.vae"):
                look(shared, shared["vae"], **roles)
        assert not caplog.messages
        look(shared, shared["vae"], tokenizer={"name": "arlon/tokenizer"}, fine_tokenizer={"path": shared["alone"]})
    assert caplog.messages == [unchecked("models.tokenizer"), unchecked("models.fine_tokenizer")]


def test_the_vae_of_the_tokens(shared: dict[str, Any], caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """An AR model's training has no VAE, and the header of its tokens has the hash of theirs. A bfloat16 copy of the VAE has
    another hash; that it is the same is seen in its weights, where they still lie."""
    copy = write_run(
        tmp_path / "copy",
        {"tokenizer": models.load(shared["alone"])},
        {"vae": models.load(shared["vae"]).bfloat16()},
        {"models": {"tokenizer": {}, "vae": {}}},
    )
    ar = {"ar": {"name": "ar/transformer"}}
    with caplog.at_level("WARNING", logger="videofm"):
        look(shared, None, ("ar",), tokenizer={"path": shared["run"]}, **ar)
        look(shared, None, ("ar",), tokenizer={"path": str(copy)}, **ar)
        with pytest.raises(ConfigError, match="models.tokenizer at .*other_run was .* whose latents became the tokens in"):
            look(shared, None, ("ar",), tokenizer={"path": shared["other_run"]}, **ar)
        assert not caplog.messages
        look(shared, None, ("ar",), tokenizer={"path": shared["alone"]}, **ar)
        told = json.loads((shared["tokens"] / "config.yaml").read_text())
        gone = tmp_path / "moved"
        elsewhere = told | {"tokens": told["tokens"] | {"vae": {"path": str(gone)}}}
        (shared["tokens"] / "config.yaml").write_text(json.dumps(elsewhere))
        look(shared, None, ("ar",), tokenizer={"path": shared["other_run"]}, **ar)
        torch.manual_seed(5)
        models.save(models.build("vae/ltx", "tiny"), gone)  # another one has taken its place
        look(shared, None, ("ar",), tokenizer={"path": shared["other_run"]}, **ar)
        (shared["tokens"] / "config.yaml").write_text(json.dumps(told))
    of_tokens = unchecked(f"models.tokenizer (of the tokens in {shared['tokens']})")
    assert caplog.messages == [unchecked("models.tokenizer"), of_tokens, of_tokens]
