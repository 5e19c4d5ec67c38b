"""Flow-DPO: what a pair shares, what its loss and gradient are, against a loop over pairs in float64 and against its laws."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tests.unit.objectives.dpo_by_hand import BETA, ByHand, gradient, loss_of, make
from tests.unit.objectives.paired_batches import SEED, STEP, PerToken, pairs, rng_of, roles, swapped
from videofm import models
from videofm.config.dpo import DPOConfig
from videofm.errors import ConfigError
from videofm.objectives.dpo import DPOObjective
from videofm.parallel.rng import KeyedRng
from videofm.types import Batch


@pytest.fixture
def policy() -> PerToken:
    return PerToken(seed=0)


@pytest.fixture
def other() -> PerToken:
    return PerToken(seed=1)


# --- against a loop over pairs -----------------------------------------------------------------------------------------------


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "quadratic": {"beta_schedule": "quadratic"},
    "sum": {"error_reduction": "sum", "beta": BETA / 36},
    "smoothed": {"label_smoothing": 0.2},
    "with_winner": {"winner_weight": 0.7},
    "guarded": {"loser_safeguard": 0.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_is_that_of_a_loop_over_pairs(variant: str, policy: PerToken, other: PerToken) -> None:
    """-(1 - e) log s(-z) - e log s(z), z = beta_p / 2 * m, plus w * err_winner, times the weight of the pair. A clip has 12
    tokens of 3 channels, so beta / 36 with sums is beta with means. The safeguard changes no value."""
    weights = torch.tensor([1.0, 0.25, 3.0])
    batch = pairs(pair_weights=weights)
    found = loss_of(make(other, **VARIANTS[variant]), policy, batch)
    hand, fields = ByHand(batch), VARIANTS[variant]
    margins = hand.margins(policy, other).detach()
    betas = [BETA * (1 - sigma) ** 2 if variant == "quadratic" else BETA for sigma in hand.sigmas()]
    errors = [[hand.error(number, model).mean().item() for number in range(6)] for model in (policy, other)]
    smoothing, winner = fields.get("label_smoothing", 0.0), fields.get("winner_weight", 0.0)
    expected = 0.0
    for number, (margin, beta) in enumerate(zip(margins.tolist(), betas, strict=True)):
        z = beta / 2 * margin
        loss = (1 - smoothing) * math.log1p(math.exp(z)) + smoothing * math.log1p(math.exp(-z))
        expected += weights[number].item() * (loss + winner * errors[0][number])
    wanted = {
        "loss": expected,
        "margin": -margins.sum().item(),
        "implicit_accuracy": float((margins < 0).sum()),
        "winner_error": sum(errors[0][:3]),
        "loser_error": sum(errors[0][3:]),
        "winner_reference_error": sum(errors[1][:3]),
        "loser_reference_error": sum(errors[1][3:]),
        "effective_beta": sum(betas),
        "tied": 0.0,
        "sigma": sum(hand.sigmas()),
    }
    assert found.total.item() == pytest.approx(expected, rel=2e-5)
    got = {name: value.item() for name, value in found.metrics.items()}
    assert {name: got[name] for name in wanted} == pytest.approx(wanted, rel=2e-5)
    assert margins.abs().max() > 0 and not any(value.requires_grad for value in found.metrics.values())
    assert ("loser_scale" in got) == (variant == "guarded")


def test_what_a_pair_costs_is_counted() -> None:
    """12 tokens and a text of one a clip, two clips a pair, three pairs; `x` and `xx` are within nine letters."""
    got = loss_of(make(PerToken()), PerToken(), pairs()).metrics
    assert got["tokens"] == 3 * 2 * 12 and got["text_tokens"] == 3 * 2 and got["padding_share"] == 0 and got["cut_text"] == 0


# --- the law at the start, and where a step leads ----------------------------------------------------------------------------


@pytest.mark.parametrize("segments", [False, True])
def test_at_the_reference_it_is_log_two_and_pulls(segments: bool, policy: PerToken) -> None:
    """m is 0 to the bit, so the loss is log 2 for each pair; its gradient is (beta / 4) grad m, which is not zero."""
    batch = pairs(frame_labels=torch.ones(3, 5) if segments else None)
    found = loss_of(make(copy.deepcopy(policy), segments=segments), policy, batch)
    assert found.total.item() == (torch.tensor(2.0).log() * torch.ones(3)).sum().item()
    assert found.metrics["margin"] == 0 and found.metrics["implicit_accuracy"] == 1.5
    margin = ByHand(batch).margins(policy, policy).sum()
    assert margin.item() == 0
    wanted = BETA / 4 * gradient(margin, policy)
    assert wanted.norm() > 1
    torch.testing.assert_close(gradient(found.total, policy), wanted.float(), rtol=1e-4, atol=1e-5)


def test_a_step_of_descent_raises_the_margin(policy: PerToken) -> None:
    batch, objective = pairs(), make(copy.deepcopy(policy))
    before = loss_of(objective, policy, batch)
    slopes = gradient(before.total, policy)
    with torch.no_grad():
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(policy.parameters()) - 1e-4 * slopes, policy.parameters())
    after = loss_of(objective, policy, batch)
    assert after.metrics["margin"] > 0 == before.metrics["margin"]
    # To first order the loss falls by the rate times the squared length of the gradient.
    assert (before.total - after.total).item() == pytest.approx(1e-4 * slopes.square().sum().item(), rel=0.1)


def test_swapping_the_sides_reverses_the_loss(policy: PerToken, other: PerToken) -> None:
    """exp(-L) = sigmoid(-z) and exp(-L') = sigmoid(z) of one pair; the two pull in opposite directions along grad m."""
    batch = pairs(1)
    there, back = (loss_of(make(other), policy, of) for of in (batch, swapped(batch)))
    assert (-there.total).exp().item() + (-back.total).exp().item() == pytest.approx(1.0, abs=1e-6)
    assert there.metrics["margin"].item() == pytest.approx(-back.metrics["margin"].item(), rel=1e-5)
    ahead, behind = gradient(there.total, policy), gradient(back.total, policy)
    assert torch.cosine_similarity(ahead, behind, dim=0).item() == pytest.approx(-1.0, abs=1e-4)
    # The slopes are (beta / 2) sigmoid(z) and -(beta / 2) sigmoid(-z): apart by beta / 2.
    slope = gradient(ByHand(batch).margins(policy, other).sum(), policy).norm().item()
    assert (ahead.norm() + behind.norm()).item() == pytest.approx(BETA / 2 * slope, rel=1e-3)


@pytest.mark.parametrize("beta", [0.1, 40.0, 1e6])
def test_no_gradient_is_longer_than_half_beta_times_that_of_the_margin(beta: float, policy: PerToken, other: PerToken) -> None:
    """Also where |m| beta is beyond 1e4, and for the pair that is most wrongly ordered."""
    batch = pairs(1)
    for of in (batch, swapped(batch)):
        found = loss_of(make(other, beta=beta), policy, of)
        slopes = gradient(found.total, policy)
        bound = beta / 2 * gradient(ByHand(of).margins(policy, other).sum(), policy).norm().item()
        assert found.total.isfinite() and slopes.isfinite().all() and slopes.norm().item() <= bound * (1 + 1e-4)
    assert beta < 1e6 or abs(found.metrics["margin"].item()) * beta > 1e4


# --- what the clips of a pair share ------------------------------------------------------------------------------------------


class SpyRng:
    """A KeyedRng that keeps the names of draws, and of how many rows they were."""

    def __init__(self, rng: KeyedRng, seen: list[tuple[str, int]]) -> None:
        self.rng, self.seen, self.device = rng, seen, rng.device

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.seen.append((name, len(self.rng.sample_ids)))
        return self.rng.normal(name, shape)

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        self.seen.append((name, len(self.rng.sample_ids)))
        return self.rng.uniform(name, shape)

    def rows(self, first: int, end: int) -> SpyRng:
        return SpyRng(self.rng.rows(first, end), self.seen)


def test_a_pair_has_one_noise_one_level_and_one_caption(policy: PerToken) -> None:
    batch, seen = pairs(), []
    make(policy, caption_dropout=0.5).loss(roles(policy), batch, SpyRng(rng_of(batch), seen), "train")  # type: ignore[arg-type]
    assert sorted(seen) == [("caption", 3), ("noise", 3), ("posterior", 6), ("sigma", 3)]
    tokens, sigma, text = policy.seen
    assert torch.equal(sigma[:3], sigma[3:]) and torch.equal(text.embeddings[:3], text.embeddings[3:])
    # What is left when the clean tokens are taken away is the same noise; the clips themselves are not the same.
    hand = ByHand(batch)
    for number in range(3):
        (winner, noise, level), (loser, _, _) = hand.clip(number), hand.clip(number + 3)
        for row, clean in ((number, winner), (number + 3, loser)):
            left = (tokens[row].double() - (1 - level) * clean) / level
            torch.testing.assert_close(left, noise, rtol=0, atol=1e-4)
        assert not torch.allclose(winner, loser, atol=0.1)


def test_draws_of_its_own_for_each_clip_would_be_seen(policy: PerToken, other: PerToken) -> None:
    """The loop with a noise and a level for the loser apart is another loss, so the one above would not agree with it."""
    batch = pairs()
    shared, own = (ByHand(batch, own_draws).margins(policy, other) for own_draws in (False, True))
    found = -loss_of(make(other), policy, batch).metrics["margin"].item()
    assert found == pytest.approx(shared.sum().item(), rel=1e-4)
    assert abs(found - own.sum().item()) > 0.1 * abs(found)


def test_clips_whose_ids_differ_are_no_pair(policy: PerToken) -> None:
    batch = replace(pairs(), sample_ids=[f"clip{index}" for index in range(6)])
    with pytest.raises(AssertionError, match="both clips of a pair have its id"):
        loss_of(make(policy), policy, batch)


def test_dropped_captions_are_those_of_pairs(policy: PerToken) -> None:
    batch = pairs(8)
    loss_of(make(policy, caption_dropout=0.5), policy, batch)
    lengths = policy.seen[2].embeddings.flatten()
    kept = rng_of(batch).uniform("caption") >= 0.5
    assert lengths.tolist() == [len(caption) * keep for caption, keep in zip(batch.captions, kept.tolist(), strict=True)]
    assert 0 < kept.sum() < 16


class Turned(KeyedRng):
    """Draws with rows and columns changed over, for clips that are."""

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return super().normal(name, shape).transpose(-1, -2)

    def rows(self, first: int, end: int) -> Turned:
        return Turned(self.seed, self.step, self.sample_ids[first:end], self.device)


@pytest.mark.parametrize("fields", [{}, {"loser_safeguard": 1.0}, {"segments": True}])
def test_turning_both_clips_over_changes_nothing(fields: dict[str, Any], policy: PerToken, other: PerToken) -> None:
    """The model takes each token by itself, so rows and columns of square clips can change places: all dims are reduced."""
    labels = torch.tensor([[1.0, 1, 1, 0, -1]] * 3)
    batch = pairs(frame_labels=labels)
    turned = replace(batch, video=batch.video.transpose(3, 4))
    objective = make(other, **fields)
    plain = objective.loss(roles(policy), batch, rng_of(batch), "train")
    over = objective.loss(roles(policy), turned, Turned(SEED, STEP, batch.sample_ids), "train")
    assert not torch.equal(batch.video, turned.video)
    torch.testing.assert_close(over.total, plain.total, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(over.total, policy), gradient(plain.total, policy), rtol=1e-4, atol=1e-5)


# --- with models of ours -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    found = {"dit": models.build("dit/ltx", "tiny", num_layers=1), "vae": models.build("vae/ltx", "tiny")}
    found["text_encoder"] = models.build("text/t5", "tiny")
    for parameter in found["dit"].parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return found


def ltx_batch() -> Batch:
    video = torch.rand(4, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    held: dict[str, Any] = {"pair_weights": torch.ones(2), "pair_ties": torch.zeros(2, dtype=torch.bool)}
    return Batch(video, ["a red circle", "a blue square"] * 2, torch.full((4,), 8.0), ["p", "q"] * 2, 0, 2, **held)


def test_a_transformer_of_ours_starts_at_log_two(built: dict[str, nn.Module]) -> None:
    """A frozen copy as the role `reference`; what was encoded before gives the same as pixels, and half of a batch its half."""
    batch = ltx_batch()
    objective = DPOObjective(DPOConfig.model_validate({"kind": "dpo", "reference": {"kind": "frozen"}}))
    assert objective.roles == ("dit", "vae", "text_encoder", "reference")
    of = built | {"reference": copy.deepcopy(built["dit"])}
    objective.check(of)
    rng = KeyedRng(0, 0, batch.sample_ids)
    found = objective.loss(of, batch, rng, "train")
    assert found.total.item() == 2 * torch.tensor(2.0).log().item()
    posterior = built["vae"].encode(batch.video)
    cached = replace(batch, video=torch.zeros(4, 3, 0, 0, 0), latents=posterior.mean, logvar=posterior.logvar)
    with torch.no_grad():
        of["reference"].proj_out.weight.mul_(1.5)
    whole = [objective.loss(of, given, rng, "train").total for given in (batch, cached)]
    torch.testing.assert_close(whole[0], whole[1], rtol=1e-4, atol=0)
    halves = []
    for number, name in enumerate("pq"):
        rows = [number, number + 2]
        fields = {"video": batch.video[rows], "captions": [batch.captions[row] for row in rows], "fps": batch.fps[rows]}
        fields |= {"pair_weights": torch.ones(1), "pair_ties": torch.zeros(1, dtype=torch.bool), "sample_ids": [name] * 2}
        halves.append(objective.loss(of, replace(batch, **fields), KeyedRng(0, 0, [name] * 2), "train").total)
    # beta / 2 is 250, by which the rounding of errors grows.
    torch.testing.assert_close(torch.stack(halves).sum(), whole[0], rtol=1e-4, atol=0)


def test_what_is_measured_before_is_what_the_policy_gives(built: dict[str, nn.Module]) -> None:
    """`measure` at some draws is the policy's errors of `loss` at the same."""
    batch = ltx_batch()
    objective = DPOObjective(DPOConfig.model_validate({"kind": "dpo", "reference": {"kind": "cached", "num_draws": 1}}))
    assert objective.roles == ("dit", "vae", "text_encoder")
    rng = KeyedRng(0, 0, batch.sample_ids)
    errors = objective.measure(built, batch, rng.fixed(0))
    assert errors.shape == (4, 1) and not errors.requires_grad
    assert objective.precomputed is not None
    measured = objective.precomputed.measure(built, batch, rng.fixed(0))
    objective.precomputed.take({name: measured[number][None] for number, name in enumerate("pq")})
    found = objective.loss(built, batch, rng, "train")
    assert found.metrics["winner_error"].item() == pytest.approx(errors[:2].sum().item(), rel=1e-5)
    assert found.total.item() == pytest.approx(2 * math.log(2), rel=1e-5)


# --- refusals ----------------------------------------------------------------------------------------------------------------


def test_a_micro_batch_without_pairs_is_refused(policy: PerToken) -> None:
    batch = replace(pairs(), pair_weights=None)
    with pytest.raises(ConfigError, match=r"objective dpo reads pair_weights of pairs.*set data\.pairs\.path"):
        loss_of(make(policy), policy, batch)


def test_segments_that_no_pair_has_are_refused(policy: PerToken) -> None:
    with pytest.raises(ConfigError, match=r"frame_labels.*no pair of data\.pairs has segments"):
        loss_of(make(policy, segments=True), policy, pairs())


def test_latents_of_another_normalisation_are_refused(policy: PerToken) -> None:
    with pytest.raises(ConfigError, match="latent_statistics_hash is other"):
        make(policy, latent_statistics_hash="other").check(roles(policy))


def test_smoothing_and_the_safeguard_contradict_each_other() -> None:
    fields = {"kind": "dpo", "reference": {"kind": "frozen"}, "label_smoothing": 0.1, "loser_safeguard": 0.9}
    with pytest.raises(ValidationError, match="loser_safeguard 0.9 with label_smoothing 0.1"):
        DPOConfig.model_validate(fields)


@pytest.mark.parametrize(
    ("field", "value"), [("beta", 0.0), ("label_smoothing", 0.5), ("loser_safeguard", 1.5), ("winner_weight", -1.0)]
)
def test_values_that_mean_nothing_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValidationError, match=field):
        DPOConfig.model_validate({"kind": "dpo", "reference": {"kind": "frozen"}, field: value})
