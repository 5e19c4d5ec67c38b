"""The engine over DeepSpeed: every ZeRO stage and data degree takes the same step, and resumes exactly.

The toy model is linear regression with an MLP; its loss on one rank is the reference for all others.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from videofm.config.train import TrainConfig
from videofm.types import Batch, Loss

STEPS, SAMPLES = 6, 8


class ToyObjective:
    """Regress the mean pixel of a clip: a loss with one term a sample."""

    roles = ("model",)
    phases = {"generator": ("model",)}

    def loss(self, models, batch, rng, phase):
        noise = rng.normal("noise", (batch.video.shape[1],))
        inputs = batch.video.flatten(1) + 0.1 * noise.repeat_interleave(batch.video[0, 0].numel(), dim=1)
        error = (models["model"](inputs)[:, 0] - batch.video.flatten(1).mean(1)).square()
        return Loss(error.sum(), {"squared": error.detach().sum()})


def toy_config(zero_stage: int, data_degree: int) -> TrainConfig:
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
            "optimizer": {"lr": 0.01, "grad_clip": 0.05},
            "trainer": {"max_steps": STEPS, "precision": "fp32"},
            "parallel": {"zero_stage": zero_stage, "data_degree": data_degree},
        }
    )  # fmt: skip


def toy_batches(step: int, rank: int, degree: int) -> list[Batch]:
    video = torch.randn(SAMPLES, 3, 1, 8, 8, generator=torch.Generator().manual_seed(step))
    size = SAMPLES // 4
    return [
        Batch(video[i * size : (i + 1) * size], [""] * size, torch.ones(size), [f"{i}-{j}" for j in range(size)], step, SAMPLES)
        for i in range(rank, 4, degree)
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
    for stage in (0, 1, 2, 3):
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
        engine.load_optimizer_state(state, 3)
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
    if rank == 0:
        torch.save(results, folder / "results.pt")
    destroy_mesh()


def launch(folder: Path, degree: int) -> dict:
    folder.mkdir()
    shared = {"WORLD_SIZE": str(degree), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(degree)
    ]
    try:
        assert [process.wait(timeout=150) for process in ranks] == [0] * degree
    finally:
        for process in ranks:
            process.kill()
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    return {degree: launch(folder / str(degree), degree) for degree in (1, 2)}


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bitwise(results, stage, degree):
    """Weights, moving average and losses after 3 + 3 steps equal those after 6, to the last bit, on the same layout."""
    result = results[degree][stage]
    assert result["resumed_losses"] == result["losses"]
    assert result["resumed_weights"] == result["weights"]
    assert result["resumed_average"] == result["average"]


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_layouts_take_the_same_steps(results, stage, degree):
    """Losses, gradient norms (with clipping active) and weights do not depend on the ZeRO stage or the data degree."""
    reference, result = results[1][0], results[degree][stage]
    assert result["losses"] == pytest.approx(reference["losses"], abs=1e-6)
    assert result["norms"] == pytest.approx(reference["norms"], rel=1e-5)
    assert max(reference["norms"]) > 0.05, "clipping must be active"
    # Adam divides by small second moments, which enlarges the rounding of another order of summation.
    assert result["weights"] == pytest.approx(reference["weights"], abs=1e-5)


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
