"""From prompts to features: a guide does what its parts do by hand, and refuses parts and heads that do not fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from videofm import models
from videofm.errors import CheckpointError, ConfigError, DataError
from videofm.sampling.autoregressive import TokenSampling, sample_tokens
from videofm.sampling.token_guide import TokenGuide, trained_window

PROMPTS, SEEDS, SHAPE = ["a red circle", "a blue square moving left"], [3, 4], (5, 4, 8)
TOKEN_SHAPE = (3, 2, 4)


def parts(seed: int = 0) -> dict[str, nn.Module]:
    """Random models: 32 codes, a token for 2 x 2 x 2 cells of latents with 4 channels."""
    torch.manual_seed(seed)
    ar = models.build("ar/transformer", "tiny", vocab_size=32, width=32, num_heads=2, num_layers=2)
    quantizer = {"kind": "vq", "codebook_size": 32, "dim": 4}
    sizes = {"latent_channels": 4, "rate": (2, 2, 2), "widths": (8, 8), "num_groups": 2}
    tokenizer = models.build("arlon/tokenizer", "tiny", quantizer=quantizer, **sizes)
    with torch.no_grad():
        for parameter in ar.parameters():
            parameter.mul_(8.0 if parameter.ndim == 2 else 1.0)
        tokenizer.encoder.conv_out.weight.mul_(20.0)  # type: ignore[union-attr, operator]  # so that many codes are used
    return {"ar": ar, "text_encoder": models.build("text/t5", "tiny", max_length=24), "tokenizer": tokenizer}


@pytest.fixture(scope="module")
def guide() -> TokenGuide:
    return TokenGuide(**parts())


def with_settings(guide: TokenGuide, **settings: Any) -> TokenGuide:
    return dataclasses.replace(guide, settings=TokenSampling(**settings))


def latents(num_frames: int = 5, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 4, num_frames, 4, 8, generator=torch.Generator().manual_seed(seed))


def test_features_are_what_the_parts_make(guide: TokenGuide) -> None:
    """The tokens of `sample_tokens` under the prompts' own text, decoded; with guidance the negative is the empty caption."""
    text, empty = (guide.text_encoder.encode(what) for what in (PROMPTS, ["", ""]))  # type: ignore[operator]
    for scale in (1.0, 3.0):
        found = with_settings(guide, guidance_scale=scale).features(PROMPTS, SEEDS, SHAPE)
        by_hand = sample_tokens(guide.ar, text, empty, TOKEN_SHAPE, SEEDS, TokenSampling(guidance_scale=scale))
        torch.testing.assert_close(found.indices, by_hand, rtol=0, atol=0)
        decoded = guide.tokenizer.decode(by_hand, 5)  # type: ignore[operator]
        torch.testing.assert_close(found.features, decoded, rtol=0, atol=0)
        assert found.features.shape == (2, 4, *SHAPE) and found.seconds > 0 and not found.features.requires_grad


def test_settings_reach_the_draws(guide: TokenGuide) -> None:
    most_likely = with_settings(guide, temperature=0.0).features(PROMPTS, SEEDS, SHAPE).indices
    for settings in ({"top_k": 1}, {"top_p": 1e-9}):
        found = with_settings(guide, **settings).features(PROMPTS, SEEDS, SHAPE).indices
        torch.testing.assert_close(found, most_likely, rtol=0, atol=0)
    assert (guide.features(PROMPTS, SEEDS, SHAPE).indices != most_likely).any()


def test_a_video_depends_on_its_prompt_and_seed_only(guide: TokenGuide) -> None:
    together = guide.features(PROMPTS, SEEDS, SHAPE)
    alone = guide.features(PROMPTS[1:], SEEDS[1:], SHAPE)
    torch.testing.assert_close(alone.indices, together.indices[1:], rtol=0, atol=0)
    torch.testing.assert_close(alone.features, together.features[1:])
    assert (guide.features(PROMPTS[:1], SEEDS[1:], SHAPE).indices != alone.indices).any()


def test_a_head_is_the_prefix(guide: TokenGuide) -> None:
    """Three latent frames of a window of five are two of its three token frames: they come back as the tokenizer encodes
    them, and the rest is `sample_tokens` after them."""
    head = latents()[:, :, :3]
    found = guide.features(PROMPTS, SEEDS, SHAPE, head)
    prefix = guide.tokenizer.encode(head)  # type: ignore[operator]
    torch.testing.assert_close(found.indices[:, :2], prefix, rtol=0, atol=0)
    text = guide.text_encoder.encode(PROMPTS)  # type: ignore[operator]
    by_hand = sample_tokens(guide.ar, text, None, TOKEN_SHAPE, SEEDS, prefix=prefix)
    torch.testing.assert_close(found.indices, by_hand, rtol=0, atol=0)
    assert len(prefix.unique()) > 3
    assert (found.indices[:, 2] != guide.features(PROMPTS, SEEDS, SHAPE).indices[:, 2]).any()


@pytest.mark.parametrize("num_frames", [1, 2, 5, 6])
def test_heads_that_end_with_a_token_have_the_tokens_of_the_window(guide: TokenGuide, num_frames: int) -> None:
    """Where a length is allowed, the head's tokens are those that the whole window has there; where it is not, the guide
    refuses, since (the control) they would be others."""
    window = latents(num_frames)
    whole = guide.tokenizer.encode(window)  # type: ignore[operator]
    allowed = guide.head_lengths(num_frames)
    assert list(allowed) == {1: [], 2: [], 5: [1, 3], 6: [2, 4]}[num_frames]
    for length in range(1, num_frames):
        head = window[:, :, :length]
        tokens = guide.tokenizer.encode(head)  # type: ignore[operator]
        if length in allowed:
            torch.testing.assert_close(tokens, whole[:, : tokens.shape[1]], rtol=0, atol=0)
            continue
        if length > 1:
            assert (tokens != whole[:, : tokens.shape[1]]).any()
        with pytest.raises(ConfigError, match=f"a head of {length} latent frames in a window of {num_frames}: a token is 2"):
            guide.features(PROMPTS, SEEDS, (num_frames, 4, 8), head)


def test_a_guide_of_a_run(guide: TokenGuide, tmp_path: Path) -> None:
    """What was trained lies in the checkpoint, with averages beside it, and what was frozen in the run."""
    run = tmp_path / "ar"
    step = run / "checkpoints" / "step_00000002"
    models.save(guide.ar, step / "models" / "ar")
    models.save(parts(1)["ar"], step / "ema" / "ar")
    (step / "COMMITTED.json").write_text("{}")
    for role in ("text_encoder", "tokenizer"):
        models.save(getattr(guide, role), run / "frozen" / role)
    settings = TokenSampling(top_k=7)
    for path in (run, step):
        loaded = TokenGuide.load(path, ema=False, device="cpu", settings=settings)
        torch.testing.assert_close(
            loaded.features(PROMPTS, SEEDS, SHAPE).features,
            dataclasses.replace(guide, settings=settings).features(PROMPTS, SEEDS, SHAPE).features,
            rtol=0,
            atol=0,
        )
    averaged = TokenGuide.load(run, device="cpu")
    torch.testing.assert_close(averaged.ar.state_dict(), parts(1)["ar"].state_dict(), rtol=0, atol=0)
    assert averaged.settings == TokenSampling()
    assert averaged.window is None
    with pytest.raises(CheckpointError, match="missing does not exist: give a run of objective next_token"):
        TokenGuide.load(tmp_path / "missing")


def test_models_are_in_eval_mode() -> None:
    found = {role: model.train() for role, model in parts().items()}
    TokenGuide(**found)
    assert not any(module.training for model in found.values() for module in model.modules())


def test_parts_that_do_not_fit(guide: TokenGuide) -> None:
    other = models.build("ar/transformer", "tiny", vocab_size=33, width=32, num_heads=2, num_layers=1)
    with pytest.raises(ConfigError, match="draws one of 33 tokens, and the tokenizer has 32"):
        dataclasses.replace(guide, ar=other)
    several = {"kind": "rvq", "codebook_size": 32, "dim": 4, "num_levels": 2}
    books = models.build(
        "arlon/tokenizer", "tiny", latent_channels=4, rate=(2, 2, 2), widths=(8, 8), num_groups=2, quantizer=several
    )
    with pytest.raises(ConfigError, match="2 codebooks"):
        dataclasses.replace(guide, tokenizer=books)
    with pytest.raises(ConfigError, match="latents of 16 channels, and the tokenizer of the guide was trained on latents of 4"):
        guide.check_latents(16)
    guide.check_latents(4)


def test_windows_and_heads_that_do_not_fit(guide: TokenGuide) -> None:
    with pytest.raises(DataError, match="height must be a multiple of 2"):
        guide.features(PROMPTS, SEEDS, (5, 3, 8))
    with pytest.raises(ConfigError, match="latents of 3 channels, and the tokenizer"):
        guide.features(PROMPTS, SEEDS, SHAPE, torch.zeros(2, 3, 1, 4, 8))
    with pytest.raises(ConfigError, match="give one head for each prompt, of 4x8 cells"):
        guide.features(PROMPTS, SEEDS, SHAPE, torch.zeros(1, 4, 1, 4, 8))
    with pytest.raises(ConfigError, match="give one head for each prompt, of 4x8 cells"):
        guide.features(PROMPTS, SEEDS, SHAPE, torch.zeros(2, 4, 1, 8, 4))
    for length, fits in ((2, "it may have 1, 3"), (5, "it may have 1, 3")):
        with pytest.raises(ConfigError, match=f"a head of {length} latent frames.*{fits}"):
            guide.features(PROMPTS, SEEDS, SHAPE, latents(length))
    with pytest.raises(ConfigError, match="none fits, so take longer windows"):
        guide.features(PROMPTS, SEEDS, (2, 4, 8), latents(1))
    with pytest.raises(ConfigError, match="1 seeds, 2 texts"):
        guide.features(PROMPTS, [1], SHAPE)


def test_windows_longer_than_those_of_the_training(guide: TokenGuide, tmp_path: Path) -> None:
    """Five latent frames are three token frames, which an `objective.window` of 3 allows and one of 2 does not."""
    run = tmp_path / "ar"
    for role in ("ar", "text_encoder", "tokenizer"):
        models.save(getattr(guide, role), run / "frozen" / role)
    (run / "lineage.json").write_text(json.dumps({"fingerprint": "x"}))
    for window in (None, 3, 2):
        (run / "config.yaml").write_text(json.dumps({"kind": "train", "objective": {"kind": "next_token", "window": window}}))
        assert trained_window(run) == window
        loaded = TokenGuide.load(run, device="cpu")
        if window != 2:
            assert loaded.features(PROMPTS, SEEDS, SHAPE).indices.shape == (2, *TOKEN_SHAPE)
            continue
        with pytest.raises(ConfigError, match="3 token frames at once, and the autoregressive model was trained on 2 at most"):
            loaded.features(PROMPTS, SEEDS, SHAPE)
        assert loaded.features(PROMPTS, SEEDS, (4, 4, 8)).indices.shape == (2, 2, 2, 4)


def test_a_call_before_each_token_may_stop_it(guide: TokenGuide) -> None:
    """A head of three latent frames is two token frames of three: 8 of 24 tokens are drawn. A stop comes at once."""
    calls: list[None] = []
    guide.features(PROMPTS, SEEDS, SHAPE, latents(3), lambda: calls.append(None))
    assert len(calls) == 8

    def stop() -> None:
        calls.append(None)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guide.features(PROMPTS, SEEDS, SHAPE, on_token=stop)
    assert len(calls) == 9
