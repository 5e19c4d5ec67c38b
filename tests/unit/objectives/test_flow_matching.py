"""Flow matching: sign and size of the target, what is trained, and independence of how a batch is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from videofm import models
from videofm.config.train import FlowMatchingConfig
from videofm.objectives.flow_matching import FlowMatchingObjective
from videofm.ops import flow
from videofm.ops.patchify import tokens_from_latents
from videofm.ops.rope import video_coordinates
from videofm.parallel.rng import KeyedRng
from videofm.types import Batch, Compression, Conditioning, Posterior


def config(**fields: Any) -> FlowMatchingConfig:
    return FlowMatchingConfig.model_validate({"kind": "flow_matching"} | fields)


class PlainVae(nn.Module):
    """Latents are every fourth pixel, normalised by (z - 1) / 2; the posterior has a standard deviation of 0.1."""

    compression = Compression(1, 4, 4)

    def encode(self, video: Tensor) -> Posterior:
        mean = video[..., ::4, ::4]
        return Posterior(mean, torch.full_like(mean, 0.01).log())

    def normalize(self, latents: Tensor) -> Tensor:
        return (latents - 1) / 2


class Oracle(nn.Module):
    """Answers `factor` times the velocity of known clean and noise tokens, and keeps what it was asked."""

    def __init__(self, clean: Tensor, noise: Tensor, factor: float) -> None:
        super().__init__()
        self.clean, self.noise, self.factor = tokens_from_latents(clean), tokens_from_latents(noise), factor

    def forward(self, tokens: Tensor, sigma: Tensor, conditioning: Conditioning, coordinates: Tensor) -> Tensor:
        self.seen = (tokens, sigma, conditioning, coordinates)
        return self.factor * (self.noise - self.clean)


class CaptionLengths(nn.Module):
    """Embeds a caption as its length."""

    def encode(self, prompts: list[str]) -> Conditioning:
        lengths = torch.tensor([[[float(len(prompt))]] for prompt in prompts])
        return Conditioning(lengths, torch.ones(len(prompts), 1, dtype=torch.bool))


def make_batch(size: int = 3, pixels: int = 8, frames: int = 2, seed: int = 0) -> Batch:
    video = torch.rand(size, 3, frames, pixels, pixels, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    ids = [f"clip{index}" for index in range(size)]
    return Batch(video, [f"caption {'x' * index}" for index in range(size)], torch.full((size,), 24.0), ids, 5, size)


def oracle_models(batch: Batch, rng: KeyedRng, factor: float) -> dict[str, nn.Module]:
    objective, vae = FlowMatchingObjective(config()), PlainVae()
    clean = objective.encode(vae, batch.video, rng)
    noise = rng.normal("noise", tuple(clean.shape[1:]))
    return {"vae": vae, "text_encoder": CaptionLengths(), "dit": Oracle(clean, noise, factor)}


def test_target_is_noise_minus_clean() -> None:
    """A model that answers noise - clean has no loss; its negative is off by twice the velocity: 4 * mean(v^2) a sample."""
    batch = make_batch()
    rng = KeyedRng(0, batch.step, batch.sample_ids)
    right, wrong = oracle_models(batch, rng, 1.0), oracle_models(batch, rng, -1.0)
    objective = FlowMatchingObjective(config())
    assert objective.loss(right, batch, rng, "train").total.item() == pytest.approx(0, abs=1e-10)
    oracle = right["dit"]
    expected = 4 * (oracle.noise - oracle.clean).square().mean(dim=(1, 2)).sum()
    torch.testing.assert_close(objective.loss(wrong, batch, rng, "train").total, expected)


def test_the_model_sees_the_mixture_at_its_level() -> None:
    batch = make_batch()
    rng = KeyedRng(0, batch.step, batch.sample_ids)
    roles = oracle_models(batch, rng, 1.0)
    FlowMatchingObjective(config(caption_dropout=0.0)).loss(roles, batch, rng, "train")
    oracle = roles["dit"]
    tokens, sigma, conditioning, coordinates = oracle.seen
    torch.testing.assert_close(tokens, (1 - sigma)[:, None, None] * oracle.clean + sigma[:, None, None] * oracle.noise)
    assert conditioning.embeddings.flatten().tolist() == [len(caption) for caption in batch.captions]
    # The second frame (tokens 4 to 7 of 8) is 1/24 s after the first; the last cell of a frame starts 4 pixels down and right.
    torch.testing.assert_close(coordinates[0, :, 7], torch.tensor([1 / 24, 4.0, 4.0]))


def test_captions_are_dropped_by_their_own_draw() -> None:
    objective = FlowMatchingObjective(config(caption_dropout=0.25))
    assert objective.drop_captions(["a", "b", "c"], torch.tensor([0.1, 0.25, 0.9])) == ["", "b", "c"]


def test_latents_are_normalised_and_sampled_with_the_keyed_draw() -> None:
    batch = make_batch()
    rng = KeyedRng(3, batch.step, batch.sample_ids)
    objective = FlowMatchingObjective(config())
    most_likely = objective.encode(PlainVae(), batch.video)
    torch.testing.assert_close(most_likely, (batch.video[..., ::4, ::4] - 1) / 2)
    sampled = objective.encode(PlainVae(), batch.video, rng)
    torch.testing.assert_close(sampled - most_likely, 0.1 / 2 * rng.normal("posterior", tuple(most_likely.shape[1:])))


@pytest.fixture(scope="module")
def tiny() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "dit": models.build("dit/ltx", "tiny", num_layers=1),
        "vae": models.build("vae/ltx", "tiny"),
        "text_encoder": models.build("text/t5", "tiny", num_layers=1, max_length=24),
    }


def test_text_is_encoded_once_for_each_caption_and_cut_without_effect(tiny: dict[str, nn.Module]) -> None:
    """40 tokens of room, captions of at most 10 bytes: 32 columns stay, and the errors are those of the whole text."""
    text_encoder = models.build("text/t5", "tiny", num_layers=1, max_length=40)
    asked, encode = [], text_encoder.encode

    def counting(prompts: list[str]) -> Conditioning:
        asked.append(list(prompts))
        return encode(prompts)

    text_encoder.encode = counting
    captions = ["a red one", "", "a red one", "b"]
    objective, roles = FlowMatchingObjective(config()), tiny | {"text_encoder": text_encoder}
    clean = torch.randn(4, 16, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    sigma, fps = torch.tensor([0.1, 0.5, 0.5, 0.9]), torch.full((4,), 25.0)
    with torch.no_grad():
        found = objective.velocity_errors(roles, clean, captions, fps, sigma, clean.flip(0))
        whole = encode(captions)
        coordinates = video_coordinates((2, 2, 2), fps, tiny["vae"].compression)
        clean_tokens, noise_tokens = tokens_from_latents(clean), tokens_from_latents(clean.flip(0))
        predicted = tiny["dit"](flow.add_noise(clean_tokens, noise_tokens, sigma), sigma, whole, coordinates)
    expected = (predicted - flow.velocity(clean_tokens, noise_tokens)).square().mean(dim=(1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert asked == [["", "a red one", "b"]]
    assert objective._conditioning(text_encoder, captions).mask.shape == (4, 32)


def clips(size: int = 4) -> Batch:
    return make_batch(size, pixels=16, frames=5)


def run_loss(roles: dict[str, nn.Module], batch: Batch, **fields: Any) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    for model in roles.values():
        model.zero_grad()
    rng = KeyedRng(1, batch.step, batch.sample_ids)
    loss = FlowMatchingObjective(config(**fields)).loss(roles, batch, rng, "train")
    loss.total.backward()
    gradients = {name: p.grad.clone() for name, p in roles["dit"].named_parameters() if p.grad is not None}
    return loss.total.item(), gradients, {name: value.item() for name, value in loss.metrics.items()}


def test_sums_do_not_depend_on_how_a_batch_is_cut(tiny: dict[str, nn.Module]) -> None:
    batch = clips()
    whole, gradients, metrics = run_loss(tiny, batch)
    total, summed, counted = 0.0, dict.fromkeys(gradients, torch.zeros(())), dict.fromkeys(metrics, 0.0)
    for part in (slice(0, 1), slice(1, 4)):
        piece = Batch(batch.video[part], batch.captions[part], batch.fps[part], batch.sample_ids[part], batch.step, 4)
        value, piece_gradients, piece_metrics = run_loss(tiny, piece)
        total += value
        summed = {name: summed[name] + piece_gradients[name] for name in gradients}
        counted = {name: counted[name] + piece_metrics[name] for name in metrics}
    assert total == pytest.approx(whole, rel=1e-5)
    assert counted == pytest.approx(metrics, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-5)


def test_only_the_declared_roles_get_gradients(tiny: dict[str, nn.Module]) -> None:
    batch = clips(2)
    for trained in (False, True):
        run_loss(tiny, batch, train_text_encoder=trained)
        touched = {role for role, model in tiny.items() if any(p.grad is not None for p in model.parameters())}
        phases = FlowMatchingObjective(config(train_text_encoder=trained)).phases
        assert touched == set(phases["train"]) == ({"dit", "text_encoder"} if trained else {"dit"})


def test_the_loss_is_float32_under_autocast(tiny: dict[str, nn.Module]) -> None:
    batch = clips(2)
    exact, _, _ = run_loss(tiny, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rng = KeyedRng(1, batch.step, batch.sample_ids)
        loss = FlowMatchingObjective(config()).loss(tiny, batch, rng, "train").total
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.03)
