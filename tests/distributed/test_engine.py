"""The engine over DeepSpeed: every ZeRO stage and data degree takes the same step, and resumes exactly.

The toy model is linear regression with an MLP; its loss on one rank is the reference for all others.
"""

import logging
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import launch_ranks
from videofm.config.train import TrainConfig
from videofm.types import Batch, Loss

STEPS, SAMPLES = 6, 8
NOT_FINITE, LOST = "not finite", "lost"
OFFLOADED = " offloaded"
STAGES = [0, 1, 2, 3, *(f"{stage}{OFFLOADED}" for stage in (1, 2, 3))]
"""ZeRO stages; those of which the optimizer's state is kept on the CPU."""


class ToyObjective:
    """Regress the mean pixel of a clip: a loss with one term a sample."""

    roles = ("model",)
    phases = {"generator": ("model",)}

    def loss(self, models, batch, rng, phase):
        noise = rng.normal("noise", (batch.video.shape[1],))
        inputs = batch.video.flatten(1) + 0.1 * noise.repeat_interleave(batch.video[0, 0].numel(), dim=1)
        predicted = models["model"](inputs)[:, 0]
        error = (predicted - batch.video.flatten(1).mean(1)).square()
        total = error.sum()
        if batch.captions[0] == NOT_FINITE:  # adds 0, whose slope is 0 times infinity
            total = total + (predicted - predicted.detach()).abs().sqrt().sum()
        if batch.captions[0] == LOST:  # and its gradient is as ever
            total = total + math.inf
        return Loss(total, {"squared": error.detach().sum()})


def toy_config(zero_stage: int | str, data_degree: int, **optimizer: float) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "seed": 3,
            "models": {"model": {"name": "vae/ltx"}},  # stands for any: the toy is given to the engine directly
            "objective": {"kind": "autoencoder"},
            "data": {
                "manifest": "none", "num_frames": 1, "height": 8, "width": 8,
                "micro_batch_size": SAMPLES // 4, "num_micro_batches": 4,
            },
            "optimizer": {"lr": 0.01, "grad_clip": 0.05, **optimizer},
            "trainer": {"max_steps": STEPS, "precision": "fp32"},
            "parallel": {
                "zero_stage": int(str(zero_stage)[0]), "data_degree": data_degree,
                "offload_optimizer": str(zero_stage).endswith(OFFLOADED),
            },
        }
    )  # fmt: skip


def toy_batches(step: int, rank: int, degree: int) -> list[Batch]:
    video = torch.randn(SAMPLES, 3, 1, 8, 8, generator=torch.Generator().manual_seed(step))
    size = SAMPLES // 4
    return [
        Batch(video[i * size : (i + 1) * size], [""] * size, torch.ones(size), [f"{i}-{j}" for j in range(size)], step, SAMPLES)
        for i in range(rank, 4, degree)
    ]


def spiked(step: int, rank: int, degree: int) -> list[Batch]:
    """The clips of `step` thirty times as bright: finite, but far off."""
    return [replace(batch, video=30 * batch.video) for batch in toy_batches(step, rank, degree)]


def not_finite(step: int, rank: int, degree: int) -> list[Batch]:
    """The clips of `step`, of which those of the last micro-batch, which one rank has, give no finite gradient."""
    return poisoned(step, rank, degree, NOT_FINITE)


def lost(step: int, rank: int, degree: int) -> list[Batch]:
    """The same, with no finite loss in place of no finite gradient."""
    return poisoned(step, rank, degree, LOST)


def poisoned(step: int, rank: int, degree: int, how: str) -> list[Batch]:
    last = [f"3-{j}" for j in range(SAMPLES // 4)]
    return [
        replace(batch, captions=[how] * 2) if batch.sample_ids == last else batch for batch in toy_batches(step, rank, degree)
    ]


def toy_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(192, 33), nn.GELU(), nn.Linear(33, 1))


def run_rank(folder: Path) -> None:
    """Six steps; then three steps, state out, a new engine with that state, three steps. Rank 0 writes losses and weights."""
    from videofm.parallel.mesh import create_mesh, destroy_mesh
    from videofm.train.engine import PhaseEngine
    from videofm.train.optim import MovingAverage, gather_shard, local_shard, take_shard

    torch.set_num_threads(1)
    degree, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    results = {}
    mesh = create_mesh(toy_config(0, degree).parallel, torch.device("cpu"), folder / "rendezvous")
    for stage in STAGES:
        config = toy_config(stage, degree)

        def steps(engine, model, average, first, last):
            rows = []
            for step in range(first, last):
                rows.append(engine.step(toy_batches(step, rank, degree), lr=0.01))
                average.update(step)
            whole = {n: gather_shard(p, local_shard(p), mesh.gradient_group).clone() for n, p in model.named_parameters()}
            return rows, whole

        model = toy_model()
        engine = PhaseEngine({"model": model}, ToyObjective(), "generator", config, mesh)
        straight, straight_weights = steps(engine, model, average := MovingAverage(model.named_parameters(), 0.9), 0, STEPS)
        straight_average = average.whole(mesh.gradient_group)

        model = toy_model()
        engine = PhaseEngine({"model": model}, ToyObjective(), "generator", config, mesh)
        average = MovingAverage(model.named_parameters(), 0.9)
        half, weights = steps(engine, model, average, 0, 3)
        state, kept = engine.optimizer_state(), average.whole(mesh.gradient_group)
        resumed = toy_model()
        resumed.load_state_dict({name: value.cpu() for name, value in weights.items()})
        engine = PhaseEngine({"model": resumed}, ToyObjective(), "generator", config, mesh)
        engine.load_optimizer_state(state)
        average = MovingAverage(resumed.named_parameters(), 0.9)
        average.load(kept, mesh.gradient_group)
        for name, parameter in resumed.named_parameters():
            shard = take_shard(parameter, weights[name], mesh.gradient_group)
            assert torch.equal(gather_shard(parameter, shard, mesh.gradient_group), weights[name])
        rest, resumed_weights = steps(engine, resumed, average, 3, STEPS)
        results[stage] = {
            "losses": [row["loss"] for row in straight],
            "norms": [row["grad_norm"] for row in straight],
            "resumed_losses": [row["loss"] for row in half + rest],
            "weights": torch.cat([value.flatten() for value in straight_weights.values()]).tolist(),
            "resumed_weights": torch.cat([value.flatten() for value in resumed_weights.values()]).tolist(),
            "average": torch.cat([value.flatten() for value in straight_average.values()]).tolist(),
            "resumed_average": torch.cat([v.flatten() for v in average.whole(mesh.gradient_group).values()]).tolist(),
        }
        results[stage] |= skips(stage, degree, rank, mesh)
    torch.save(results, folder / f"results_{rank}.pt")
    destroy_mesh()


def skips(stage: int | str, degree: int, rank: int, mesh) -> dict:
    """Two runs of the same six steps: one meets bad clips in between and is resumed behind one, the other never sees them."""
    from videofm.progress import LOG
    from videofm.train.engine import PhaseEngine
    from videofm.train.optim import gather_shard, local_shard

    config = toy_config(stage, degree, spike_factor=8.0, spike_warmup=2)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    LOG.addHandler(handler)

    def new(weights=None, state=None):
        model = toy_model()
        if weights is not None:
            model.load_state_dict(weights)
        engine = PhaseEngine({"model": model}, ToyObjective(), "generator", config, mesh)
        if state is not None:
            engine.load_optimizer_state(state)
        return model, engine

    def whole(model):
        return {n: gather_shard(p, local_shard(p), mesh.gradient_group).clone() for n, p in model.named_parameters()}

    def run(engine, steps):
        return [engine.step(make(step, rank, degree), lr=0.01) for make, step in steps]

    good = [(toy_batches, step) for step in range(STEPS)]
    model, engine = new()
    clean_rows, clean, clean_state = run(engine, good), whole(model), engine.optimizer_state()

    model, engine = new()
    rows = run(engine, [(not_finite, 90), *good[:3], (spiked, 91)])
    kept = whole(model), engine.optimizer_state()
    model, engine = new(*kept)
    rows += run(engine, [good[3], (not_finite, 92), *good[4:]])
    state, weights = engine.optimizer_state(), whole(model)

    before = whole(model)
    (lost_row,) = run(engine, [(lost, 93)])
    LOG.removeHandler(handler)
    return {
        "clean_rows": clean_rows,
        "rows": rows,
        "moved_by_skips": [name for name in clean if not torch.equal(clean[name], weights[name])],
        "moments_off": [
            name for name in clean_state if "skipped" not in name and not torch.equal(clean_state[name], state[name])
        ],
        "num_skipped": int(state["num_skipped"]),
        "lost_row": lost_row,
        "moved_by_loss": [name for name in before if not torch.equal(before[name], whole(model)[name])],
        "told": told,
    }


def launch(folder: Path, degree: int) -> list[dict]:
    folder.mkdir()
    launch_ranks(__file__, degree, folder)
    return [torch.load(folder / f"results_{rank}.pt", weights_only=True) for rank in range(degree)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    return {degree: launch(folder / str(degree), degree) for degree in (1, 2)}


@pytest.fixture(scope="module")
def results(ranks):
    return {degree: found[0] for degree, found in ranks.items()}


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bitwise(results, stage, degree):
    """Weights, moving average and losses after 3 + 3 steps equal those after 6, to the last bit, on the same layout."""
    result = results[degree][stage]
    assert result["resumed_losses"] == result["losses"]
    assert result["resumed_weights"] == result["weights"]
    assert result["resumed_average"] == result["average"]


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_layouts_take_the_same_steps(results, stage, degree):
    """Losses, gradient norms (with clipping active) and weights do not depend on the ZeRO stage or the data degree."""
    reference, result = results[1][0], results[degree][stage]
    assert result["losses"] == pytest.approx(reference["losses"], abs=1e-6)
    assert result["norms"] == pytest.approx(reference["norms"], rel=1e-5)
    assert max(reference["norms"]) > 0.05, "clipping must be active"
    # Adam divides by small second moments, which enlarges the rounding of another order of summation.
    assert result["weights"] == pytest.approx(reference["weights"], abs=1e-5)


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_step_moves_nothing(ranks, stage, degree):
    """A run with two steps of no finite gradient (one of them the first of all) and one spike between its six steps, resumed
    behind the spike, has the weights and moments of the run without them, to the last bit, and takes the same six steps.

    The clips of the spike are 30 times as bright, its error and inputs with them: a norm some 900 times the others.
    """
    for result in (found[stage] for found in ranks[degree]):
        assert result["moved_by_skips"] == [] and result["moments_off"] == []
        assert [row["skipped"] for row in result["rows"]] == [1, 0, 0, 0, 1, 0, 1, 0, 0]
        assert [row["num_skipped"] for row in result["rows"]] == [1, 1, 1, 1, 2, 2, 3, 3, 3] and result["num_skipped"] == 3
        taken = [row for row in result["rows"] if not row["skipped"]]
        assert [row["grad_norm"] for row in taken] == [row["grad_norm"] for row in result["clean_rows"]]
        assert all(row["skipped"] == 0 for row in result["clean_rows"]) and len(result["clean_rows"]) == STEPS
        norms = [row["grad_norm"] for row in result["rows"] if row["skipped"]]
        assert norms[0] == norms[2] == float("inf") and 100 * taken[0]["grad_norm"] < norms[1] < float("inf")


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_ranks_skip_together_and_one_tells(ranks, stage, degree):
    first = ranks[degree][0][stage]
    for result in (found[stage] for found in ranks[degree]):
        assert result["rows"] == first["rows"] and result["lost_row"] == first["lost_row"]
    assert len(first["told"]) == 4, "three in the run, and one behind it"
    assert (
        first["told"][0] == "the gradient norm of step 90 in phase generator is not finite; step skipped, nothing moved "
        "(1 skipped so far)"
    )
    assert "spike_factor 8 times its average" in first["told"][1] and "step 91" in first["told"][1]
    assert [found[stage]["told"] for found in ranks[degree][1:]] == [[]] * (degree - 1)


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_moves_nothing_although_its_gradient_is(ranks, stage, degree):
    """On one rank only, and all of them skip."""
    for result in (found[stage] for found in ranks[degree]):
        assert result["moved_by_loss"] == []
        row = result["lost_row"]
        assert (row["loss"], row["grad_norm"], row["skipped"], row["num_skipped"]) == (math.inf, math.inf, 1, 4)
    assert "the loss of step 93 in phase generator is not finite; step skipped" in ranks[degree][0][stage]["told"][3]


def test_loss_is_the_mean_over_the_step(results):
    """The first loss, by hand: mean over the 8 samples of (model(x + noise) - mean(x))^2 with the keyed noise."""
    from videofm.parallel.rng import KeyedRng

    model, errors = toy_model(), []
    for batch in toy_batches(0, 0, 1):
        loss = ToyObjective().loss({"model": model}, batch, KeyedRng(3, 0, batch.sample_ids), "generator")
        errors.append(loss.total.item())
    assert results[1][0]["losses"][0] == pytest.approx(sum(errors) / SAMPLES, rel=1e-6)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
