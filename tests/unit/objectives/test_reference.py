"""Four ways to have a reference, one loss; and nothing of a reference that learns (oracle list F-C 4)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.objectives.paired_batches import pairs, rng_of, roles
from videofm import models
from videofm.config.dpo import DPOConfig
from videofm.errors import ConfigError, DataError
from videofm.models.lora import is_lora
from videofm.objectives.dpo import DPOObjective
from videofm.parallel.rng import KeyedRng
from videofm.types import Batch, Loss

KINDS: dict[str, dict[str, Any]] = {
    "adapters_off": {"kind": "adapters_off"},
    "second_adapter": {"kind": "second_adapter"},
    "frozen": {"kind": "frozen"},
    "offloaded": {"kind": "frozen", "offload": True},
    "cached": {"kind": "cached", "num_draws": 3},
}


def dit(**changes: Any) -> nn.Module:
    """A transformer none of whose weights is zero; the same each time."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_heads": 2, "head_width": 16, "in_channels": 3, "caption_channels": 1}
    model = models.build("dit/ltx", "tiny", **sizes | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 0.1:
                parameter.normal_(std=0.1)
    return model


def objective(kind: str, **fields: Any) -> DPOObjective:
    settings = {"kind": "dpo", "reference": KINDS.get(kind, {"kind": kind}), "beta": 50.0} | fields
    return DPOObjective(DPOConfig.model_validate(settings))


def policy_models(of: DPOObjective, lora: bool = True) -> dict[str, nn.Module]:
    """The models of an objective as training builds them; those that do not train are frozen."""
    policy = dit()
    if lora:
        torch.manual_seed(1)
        models.inject_lora(policy, 4)
    built = roles(policy)
    if "reference" in of.roles:
        built["reference"] = dit().requires_grad_(False).eval()
    of.extend(built)
    models.freeze_all_but_lora(policy)
    return built


def move(policy: nn.Module) -> None:
    """What a few steps would do to what trains."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def ready(of: DPOObjective, built: dict[str, nn.Module], batch: Batch) -> None:
    """Measure what the objective wants before the first step, as the trainer does."""
    of.check(built)
    if (wanted := of.precomputed) is not None:
        draws = [wanted.measure(built, batch, rng_of(batch).fixed(number)) for number in range(wanted.num_draws)]
        found = torch.stack(draws, dim=1)
        wanted.take({name: found[row] for row, name in enumerate(batch.sample_ids[: len(found)])})


def loss_of(kind: str, batch: Batch, lora: bool = True, **fields: Any) -> tuple[Loss, dict[str, nn.Module]]:
    """The loss, gone backward from, of a policy that has moved away from its reference, at the draws of a cached one."""
    of = objective(kind, **fields)
    built = policy_models(of, lora)
    built["dit"].train()
    ready(of, built, batch)
    move(built["dit"])
    rng = rng_of(batch) if kind == "cached" else rng_of(batch).fixed(batch.step % 3)
    loss = of.loss(built, batch, rng, "train")
    loss.total.backward()
    return loss, built


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("fields", [{}, {"segments": True, "caption_dropout": 0.5, "winner_weight": 0.1}])
def test_all_ways_give_the_same_loss_and_gradient(fields: dict[str, Any]) -> None:
    """Of a policy with adapters that moved, against the policy as it was. With segments errors are those of latent frames."""
    batch = pairs()
    if "segments" in fields:
        batch = replace(batch, frame_labels=torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 0, -1, -1], [0, 1, -1, 1, 0]]))
    wanted, built = loss_of("adapters_off", batch, **fields)
    assert abs(wanted.total.item() - 3 * math.log(2)) > 1e-2, "the policy has moved"
    wanted_gradients = gradients(built["dit"])
    for kind in KINDS:
        found, built = loss_of(kind, batch, **fields)
        torch.testing.assert_close(found.total, wanted.total, rtol=0, atol=1e-6, msg=kind)
        assert found.metrics.keys() == wanted.metrics.keys()
        for name, value in found.metrics.items():
            torch.testing.assert_close(value, wanted.metrics[name], rtol=1e-6, atol=1e-6, msg=f"{kind}: {name}")
        found_gradients = gradients(built["dit"])
        assert found_gradients.keys() == wanted_gradients.keys()
        for name, value in wanted_gradients.items():
            torch.testing.assert_close(found_gradients[name], value, rtol=1e-5, atol=1e-6, msg=f"{kind}: {name}")


def test_a_whole_policy_has_a_frozen_or_a_cached_reference() -> None:
    """No adapters: all weights train, and both references give the same."""
    batch = pairs()
    frozen, cached = loss_of("frozen", batch, lora=False), loss_of("cached", batch, lora=False)
    torch.testing.assert_close(frozen[0].total, cached[0].total, rtol=0, atol=1e-6)
    wanted = gradients(frozen[1]["dit"])
    assert wanted.keys() == dict(dit().named_parameters()).keys() == gradients(cached[1]["dit"]).keys()
    assert not gradients(frozen[1]["reference"])


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapters_that_learn_get_a_gradient(kind: str) -> None:
    """Every one of them does; the base, a second adapter and a reference of its own get none."""
    _, built = loss_of(kind, pairs())
    found = gradients(built["dit"])
    assert found.keys() == {name for name, _ in built["dit"].named_parameters() if is_lora(name)}
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert not any(gradients(model) for role, model in built.items() if role != "dit")


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_keeps_nothing_for_the_backward_pass(kind: str) -> None:
    """No tensor is saved while it computes, and its errors have no gradient; the policy's pass, the control, saves many."""
    of, batch = objective(kind), pairs()
    built = policy_models(of)
    ready(of, built, batch)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        drawn = of._draw(built, batch, of.reference.draws(rng_of(batch), batch.step))
        errors = of.reference.errors(built, batch, lambda model: of._errors(drawn, model))
        assert not saved and not errors.requires_grad and errors.shape == (6, 1)
        of._errors(drawn, built["dit"])
    assert len(saved) > 20


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_log_two_and_the_gradient_is_not_zero(kind: str) -> None:
    """Policy and reference are one model: m is 0 for each of three pairs (F-C 1), whatever the reference is."""
    of, batch = objective(kind), pairs()
    built = policy_models(of)
    ready(of, built, batch)
    loss = of.loss(built, batch, rng_of(batch), "train")
    tolerance = 1e-6 if kind == "cached" else 0.0
    assert loss.total.item() == pytest.approx(3 * math.log(2), rel=1e-7, abs=tolerance)
    loss.total.backward()
    assert max(gradient.abs().max() for gradient in gradients(built["dit"]).values()) > 1e-4


def test_a_refreshed_reference_resets_the_loss_to_log_two() -> None:
    """At steps 4, 8, ... of `refresh_every: 4` the reference becomes the learner, at no others; 0 never does."""
    of = objective("second_adapter", reference={"kind": "second_adapter", "refresh_every": 4})
    never = objective("second_adapter")
    batch, at_rest = pairs(), pytest.approx(3 * math.log(2), rel=1e-7)
    built = policy_models(of)
    with torch.no_grad():
        for step in range(10):
            move(built["dit"])
            now = replace(batch, step=step)
            assert (never.loss(built, now, rng_of(now), "train").total.item() == at_rest) is False
            first, second = (of.loss(built, now, rng_of(now), "train").total.item() for _ in range(2))
            assert first == second, "a second micro-batch of the step is compared with the same"
            assert (first == at_rest) == (step in (4, 8))


def test_cached_draws_are_those_of_the_pair_alone() -> None:
    """Neither the epoch, nor what a pair stands in for, nor the step but for its remainder changes them; seeds and pairs do."""
    of, batch = objective("cached"), pairs()
    built = policy_models(of)
    ready(of, built, batch)
    move(built["dit"])
    names = [[f"pair{index}{end}" for index in range(3)] * 2 for end in ("", "@0", "@17", "@2~pair9@2")]
    with torch.no_grad():

        def total(ids: list[str], step: int, seed: int = 3) -> float:
            return of.loss(built, replace(batch, sample_ids=ids, step=step), KeyedRng(seed, step, ids), "train").total.item()

        wanted = [total(names[0], step) for step in range(3)]
        assert len(set(wanted)) == 3, "each draw is another one"
        for ids in names:
            assert [total(ids, step) for step in (6, 1, 11)] == wanted
        assert total(names[0], 0, seed=4) != wanted[0]
        changed = ["pair1@0", *names[1][1:3]]
        assert total(changed * 2, 0) != wanted[0]


def test_the_policy_and_a_frozen_reference_are_in_the_same_mode() -> None:
    of, batch = objective("frozen"), pairs()
    built = policy_models(of)
    for training in (True, False):
        built["dit"].train(training)
        of.loss(built, batch, rng_of(batch), "train")
        assert built["reference"].training is training


def test_an_offloaded_reference_keeps_its_weights() -> None:
    """Bit for bit, after a use that fails too; `tests/gpu` sees where they are."""
    of, batch = objective("offloaded"), pairs()
    built = policy_models(of)
    before = {name: tensor.clone() for name, tensor in built["reference"].state_dict().items()}

    def fail(model: nn.Module) -> Tensor:
        raise RuntimeError("out of memory")

    of.loss(built, batch, rng_of(batch), "train")
    with pytest.raises(RuntimeError, match="out of memory"):
        of.reference.errors(built, batch, fail)
    after = built["reference"].state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_models_that_do_not_fit_are_refused() -> None:
    for kind in ("adapters_off", "second_adapter"):
        of = objective(kind)
        with pytest.raises(
            ConfigError, match=rf"objective\.reference\.kind {kind}: the policy has no adapters\. Give models\.dit\.lora"
        ):
            of.check(policy_models(of, lora=False))
    of = objective("second_adapter")
    with pytest.raises(ConfigError, match="the policy has no second adapter: call `extend`"):
        of.check(policy_models(objective("adapters_off")))
    of = objective("frozen")
    built = policy_models(of)
    with pytest.raises(
        ConfigError, match=r"models\.reference \(dit/ltx, .*num_layers=3.*is not of the architecture of models\.dit"
    ):
        of.check(built | {"reference": dit(num_layers=3)})
    of.check(built)


def test_a_pair_that_was_not_measured_is_refused() -> None:
    of, batch = objective("cached"), pairs()
    built = policy_models(of)
    ready(of, built, batch)
    other = replace(batch, sample_ids=["pair0@1", "pair7@1", "pair2@1"] * 2)
    with pytest.raises(DataError, match=r"1 pairs of step 5 have no measured errors, the first pair7; 3 pairs were measured"):
        of.loss(built, other, rng_of(other), "train")
