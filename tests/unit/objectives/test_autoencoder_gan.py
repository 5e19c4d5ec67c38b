"""The adversarial, wavelet, perceptual and denoising parts of the autoencoder's loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from videofm import models
from videofm.config.autoencoder import AutoencoderConfig
from videofm.errors import ConfigError
from videofm.objectives.autoencoder import AutoencoderObjective
from videofm.ops.dwt import wavelet_l1
from videofm.parallel.rng import KeyedRng
from videofm.types import Batch

SMALL = {"encoder_widths": (8, 8, 16), "decoder_widths": (16, 8), "latent_channels": 4}
CRITIC = {"widths": (8, 8), "flat_widths": (8,), "num_groups": 4}


def objective(**fields: Any) -> AutoencoderObjective:
    return AutoencoderObjective(AutoencoderConfig.model_validate({"kind": "autoencoder", **fields}))


def roles(kind: str = "hinge", **overrides: Any) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    channels = 6 if kind == "reconstruction" else 3
    return {
        "vae": models.build("vae/ltx", "tiny", **SMALL, **overrides),
        "discriminator": models.build("discriminator/patchgan_3d", "tiny", in_channels=channels, **CRITIC),
    }


def make_batch(size: int = 2, step: int = 0, num_frames: int = 5) -> Batch:
    video = torch.rand(size, 3, num_frames, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch(video, [""] * size, torch.ones(size), [str(index) for index in range(size)], step, size)


def rng(batch: Batch) -> KeyedRng:
    return KeyedRng(0, batch.step, batch.sample_ids)


@pytest.mark.parametrize(("kind", "start"), [("hinge", 1.0), ("reconstruction", 2 * math.log(2))])
@pytest.mark.parametrize("num_frames", [1, 5])
def test_the_discriminator_starts_at_its_expected_loss(kind: str, start: float, num_frames: int) -> None:
    """Logits near 0: hinge 0.5 * (1 + 1); the reconstruction GAN's two cross-entropies ln 2 each. Images too."""
    batch, players = make_batch(num_frames=num_frames), roles(kind)
    loss = objective(gan={"weight": 0.5, "loss": kind}).loss(players, batch, rng(batch), "discriminator")
    assert loss.total.item() / 2 == pytest.approx(start, abs=0.1)
    loss.total.backward()
    assert all(parameter.grad is None for parameter in players["vae"].parameters())
    assert any(parameter.grad is not None for parameter in players["discriminator"].parameters())


@pytest.mark.parametrize("kind", ["hinge", "reconstruction"])
def test_the_adaptive_weight_balances_gradients_at_the_last_layer(kind: str) -> None:
    """With factor f and weight 1 the adversarial gradient at the last layer is as long as that of the reconstruction."""
    batch, players = make_batch(), roles(kind)
    goal = objective(gan={"weight": 1.0, "loss": kind}, kl={"weight": 0.0})
    prepared = goal.prepare(players, [batch], [rng(batch)], "generator", lambda value: value)
    assert prepared is not None and prepared.terms is not None
    layer = players["vae"].last_layer
    adversarial, reference = prepared.terms.adversarial, prepared.terms.reference
    assert adversarial is not None
    pulls = [
        torch.autograd.grad(loss.sum(), layer, retain_graph=True)[0] for loss in (prepared.factor * adversarial, reference)
    ]
    # The divisor has 1e-4 added, so that the ratio is a little below 1.
    assert pulls[0].norm().item() == pytest.approx(pulls[1].norm().item(), rel=0.05)

    loss = goal.loss(players, batch, rng(batch), "generator", prepared)
    expected = (reference + prepared.factor * adversarial).sum()
    torch.testing.assert_close(loss.total, expected)
    assert loss.metrics["adversarial_weight"].item() / 2 == pytest.approx(prepared.factor.item())


def test_the_factor_is_of_the_whole_step() -> None:
    """Two micro-batches, or two ranks that add up, give the factor of one batch of both samples."""
    batch, players = make_batch(), roles()
    goal = objective(gan={"weight": 1.0})
    whole = goal.prepare(players, [batch], [rng(batch)], "generator", lambda value: value)
    parts = [Batch(batch.video[i : i + 1], [""], torch.ones(1), [str(i)], 0, 2) for i in range(2)]
    two = goal.prepare(players, parts, [rng(part) for part in parts], "generator", lambda value: value)
    assert whole is not None and two is not None and two.terms is None
    torch.testing.assert_close(two.factor, whole.factor, rtol=1e-4, atol=0)


def test_phases_and_turns() -> None:
    plain, both = objective(), objective(gan={"weight": 0.5, "start_step": 2})
    turns = objective(gan={"weight": 0.5, "start_step": 2, "alternate": True})
    assert plain.phases == {"generator": ("vae",)} and plain.roles == ("vae",)
    assert both.phases == {"generator": ("vae",), "discriminator": ("discriminator",)}
    assert [both.active_phases(step) for step in (1, 2)] == [("generator",), ("generator", "discriminator")]
    order = [turns.active_phases(step) for step in range(5)]
    assert order == [("generator",)] * 2 + [("discriminator",), ("generator",), ("discriminator",)]
    assert objective(gan={"weight": 0.0}).phases == plain.phases


def test_wavelet_and_perceptual_terms_are_weighed_in() -> None:
    """l1 + 0.5 * wavelet + 2 * lpips of the same reconstruction; the perceptual distance is a stand-in that counts frames."""
    batch, players = make_batch(), roles()

    class Distance(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - b).square().mean(dim=(1, 3, 4))

    terms = {"wavelet": {"weight": 0.5}, "kl": {"weight": 0.0}, "lpips": {"weight": 2.0, "weights": "a file"}}
    goal = objective(**terms)
    assert goal.own_models["perceptual"]["overrides"] == {"weights": "a file"}
    loss = goal.loss({**players, "perceptual": Distance()}, batch, rng(batch), "generator")
    with torch.no_grad():
        posterior = players["vae"].encode(batch.video)
        copy = players["vae"].decode(posterior.sample(rng(batch).normal("posterior", tuple(posterior.mean.shape[1:]))))
    error = copy - batch.video
    expected = (
        error.abs().mean(dim=(1, 2, 3, 4)) + 0.5 * wavelet_l1(copy, batch.video) + 2 * error.square().mean(dim=(1, 2, 3, 4))
    )
    torch.testing.assert_close(loss.total.detach(), expected.sum(), rtol=1e-5, atol=0)


def test_a_term_that_is_off_is_not_computed() -> None:
    batch, players = make_batch(step=4), roles()
    goal = objective(wavelet={"weight": 1.0, "start_step": 5}, gan={"weight": 1.0, "start_step": 5})
    metrics = goal.loss(players, batch, rng(batch), "generator").metrics
    assert not {"wavelet", "adversarial"} & set(metrics)
    later = make_batch(step=5)
    assert {"wavelet", "adversarial"} <= set(goal.loss(players, later, rng(later), "generator").metrics)


def test_the_denoising_decoder_gets_noise_and_its_level() -> None:
    """What reaches `decode`: sigma in [0, 0.2], and (1 - sigma) * z + sigma * noise in raw latent space."""
    batch = make_batch(8)
    vae = roles(timestep_conditioning=True)["vae"]
    seen, plain = {}, vae.decode

    def decode(latents: torch.Tensor, sigma: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seen.update(latents=latents, sigma=sigma)
        return plain(latents, sigma, generator)

    vae.decode = decode  # type: ignore[method-assign,assignment]
    objective(denoising_decoder={"max_sigma": 0.2}).loss({"vae": vae}, batch, rng(batch), "generator")
    assert 0 <= seen["sigma"].min() < seen["sigma"].max() <= 0.2
    posterior = vae.encode(batch.video)
    shape, sigma = tuple(posterior.mean.shape[1:]), seen["sigma"].view(-1, 1, 1, 1, 1)
    latents = posterior.sample(rng(batch).normal("posterior", shape))
    expected = (1 - sigma) * latents + sigma * rng(batch).normal("decoder_noise", shape)
    torch.testing.assert_close(seen["latents"], expected)
    objective().loss({"vae": vae}, batch, rng(batch), "generator")
    assert not seen["sigma"].any(), "without the section latents are clean"


def test_random_tiling_is_of_whole_micro_batches_and_trains() -> None:
    """With probability 1 the loss is that of the tiled VAE, and its gradient reaches every layer; with 0.5 both happen."""
    players = {"vae": roles()["vae"]}
    tiling = {"height": 8, "width": 16, "overlap": 0}
    always, sometimes = (objective(random_tiling={**tiling, "probability": p}) for p in (1.0, 0.5))
    batch = make_batch()
    tiled = always.loss(players, batch, rng(batch), "generator")
    tiled.total.backward()
    assert all(value.grad is not None for value in players["vae"].parameters())
    by_hand = objective().loss({"vae": _Tiled(players["vae"])}, batch, rng(batch), "generator")
    torch.testing.assert_close(tiled.total, by_hand.total)
    whole = objective().loss(players, batch, rng(batch), "generator").total
    assert not torch.equal(whole, tiled.total)
    drawn = []
    for step in range(8):
        batch = make_batch(step=step)
        plain = objective().loss(players, batch, rng(batch), "generator").total
        drawn.append(torch.equal(sometimes.loss(players, batch, rng(batch), "generator").total, plain))
    assert True in drawn and False in drawn
    with pytest.raises(ConfigError, match="tiles have a height of 9 and an overlap_height of 0 pixels"):
        objective(random_tiling={**tiling, "height": 9, "probability": 1.0}).check(players)


class _Tiled(nn.Module):
    timestep_conditioning = False

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        tiled = vae.tiled(8, 16, 0)
        self.encode, self.decode = tiled.encode, tiled.decode


def test_models_that_do_not_fit_the_section() -> None:
    with pytest.raises(ConfigError, match="the decoder of role vae is not told the noise level: build one with"):
        objective(denoising_decoder={}).check(roles())
    with pytest.raises(ConfigError, match="discriminator has 6 input channels; role discriminator has 3"):
        objective(gan={"weight": 1.0, "loss": "reconstruction"}).check(roles())
    objective(gan={"weight": 1.0, "loss": "reconstruction"}).check(roles("reconstruction"))


def test_lpips_without_weights_says_how_to_get_them() -> None:
    with pytest.raises(ValidationError, match=r"weight is 1.0 but `weights` names no file. .* tools/convert_perceptual.py"):
        objective(lpips={"weight": 1.0})
