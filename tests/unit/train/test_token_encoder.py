"""Rollouts apart from shards: in which type they are drawn, and how long they may be. Tokenizers of another VAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.encoding import save_ar_run, save_encoders, save_tokenizer, tokens_section
from tests.unit.runs import write_run
from videofm import models
from videofm.config.encode import TokensConfig
from videofm.errors import ConfigError
from videofm.train.token_encoder import TokenEncoder

SOURCES, CAPTIONS = ["one", "two"], ["a red circle", "a blue square"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The run of an AR model, and a section that makes rollouts by it with bf16_autocast."""
    folder = tmp_path_factory.mktemp("rollouts")
    encoders, tokenizer = save_encoders(folder), save_tokenizer(folder)
    run = save_ar_run(folder, tokenizer, encoders["text_encoder"])
    return Path(run), tokens_section(encoders, tokenizer, precision="bf16_autocast", rollouts={"run": run})


def encoder_of(saved: tuple[Path, dict[str, Any]]) -> TokenEncoder:
    return TokenEncoder.load(TokensConfig.model_validate(saved[1]), "cpu")


def clips() -> torch.Tensor:
    return torch.rand(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_rollouts_are_drawn_outside_of_autocast(saved: tuple[Path, dict[str, Any]]) -> None:
    """Each module sees whether it is under autocast: those of the tokenizer are, those of the AR model are not."""
    encoder = encoder_of(saved)
    assert encoder.rollouts is not None
    seen: dict[str, set[bool]] = {"tokenizer": set(), "ar": set(), "text": set()}
    watched = {"tokenizer": encoder.tokenizer, "ar": encoder.rollouts.ar, "text": encoder.rollouts.text_encoder}
    for name, model in watched.items():
        for module in model.modules():
            module.register_forward_pre_hook(lambda *_, name=name: seen[name].add(torch.is_autocast_enabled("cpu")))
    encoded = encoder.encode(clips(), SOURCES, CAPTIONS)
    assert seen == {"tokenizer": {True}, "ar": {False}, "text": {False}}
    indices = torch.stack([clip["indices"] for clip in encoded]).long()
    by_hand = encoder.rollouts.roll(indices, SOURCES, CAPTIONS)
    assert torch.stack([clip["rollouts"] for clip in encoded]).equal(by_hand.int())


def test_clips_longer_than_the_model_was_trained_on(saved: tuple[Path, dict[str, Any]]) -> None:
    """Nine frames are three token frames."""
    run = saved[0]
    (run / "lineage.json").write_text(json.dumps({"fingerprint": "x"}))
    for window in (3, 2):
        (run / "config.yaml").write_text(json.dumps({"kind": "train", "objective": {"kind": "next_token", "window": window}}))
        encoder = encoder_of(saved)
        if window == 3:
            assert encoder.encode(clips(), SOURCES, CAPTIONS)[0]["rollouts"].shape[0] == 3
            continue
        with pytest.raises(ConfigError, match="3 token frames at once, .* trained on 2 at most .its objective.window"):
            encoder.encode(clips(), SOURCES, CAPTIONS)


def test_a_tokenizer_of_another_vae_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With as many channels. Of the run of its training; the folder of a tokenizer alone cannot tell, and the log says so."""
    encoders, alone = save_encoders(tmp_path), save_tokenizer(tmp_path)
    other = save_encoders(tmp_path / "other", seed=1)
    tokenizer, vae = models.load(alone), models.load(encoders["vae"])
    told = {"objective": {"kind": "latent_tokens"}, "models": {"tokenizer": {}, "vae": {"path": encoders["vae"]}}}
    run = write_run(tmp_path / "run", {"tokenizer": tokenizer}, {"vae": vae}, told)
    sections = {
        (source, name): TokensConfig.model_validate(tokens_section(paths, str(source)))
        for source in (run, alone)
        for name, paths in (("own", encoders), ("other", other))
    }
    with caplog.at_level("WARNING", logger="videofm"):
        TokenEncoder.load(sections[run, "own"], "cpu")
        with pytest.raises(ConfigError, match="tokens.tokenizer at .* was trained on latents of another VAE than tokens.vae"):
            TokenEncoder.load(sections[run, "other"], "cpu")
        assert not caplog.messages
        TokenEncoder.load(sections[alone, "other"], "cpu")
    (said,) = caplog.messages
    assert "which VAE tokens.tokenizer is of: that it is this one was not checked" in said
    with pytest.raises(ConfigError, match="models.tokenizer is vae/ltx, and the role tokenizer takes a latent tokenizer"):
        TokenEncoder.load(TokensConfig.model_validate(tokens_section(encoders, encoders["vae"])), "cpu")
