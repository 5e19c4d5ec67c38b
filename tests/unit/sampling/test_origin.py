"""Which VAE a tokenizer is of: where its training is found, and what is refused. For guides see stages/test_sample_long."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.runs import write_run
from videofm import models
from videofm.errors import ConfigError
from videofm.sampling.origin import check_vae, same_weights, trained_vae


def tokenizer_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("arlon/tokenizer", "tiny", latent_channels=16)


def vae_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("vae/ltx", "tiny")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run of a tokenizer; an AR run that used it, and one that took it from that; an AR run whose tokenizer is new; a
    folder of the tokenizer alone; a run that does not say what it was."""
    folder, tokenizer, vae = tmp_path_factory.mktemp("runs"), tokenizer_of(0), vae_of(0)
    objective = {"objective": {"kind": "latent_tokens"}, "models": {"tokenizer": {"name": "arlon/tokenizer"}, "vae": {}}}
    found = {"tokenizer": write_run(folder / "tokenizer", {"tokenizer": tokenizer}, {"vae": vae}, objective)}
    for name, told in (
        ("ar", {"path": str(found["tokenizer"])}),
        ("later_ar", {"path": str(folder / "ar"), "role": "tokenizer"}),
        ("new", {"name": "arlon/tokenizer"}),
    ):
        config = {"models": {"ar": {}, "text_encoder": {}, "tokenizer": told}}
        found[name] = write_run(folder / name, {}, {"tokenizer": tokenizer}, config)
    found["alone"] = models.save(tokenizer, folder / "alone")
    found["checkpoint"] = found["tokenizer"] / "checkpoints" / "step_00000002"
    found["mute"] = write_run(folder / "mute", {"tokenizer": tokenizer}, {}, {})
    (found["mute"] / "lineage.json").unlink()
    return found


def test_the_vae_is_found_through_the_runs_that_used_the_tokenizer(runs: dict[str, Path]) -> None:
    for name in ("tokenizer", "checkpoint", "ar", "later_ar"):
        found = trained_vae(runs[name])
        assert found is not None and same_weights(found, vae_of(0)), name
    for source in (None, runs["new"], runs["alone"], runs["mute"], "runs/gone"):
        assert trained_vae(source) is None, source


def test_another_vae_is_refused_and_an_unknown_one_is_told(runs: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    """As many channels, other weights. One line in the log where no run tells, none where all is well."""
    other = vae_of(1)
    assert other.latent_channels == vae_of(0).latent_channels
    with caplog.at_level("WARNING", logger="videofm"):
        for name in ("tokenizer", "later_ar"):
            check_vae(runs[name], vae_of(0).bfloat16(), "models.tokenizer", "models.vae")
            with pytest.raises(ConfigError, match=rf"models.tokenizer at \S*{name} was .* another VAE than models.vae"):
                check_vae(runs[name], other, "models.tokenizer", "models.vae")
        assert not caplog.messages
        check_vae(runs["alone"], other, "tokens.tokenizer", "tokens.vae")
    told = "no run of its training tells which VAE tokens.tokenizer is of: that it is this one was not checked"
    assert caplog.messages == [told]


def test_weights_are_the_same_to_the_digits_of_bfloat16() -> None:
    """A bfloat16 copy, and that copy in float32 again, are the same; a change of one number, of a shape or of a name is not."""
    tokenizer, other = tokenizer_of(0), tokenizer_of(0)
    assert same_weights(tokenizer, other)
    assert same_weights(tokenizer, other.bfloat16()) and same_weights(other.float(), tokenizer)
    assert any((a != b).any() for a, b in zip(other.parameters(), tokenizer.parameters(), strict=True))
    with torch.no_grad():
        next(other.parameters()).view(-1)[3].mul_(1.02)
    assert not same_weights(tokenizer, other)
    assert not same_weights(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    one, two = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
    two.weight.data = one.weight.data.reshape(1, 2)
    assert not same_weights(one, two)
