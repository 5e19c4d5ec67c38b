"""The autoencoder's loss against closed forms, and the statistics pass against its own promise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from videofm import models
from videofm.config.train import AutoencoderConfig
from videofm.errors import DataError
from videofm.objectives.autoencoder import AutoencoderObjective
from videofm.objectives.latent_statistics import measure_latent_statistics
from videofm.parallel.rng import KeyedRng
from videofm.types import Batch, Posterior


def config(**fields: Any) -> AutoencoderConfig:
    return AutoencoderConfig.model_validate({"kind": "autoencoder"} | fields)


def make_batch(size: int = 2, frames: int = 5, pixels: int = 16, seed: int = 0) -> Batch:
    video = torch.rand(size, 3, frames, pixels, pixels, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Batch(video, [""] * size, torch.full((size,), 25.0), [f"{seed}-{index}" for index in range(size)], 0, size)


class OffsetVae(nn.Module):
    """Reconstructs the clip plus `offset`; its posterior has mean 1 and log-variance 0 everywhere."""

    timestep_conditioning = False

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(offset))

    def encode(self, video: Tensor) -> Posterior:
        self.video = video
        return Posterior(torch.ones_like(video), torch.zeros_like(video))

    def decode(self, latents: Tensor, sigma: Tensor | None, generator: torch.Generator) -> Tensor:
        self.latents = latents
        return self.video + self.offset


def test_loss_and_metrics_of_a_constant_error() -> None:
    """An error of 0.1 everywhere: l1 0.1, mse 0.01, PSNR 10 log10(2^2 / 0.01) = 26.02 dB; KL of N(1, 1) is 1/2 nat an element.

    All are sums over the two samples.
    """
    batch = make_batch()
    rng = KeyedRng(0, 0, batch.sample_ids)
    loss = AutoencoderObjective(config(kl={"weight": 0.01})).loss({"vae": OffsetVae(0.1)}, batch, rng, "generator")
    expected = {"loss": 2 * (0.1 + 0.01 * 0.5), "l1": 0.2, "mse": 0.02, "kl": 1.0, "psnr": 2 * 26.0206, "logvar_at_bounds": 0}
    assert {name: value.item() for name, value in loss.metrics.items()} == pytest.approx(expected, rel=1e-4)
    assert loss.total.item() == pytest.approx(expected["loss"], rel=1e-4)
    squared = AutoencoderObjective(config(l1={"weight": 0}, mse={"weight": 1}, kl={"weight": 0}))
    assert squared.loss({"vae": OffsetVae(0.1)}, batch, rng, "generator").total.item() == pytest.approx(0.02, rel=1e-4)


def test_psnr_of_gaussian_noise() -> None:
    """Noise of standard deviation 0.2 has mse 0.04 and PSNR 20 dB, within what 1e5 pixels allow."""
    batch = make_batch(1, frames=9, pixels=64)
    vae = OffsetVae(0.0)
    noise = 0.2 * torch.randn(batch.video.shape, generator=torch.Generator().manual_seed(1))
    vae.decode = lambda *_: batch.video + noise  # type: ignore[method-assign]
    loss = AutoencoderObjective(config()).loss({"vae": vae}, batch, KeyedRng(0, 0, batch.sample_ids), "generator")
    assert loss.metrics["psnr"].item() == pytest.approx(10 * math.log10(4 / 0.04), abs=0.05)


def test_decodes_a_sample_of_the_posterior_with_the_keyed_draw() -> None:
    batch, vae = make_batch(), OffsetVae(0.0)
    rng = KeyedRng(0, 0, batch.sample_ids)
    AutoencoderObjective(config()).loss({"vae": vae}, batch, rng, "generator")
    torch.testing.assert_close(vae.latents, 1 + rng.normal("posterior", tuple(batch.video.shape[1:])))


def test_sums_do_not_depend_on_how_a_batch_is_cut() -> None:
    torch.manual_seed(0)
    vae, batch, objective = models.build("vae/ltx", "tiny"), make_batch(3), AutoencoderObjective(config())
    whole = objective.loss({"vae": vae}, batch, KeyedRng(0, 0, batch.sample_ids), "generator")
    parts = []
    for index in range(3):
        ids = batch.sample_ids[index : index + 1]
        piece = Batch(batch.video[index : index + 1], [""], batch.fps[index : index + 1], ids, 0, 3)
        parts.append(objective.loss({"vae": vae}, piece, KeyedRng(0, 0, ids), "generator"))
    for name, value in whole.metrics.items():
        assert sum(part.metrics[name].item() for part in parts) == pytest.approx(value.item(), rel=1e-5)


def test_normalised_training_latents_have_mean_0_and_std_1() -> None:
    torch.manual_seed(0)
    vae = models.build("vae/ltx", "tiny").train()
    batches = [make_batch(4, seed=seed) for seed in range(3)]
    numbers = AutoencoderObjective(config(num_statistics_clips=12)).after_training({"vae": vae}, iter(batches))
    assert numbers["num_clips"] == 12
    assert vae.training
    with torch.no_grad():
        latents = vae.normalize(torch.cat([vae.encode(batch.video).mean for batch in batches])).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(dim=1), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=1, correction=0), torch.ones(16), atol=1e-4, rtol=0)


def test_statistics_read_no_more_batches_than_needed() -> None:
    torch.manual_seed(0)
    vae, read = models.build("vae/ltx", "tiny"), []

    def endless() -> Iterator[Batch]:
        for seed in itertools.count():
            read.append(seed)
            yield make_batch(4, seed=seed)

    AutoencoderObjective(config(num_statistics_clips=6)).after_training({"vae": vae}, endless())
    assert read == [0, 1]


def test_statistics_refuse_a_dead_channel_and_no_clips() -> None:
    vae = OffsetVae(0.0)
    with pytest.raises(DataError, match=r"latent channels \[0, 1, 2\] have no usable standard deviation over 2 clips"):
        measure_latent_statistics(vae, [make_batch()])
    with pytest.raises(DataError, match="no clips to measure latent statistics on"):
        measure_latent_statistics(vae, [])
