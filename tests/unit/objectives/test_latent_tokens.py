"""The objective of latent tokenizers: its loss by hand, what happens after a step, clean latents, and refusals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from videofm import models, registry
from videofm.config.latent_tokens import LatentTokensConfig
from videofm.config.train import TrainConfig
from videofm.errors import ConfigError
from videofm.objectives.latent_tokens import LatentTokensObjective, variance
from videofm.objectives.latents import clean_latents, encoded_latents
from videofm.parallel.rng import KeyedRng
from videofm.types import ALONE, Batch, Loss, Posterior

EMA = {"kind": "vq_ema", "codebook_size": 16, "dim": 4, "start_vectors": 2, "start_updates": 1}
"""A book that starts after one step."""


def objective(**fields: Any) -> LatentTokensObjective:
    return LatentTokensObjective(LatentTokensConfig.model_validate({"kind": "latent_tokens"} | fields))


class PlainVae(nn.Module):
    """Latents are every fourth pixel, normalised by (z - 1) / 2; the posterior has a standard deviation of 0.1."""

    latent_channels = 3
    latent_statistics = SimpleNamespace(hash="abc")

    def encode(self, video: Tensor) -> Posterior:
        mean = video[..., ::4, ::4]
        return Posterior(mean, torch.full_like(mean, 0.01).log())

    def normalize(self, latents: Tensor) -> Tensor:
        return (latents - 1) / 2


@dataclass(frozen=True)
class Quantized:
    indices: Tensor
    loss: Tensor
    losses: dict[str, Tensor]


class Shifted(nn.Module):
    """Gives latents back with an error of `shift`, two tokens a clip, and a loss of 1 + the mean latent."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, z: Tensor) -> Any:
        loss = 1 + z.mean(dim=(1, 2, 3, 4))
        quantized = Quantized(torch.zeros(len(z), 2, 1, 1, dtype=torch.int64), loss, {"commit": 4 * loss})
        return SimpleNamespace(features=z + self.shift, quantized=quantized)


def make_batch(size: int = 4, frames: int = 3, seed: int = 0) -> Batch:
    video = torch.rand(size, 3, frames, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    ids = [f"clip{index}" for index in range(size)]
    return Batch(video, [""] * size, torch.full((size,), 24.0), ids, 5, size)


def part(batch: Batch, rows: slice) -> Batch:
    return replace(batch, video=batch.video[rows], captions=batch.captions[rows], sample_ids=batch.sample_ids[rows])


def loss_of(batch: Batch, tokenizer: nn.Module) -> Loss:
    rng = KeyedRng(3, batch.step, batch.sample_ids)
    return objective().loss({"tokenizer": tokenizer, "vae": PlainVae()}, batch, rng, "train")


def test_loss_by_hand() -> None:
    """Of each clip 0.5^2 for the features and 1 + its mean latent for the quantizer; the gradient for the shift is 2 * 0.5 a
    clip. Each of 4 clips is 2 tokens."""
    batch, tokenizer = make_batch(), Shifted(0.5)
    z = clean_latents(PlainVae(), batch, KeyedRng(3, 5, batch.sample_ids))
    loss = loss_of(batch, tokenizer)
    quantizer = 4 + z.mean(dim=(1, 2, 3, 4)).sum()
    torch.testing.assert_close(loss.total, 4 * 0.25 + quantizer)
    loss.total.backward()
    torch.testing.assert_close(tokenizer.shift.grad, torch.tensor(4.0))
    channels = torch.stack([z[:, channel].var(correction=0) for channel in range(3)])
    torch.testing.assert_close(loss.metrics["relative_mse"], 4 * 0.25 / channels.mean())
    torch.testing.assert_close(loss.metrics["mse"], torch.tensor(1.0))
    torch.testing.assert_close(loss.metrics["quantizer/commit"], 4 * quantizer)
    assert float(loss.metrics["tokens"]) == 8 and not any(value.requires_grad for value in loss.metrics.values())


def test_loss_is_a_sum_over_samples() -> None:
    """Cut into micro-batches it adds up to the same: draws are keyed by sample. (A micro-batch has its own variance.)"""
    batch, tokenizer = make_batch(), Shifted(0.1)
    whole = loss_of(batch, tokenizer)
    parts = [loss_of(part(batch, rows), tokenizer) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(whole.total, parts[0].total + parts[1].total)
    for name in whole.metrics.keys() - {"relative_mse"}:
        torch.testing.assert_close(whole.metrics[name], parts[0].metrics[name] + parts[1].metrics[name])


def test_the_mean_has_relative_error_one() -> None:
    """By definition of the variance: features that are the mean of each channel."""
    z = torch.randn(2, 3, 4, 5, 6) * 3 + 7
    mean = z.mean(dim=(0, 2, 3, 4), keepdim=True)
    torch.testing.assert_close((mean - z).square().mean() / variance(z), torch.tensor(1.0))


@pytest.mark.parametrize("kind", ["pixels", "posterior", "samples"])
def test_clean_latents_by_hand(kind: str) -> None:
    """((mean + 0.1 n) - 1) / 2 with the keyed draws n where there is a posterior, of pixels or encoded before."""
    batch, vae = make_batch(), PlainVae()
    posterior = vae.encode(batch.video)
    if kind != "pixels":
        batch = replace(batch, latents=posterior.mean, logvar=posterior.logvar if kind == "posterior" else None)
    rng = KeyedRng(3, 5, batch.sample_ids)
    draws = 0.0 if kind == "samples" else 0.1 * rng.normal("posterior", tuple(posterior.mean.shape[1:]))
    torch.testing.assert_close(clean_latents(vae, batch, rng), (posterior.mean + draws - 1) / 2)
    assert torch.equal(encoded_latents(vae, batch.video), vae.normalize(posterior.mean)), "without draws, the mode"


def test_clean_latents_have_no_gradient_and_a_known_spread() -> None:
    """(z - 1) / 2 of a posterior with standard deviation 0.1: 0.05 around the normalised mode, 5% off at 12,000 draws."""
    batch, vae = make_batch(size=8, frames=32), PlainVae()
    batch = replace(batch, video=batch.video.requires_grad_())
    clean = clean_latents(vae, batch, KeyedRng(3, 5, batch.sample_ids))
    spread = (clean - vae.normalize(vae.encode(batch.video).mode())).std()
    assert not clean.requires_grad and clean.dtype == torch.float32
    assert float(spread.detach()) == pytest.approx(0.05, rel=0.05)


def tiny(quantizer: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return models.build("arlon/tokenizer", "tiny", widths=[8, 8], num_groups=4, latent_channels=3, quantizer=quantizer).train()


def test_after_a_step_the_codebook_follows_and_a_skipped_one_is_forgotten() -> None:
    """A skipped step between two others leaves the state, bit for bit, where it would be without; all steps change it."""

    def run(steps: list[tuple[int, bool]]) -> tuple[dict[str, Tensor], dict[str, float]]:
        tokenizer = tiny(EMA)
        found: dict[str, float] = {}
        for seed, skipped in steps:
            loss_of(make_batch(seed=seed), tokenizer)
            found = objective().after_step({"tokenizer": tokenizer, "vae": PlainVae()}, "train", skipped, ALONE)
        return {key: value.clone() for key, value in tokenizer.state_dict().items()}, found

    (clean, _), (skipping, _), (seen, metrics) = (
        run([(0, False), (2, False)]),
        run([(0, False), (1, True), (2, False)]),
        run([(0, False), (1, False), (2, False)]),
    )
    assert all(torch.equal(clean[key], skipping[key]) for key in clean)
    assert any(not torch.equal(clean[key], seen[key]) for key in clean)
    assert {"codebook/usage", "codebook/perplexity", "codebook/dead", "codebook/churn"} <= metrics.keys()


@pytest.mark.parametrize("quantizer", [EMA, {"kind": "fsq", "levels": [4, 4, 3]}], ids=lambda quantizer: quantizer["kind"])
def test_learns_more_than_a_constant(quantizer: dict[str, Any]) -> None:
    """Clips of two colours, left and right: a token can tell one, and a constant, whose relative error is 1, cannot."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(8, 3, 1, 1, 2, generator=generator) * 2 - 1
    batch = make_batch(8, frames=1)
    batch = replace(batch, video=colours.repeat_interleave(8, dim=4).expand(-1, -1, 1, 16, -1).contiguous())
    tokenizer, vae = tiny(quantizer), PlainVae()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3, weight_decay=0.0)
    errors = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = loss_of(batch, tokenizer)
        (loss.total / 8).backward()
        optimizer.step()
        objective().after_step({"tokenizer": tokenizer, "vae": vae}, "train", False, ALONE)
        errors.append(float(loss.metrics["relative_mse"]) / 8)
    assert errors[0] > 0.9 and errors[-1] < 0.5, errors[::10]


def test_check_refuses_another_vae() -> None:
    tokenizer = tiny({"kind": "vq", "codebook_size": 8, "dim": 4})
    given: dict[str, nn.Module] = {"tokenizer": tokenizer, "vae": PlainVae()}
    objective(latent_statistics_hash="abc").check(given)
    with pytest.raises(ConfigError, match="latent_statistics_hash is def, but the statistics of role vae have abc"):
        objective(latent_statistics_hash="def").check(given)
    given["vae"].latent_channels = 16  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="for 3 latent channels, and the VAE has 16: .*overrides.latent_channels to 16"):
        objective().check(given)


def train_config(**fields: Any) -> dict[str, Any]:
    return {
        "kind": "train",
        "models": {"tokenizer": {"name": "arlon/tokenizer"}, "vae": {"name": "vae/ltx"}},
        "objective": {"kind": "latent_tokens"},
        "data": {
            "manifest": "none", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": 4, "num_micro_batches": 1,
            **fields,
        },
        "optimizer": {"lr": 1e-3, "ema_decay": 0},
        "trainer": {"max_steps": 1},
    }  # fmt: skip


def test_an_average_that_lags_behind_the_codebook_is_refused() -> None:
    """0.999 is the default of all objectives. What the phase has of its own counts; fsq has no book."""
    long = {"optimizer": {"lr": 1e-3}}
    with pytest.raises(ValueError, match="ema_decay 0.999 with objective latent_tokens: .* some 1000 steps .* to 0.99 at most"):
        TrainConfig.model_validate(train_config() | long)
    with pytest.raises(ValueError, match="ema_decay 0.995 with objective latent_tokens: .* some 200 steps"):
        TrainConfig.model_validate(train_config() | {"phase_optimizers": {"train": {"lr": 1e-3, "ema_decay": 0.995}}})
    TrainConfig.model_validate(train_config() | {"optimizer": {"lr": 1e-3, "ema_decay": 0.99}})
    TrainConfig.model_validate(train_config() | long | {"phase_optimizers": {"train": {"lr": 1e-3, "ema_decay": 0}}})
    roles = {"tokenizer": {"name": "arlon/tokenizer", "overrides": {"quantizer": {"kind": "fsq"}}}, "vae": {"name": "vae/ltx"}}
    TrainConfig.model_validate(train_config() | long | {"models": roles})


def test_codebooks_stay_whole() -> None:
    given = train_config() | {"parallel": {"zero_stage": 3}}
    with pytest.raises(ValueError, match="zero_stage 3 with objective latent_tokens: codebooks are read between steps"):
        TrainConfig.model_validate(given)


def test_trains_on_pixels_or_on_latents_of_a_cache() -> None:
    assert registry.lookup(registry.OBJECTIVES, "latent_tokens", "objective") is LatentTokensObjective
    TrainConfig.model_validate(train_config())
    TrainConfig.model_validate(train_config(cache={"path": "encoded", "mode": "latents"}, start="centre"))
    with pytest.raises(ValueError, match="data.cache.mode full: objective latent_tokens trains on latents"):
        TrainConfig.model_validate(train_config(cache={"path": "encoded"}, start="centre"))
