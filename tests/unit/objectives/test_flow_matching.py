"""Flow matching: sign and size of the target, what is trained, and independence of how a batch is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from videofm import models
from videofm.config.flow_matching import FlowMatchingConfig
from videofm.errors import ConfigError, DataError
from videofm.models.flops import flops_per_sample
from videofm.objectives.conditioning import draw_given
from videofm.objectives.flow_matching import FlowMatchingObjective
from videofm.objectives.latents import encoded_latents
from videofm.objectives.noise_levels import ClipShape
from videofm.objectives.tokens import draw_subset, loss_weight
from videofm.ops import flow
from videofm.ops.patchify import tokens_from_latents
from videofm.ops.rope import video_coordinates
from videofm.parallel.rng import KeyedRng
from videofm.sampling.solvers import euler
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
    """Answers `factor` times the velocity of known clean and noise tokens plus `error`, and keeps what it was asked."""

    def __init__(self, clean: Tensor, noise: Tensor, factor: float = 1.0, error: float | Tensor = 0.0) -> None:
        super().__init__()
        self.clean, self.noise = tokens_from_latents(clean), tokens_from_latents(noise)
        self.factor, self.error = factor, error

    def coordinates(
        self, shape: tuple[int, int, int], fps: Tensor, compression: Compression, causal_fix: bool = False
    ) -> Tensor:
        return video_coordinates(shape, fps, compression, causal_fix)

    def forward(self, tokens: Tensor, sigma: Tensor, conditioning: Conditioning, coordinates: Tensor) -> Tensor:
        self.seen = (tokens, sigma, conditioning, coordinates)
        return self.factor * (self.noise - self.clean) + self.error


class CaptionLengths(nn.Module):
    """Embeds a caption as its length."""

    def encode(self, prompts: list[str]) -> Conditioning:
        lengths = torch.tensor([[[float(len(prompt))]] for prompt in prompts])
        return Conditioning(lengths, torch.ones(len(prompts), 1, dtype=torch.bool))

    def cuts(self, prompts: list[str]) -> dict[str, list[bool]]:
        return {"text": [len(prompt) > 9 for prompt in prompts]}


def make_batch(size: int = 3, pixels: int = 8, frames: int = 2, seed: int = 0) -> Batch:
    video = torch.rand(size, 3, frames, pixels, pixels, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    ids = [f"clip{index}" for index in range(size)]
    return Batch(video, [f"caption {'x' * index}" for index in range(size)], torch.full((size,), 24.0), ids, 5, size)


def oracle_models(batch: Batch, rng: KeyedRng, factor: float = 1.0, error: float | Tensor = 0.0) -> dict[str, nn.Module]:
    vae = PlainVae()
    clean = encoded_latents(vae, batch.video, rng)
    noise = rng.normal("noise", tuple(clean.shape[1:]))
    return {"vae": vae, "text_encoder": CaptionLengths(), "dit": Oracle(clean, noise, factor, error)}


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


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_steps_along_the_exact_velocity_end_at_the_clean_latents(num_steps: int) -> None:
    """The path is a straight line from noise (sigma 1) to data (sigma 0), so any number of Euler steps is exact."""
    batch = make_batch()
    oracle = oracle_models(batch, KeyedRng(0, batch.step, batch.sample_ids))["dit"]
    text = CaptionLengths().encode(batch.captions)
    end = euler(lambda x, sigma: oracle(x, sigma, text, None), oracle.noise, torch.linspace(1, 0, num_steps + 1))
    torch.testing.assert_close(end, oracle.clean, rtol=0, atol=1e-5)


MODES = {
    "nothing": {},
    "first_frame": {"first_frame": 1.0},
    "first_and_last": {"first_and_last": 1.0},
    "continuation": {"continuation": {"probability": 1.0, "num_frames": [3]}},
    "inpainting": {"inpainting": {"probability": 1.0}},
    "mixed": {"first_frame": 0.4, "inpainting": {"probability": 0.4}},
}


@pytest.mark.parametrize("conditioning", MODES.values(), ids=MODES)
def test_the_loss_does_not_depend_on_how_much_is_given(conditioning: dict[str, Any]) -> None:
    """A model whose velocity is off by 0.5 everywhere has a loss of 0.25 a sample, however many tokens bear loss."""
    batch = make_batch(size=4, frames=4)
    rng = KeyedRng(0, batch.step, batch.sample_ids)
    roles = oracle_models(batch, rng, error=0.5)
    loss = FlowMatchingObjective(config(conditioning=conditioning)).loss(roles, batch, rng, "train")
    assert loss.total.item() == pytest.approx(4 * 0.25, rel=1e-5)
    assert loss.metrics["mse"].item() == pytest.approx(4 * 0.25, rel=1e-5)
    assert ("given" in loss.metrics) == bool(conditioning)


def test_given_tokens_are_clean_at_level_zero_and_bear_no_loss() -> None:
    """The first frame is given: its 4 of 16 tokens come in as they are, at level 0, and any answer for them is as good."""
    batch = make_batch(frames=4)
    rng = KeyedRng(0, batch.step, batch.sample_ids)
    error = torch.zeros(16, 1).index_fill(0, torch.arange(4), 1e3)
    roles = oracle_models(batch, rng, error=error)
    loss = FlowMatchingObjective(config(conditioning={"first_frame": 1.0})).loss(roles, batch, rng, "train")
    oracle = roles["dit"]
    tokens, sigma, _, _ = oracle.seen
    plain = rng.uniform("sigma")
    assert torch.equal(tokens[:, :4], oracle.clean[:, :4])
    assert (sigma[:, :4] == 0).all()
    assert (sigma[:, 4:] == sigma[:, 4:5]).all()
    torch.testing.assert_close(tokens[:, 4:], flow.add_noise(oracle.clean, oracle.noise, sigma)[:, 4:])
    assert loss.total.item() == pytest.approx(0, abs=1e-8)
    metrics = {name: value.item() for name, value in loss.metrics.items()}
    assert metrics["given"] == pytest.approx(3 * 4 / 16)
    assert metrics["share_first_frame"] == 3
    law = FlowMatchingObjective(config()).noise_levels
    levels = law.quantile(plain, ClipShape.of(torch.zeros(1, 3, 4, 2, 2), PlainVae.compression))
    assert metrics["sigma"] == pytest.approx(levels.sum().item(), rel=1e-5)


def test_given_tokens_can_have_a_little_noise() -> None:
    batch = make_batch(frames=4)
    rng = KeyedRng(0, batch.step, batch.sample_ids)
    roles = oracle_models(batch, rng)
    conditioning = {"first_frame": 1.0, "condition_sigma": 0.05}
    FlowMatchingObjective(config(conditioning=conditioning)).loss(roles, batch, rng, "train")
    oracle = roles["dit"]
    tokens, sigma, _, _ = oracle.seen
    assert torch.equal(sigma[:, 0], 0.05 * rng.uniform("condition_sigma"))
    torch.testing.assert_close(tokens, flow.add_noise(oracle.clean, oracle.noise, sigma))


def test_levels_are_a_number_a_sample_where_nothing_can_be_given() -> None:
    """Also of a run that gives first frames, in its micro-batches of images, where the log has the same names."""
    batch = make_batch(frames=1)
    rng = KeyedRng(0, batch.step, batch.sample_ids)
    names = {}
    for conditioning in ({}, {"first_frame": 0.5}):
        roles = oracle_models(batch, rng)
        loss = FlowMatchingObjective(config(conditioning=conditioning)).loss(roles, batch, rng, "train")
        assert roles["dit"].seen[1].shape == (3,)
        names[bool(conditioning)] = set(loss.metrics)
    video = make_batch(frames=4)
    rng = KeyedRng(0, video.step, video.sample_ids)
    objective = FlowMatchingObjective(config(conditioning={"first_frame": 0.5}))
    assert set(objective.loss(oracle_models(video, rng), video, rng, "train").metrics) == names[True]
    assert names[False] == {"loss", "mse", "sigma", "cut_text", "tokens", "text_tokens", "padding_share"}


def test_every_frame_can_have_its_own_level() -> None:
    """Three frames of four tokens: one level a frame, all different, each a draw of the law."""
    batch = make_batch(size=300, frames=3)
    rng = KeyedRng(0, batch.step, batch.sample_ids)
    roles = oracle_models(batch, rng)
    section = config(sigma_per="frame", noise_levels={"kind": "logit_normal", "mean": 1.0})
    loss = FlowMatchingObjective(section).loss(roles, batch, rng, "train")
    frames = roles["dit"].seen[1].view(300, 3, 4)
    assert (frames == frames[:, :, :1]).all()
    assert (frames[:, :, 0].sort(dim=1).values.diff(dim=1) > 0).all()
    logits = torch.logit(frames[:, :, 0])
    assert logits.mean(dim=0).tolist() == pytest.approx([1.0] * 3, abs=4 / 300**0.5)
    assert torch.corrcoef(logits.T)[0, 1].abs() < 4 / 300**0.5
    assert loss.total.item() == pytest.approx(0, abs=1e-6)
    assert loss.metrics["sigma"].item() == pytest.approx(frames.mean(dim=(1, 2)).sum().item(), rel=1e-5)


@pytest.mark.parametrize("sigma_per", ["sample", "frame"])
@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_squares_are_weighted_at_their_level(weighting: str, sigma_per: str) -> None:
    """A model that is off by 0.5 everywhere has the loss 0.25 * mean weight a sample; `mse` stays without weights."""
    batch = make_batch(frames=4)
    rng = KeyedRng(0, batch.step, batch.sample_ids)
    roles = oracle_models(batch, rng, error=0.5)
    loss = FlowMatchingObjective(config(loss_weighting=weighting, sigma_per=sigma_per)).loss(roles, batch, rng, "train")
    weights = loss_weight(weighting, roles["dit"].seen[1])
    assert weights is not None
    assert loss.total.item() == pytest.approx(0.25 * weights.reshape(3, -1).mean(dim=1).sum().item(), rel=1e-4)
    assert loss.metrics["mse"].item() == pytest.approx(0.25 * 3, rel=1e-4)


def test_the_causal_fix_moves_frames_in_time() -> None:
    """With 1 pixel frame a latent frame nothing moves; with 8, latent frame 1 starts at pixel frame 1, not 8."""
    batch = make_batch(frames=2)
    rng = KeyedRng(0, batch.step, batch.sample_ids)
    for time, fixed, expected in ((1, True, 1 / 24), (8, True, 1 / 24), (8, False, 8 / 24)):
        roles = oracle_models(batch, rng)
        roles["vae"].compression = Compression(time, 4, 4)
        FlowMatchingObjective(config(causal_fix=fixed)).loss(roles, batch, rng, "train")
        assert roles["dit"].seen[3][0, 0, -1].item() == pytest.approx(expected)


def test_captions_are_dropped_by_their_own_draw() -> None:
    objective = FlowMatchingObjective(config(caption_dropout=0.25))
    assert objective.drop_captions(["a", "b", "c"], torch.tensor([0.1, 0.25, 0.9])) == ["", "b", "c"]


def test_latents_are_normalised_and_sampled_with_the_keyed_draw() -> None:
    batch = make_batch()
    rng = KeyedRng(3, batch.step, batch.sample_ids)
    most_likely = encoded_latents(PlainVae(), batch.video)
    torch.testing.assert_close(most_likely, (batch.video[..., ::4, ::4] - 1) / 2)
    sampled = encoded_latents(PlainVae(), batch.video, rng)
    torch.testing.assert_close(sampled - most_likely, 0.1 / 2 * rng.normal("posterior", tuple(most_likely.shape[1:])))


@pytest.fixture(scope="module")
def tiny() -> dict[str, nn.Module]:
    """Fresh models, but for a DiT that looks at text and answers: its two zero layers start otherwise here."""
    torch.manual_seed(0)
    dit = models.build("dit/ltx", "tiny", num_layers=1)
    for layer in (dit.proj_out, dit.blocks[0].cross_attention.out):
        nn.init.normal_(layer.weight, std=0.1)
    return {
        "dit": dit,
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


EVERYTHING = {
    "sigma_per": "frame",
    "loss_weighting": "cosmap",
    "conditioning": {"first_frame": 0.3, "inpainting": {"probability": 0.3}, "condition_sigma": 0.1},
    "token_dropping": {"num_tokens": 6},
    "noise_levels": {"kind": "resolution_shift"},
    "causal_fix": True,
}


def run_loss(roles: dict[str, nn.Module], batch: Batch, **fields: Any) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    for model in roles.values():
        model.zero_grad()
    rng = KeyedRng(1, batch.step, batch.sample_ids)
    loss = FlowMatchingObjective(config(**fields)).loss(roles, batch, rng, "train")
    loss.total.backward()
    gradients = {name: p.grad.clone() for name, p in roles["dit"].named_parameters() if p.grad is not None}
    return loss.total.item(), gradients, {name: value.item() for name, value in loss.metrics.items()}


@pytest.mark.parametrize("fields", [{}, EVERYTHING], ids=["plain", "everything"])
def test_sums_do_not_depend_on_how_a_batch_is_cut(tiny: dict[str, nn.Module], fields: dict[str, Any]) -> None:
    batch = clips()
    whole, gradients, metrics = run_loss(tiny, batch, **fields)
    total, summed, counted = 0.0, dict.fromkeys(gradients, torch.zeros(())), dict.fromkeys(metrics, 0.0)
    for part in (slice(0, 1), slice(1, 4)):
        piece = Batch(batch.video[part], batch.captions[part], batch.fps[part], batch.sample_ids[part], batch.step, 4)
        value, piece_gradients, piece_metrics = run_loss(tiny, piece, **fields)
        total += value
        summed = {name: summed[name] + piece_gradients[name] for name in gradients}
        counted = {name: counted[name] + piece_metrics[name] for name in metrics}
    assert total == pytest.approx(whole, rel=1e-5)
    assert counted == pytest.approx(metrics, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-5)


def test_dropping_tokens_is_running_on_the_subset(tiny: dict[str, nn.Module]) -> None:
    """The tokens that stay, put through the model by hand and in another order, give the same loss; all tokens another."""
    batch = clips(3)
    rng = KeyedRng(1, batch.step, batch.sample_ids)
    conditioning = {"first_frame": 0.5}
    dropped, _, _ = run_loss(tiny, batch, conditioning=conditioning, token_dropping={"num_tokens": 5})
    whole, _, _ = run_loss(tiny, batch, conditioning=conditioning)

    objective = FlowMatchingObjective(config(conditioning=conditioning))
    with torch.no_grad():
        clean = encoded_latents(tiny["vae"], batch.video, rng)
        noise, captions = (
            rng.normal("noise", tuple(clean.shape[1:])),
            objective.drop_captions(batch.captions, rng.uniform("caption")),
        )
        given = draw_given(objective.config.conditioning, tuple(clean.shape[2:]), rng)
        assert given is not None
        sigma = given.levels(objective.draw_sigma(clean, tiny["vae"].compression, rng))
        index = draw_subset(sigma.shape[1], given.mask, 5, rng).flip(1)
        coordinates = video_coordinates(tuple(clean.shape[2:]), batch.fps, tiny["vae"].compression)
        text, total = objective._conditioning(tiny["text_encoder"], captions), 0.0
        for row, kept in enumerate(index):
            x, z = (tokens_from_latents(latents)[row : row + 1, kept] for latents in (clean, noise))
            level, place = sigma[row : row + 1, kept], coordinates[row : row + 1][:, :, kept]
            error = tiny["dit"](flow.add_noise(x, z, level), level, text.rows(torch.tensor([row])), place) - (z - x)
            total += error[:, ~given.mask[row, kept]].square().mean().item()
    assert given.mask.any()
    assert dropped == pytest.approx(total, rel=1e-5)
    assert dropped != pytest.approx(whole, rel=1e-3)


def test_clips_with_too_few_tokens_are_refused(tiny: dict[str, nn.Module]) -> None:
    with pytest.raises(DataError, match="token_dropping.num_tokens is 500, but these clips have"):
        run_loss(tiny, clips(2), token_dropping={"num_tokens": 500})


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


def test_a_run_pins_the_statistics_of_its_vae() -> None:
    vae = models.build("vae/ltx", "tiny")
    own = vae.latent_statistics.hash
    FlowMatchingObjective(config(latent_statistics_hash=own)).check({"vae": vae})
    FlowMatchingObjective(config()).check({"vae": vae})
    vae.set_latent_statistics(torch.ones(16), torch.ones(16))
    with pytest.raises(ConfigError, match=f"latent_statistics_hash is {own}, but the statistics of role vae have"):
        FlowMatchingObjective(config(latent_statistics_hash=own)).check({"vae": vae})


def test_the_cost_of_a_sample_is_counted(tiny: dict[str, nn.Module]) -> None:
    """4 clips of 5x16x16 are 2x2x2 = 8 tokens each; captions of 8 to 11 bytes and an end mark stand in 32 columns, so the
    padding is 23, 22, 21 and 20 of 32. Operations are those of the model's formula, for each sample.
    """
    text_encoder = models.build("text/t5", "tiny", num_layers=1, max_length=40)
    batch, roles = clips(), tiny | {"text_encoder": text_encoder}
    rng = KeyedRng(0, batch.step, batch.sample_ids)
    for dropping, num_tokens in ((None, 8), ({"num_tokens": 6}, 6)):
        objective = FlowMatchingObjective(config(caption_dropout=0.0, token_dropping=dropping))
        metrics = objective.loss(roles, batch, rng, "train").metrics
        expected = flops_per_sample(tiny["dit"], num_tokens, 32)
        assert float(metrics["tokens"]) == 4 * num_tokens and float(metrics["text_tokens"]) == 4 * 32
        assert float(metrics["flops"]) == pytest.approx(4 * expected, rel=1e-6) and expected > 0
        assert float(metrics["padding_share"]) == pytest.approx((23 + 22 + 21 + 20) / 32)
