"""Training a latent tokenizer on two ranks through the engine: weights and codebook are those of a plain loop on one process.

The reference has no engine and no DeepSpeed: torch's AdamW, one backward pass over all samples of the step, and the update of
the codebook. In the steps are the start of the codebook by k-means, a revival of unused codes and a step that is skipped.

What is drawn from the vectors of a step (the start, the revival, the probe) is a function of their values rounded to bfloat16,
so weights that differ in the last bit can draw others. Hence the rate is 0 until these draws are done, and what follows them is
trained.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import launch_ranks
from videofm import models
from videofm.config.latent_tokens import LatentTokensConfig
from videofm.config.train import TrainConfig
from videofm.objectives.latent_tokens import LatentTokensObjective
from videofm.parallel.rng import KeyedRng
from videofm.types import ALONE, Batch

HALF, SAMPLES, GROUPS, SEED = 3, 8, 4, 3
RATES = (0.0, 0.0, 0.0, 2e-3, 2e-3, 2e-3, 2e-3, 2e-3)
"""The start is over after two steps, the revival is in the fourth."""
STEPS = len(RATES)
SKIPPED = 4
"""The step whose loss gives no finite gradient."""
STAGES = (0, 2)
QUANTIZER = {
    "kind": "vq_ema", "codebook_size": 12, "dim": 4, "start_vectors": 8, "start_updates": 2, "revive_every": 4,
    "decay": 0.8, "dead_share": 0.5, "usage_tokens": 4, "probe_size": 32,
}  # fmt: skip


class AsTheyAre(nn.Module):
    """A VAE whose latents come with the batch, normalised already."""

    def normalize(self, latents: Tensor) -> Tensor:
        return latents


class WithABadStep(LatentTokensObjective):
    """Adds 0 with a slope of 0 times infinity to the loss of one sample of `SKIPPED`."""

    def loss(self, models: Any, batch: Batch, rng: Any, phase: str) -> Any:
        found = super().loss(models, batch, rng, phase)
        if batch.step != SKIPPED or "0-0" not in batch.sample_ids:
            return found
        bias = models["tokenizer"].decoder.conv_out.bias
        return replace(found, total=found.total + (bias - bias.detach()).abs().sqrt().sum())


def tokenizer() -> nn.Module:
    torch.manual_seed(0)
    fields = {"latent_channels": 3, "widths": [8, 8], "num_groups": 4, "quantizer": QUANTIZER}
    return models.build("arlon/tokenizer", "tiny", **fields).train()


def objective() -> WithABadStep:
    return WithABadStep(LatentTokensConfig(kind="latent_tokens"))


def batches(step: int, rank: int = 0, degree: int = 1) -> list[Batch]:
    """Posteriors of eight clips in four micro-batches; every rank has each `degree`-th."""
    generator = torch.Generator().manual_seed(step)
    mean = torch.randn(SAMPLES, 3, 2, 4, 4, generator=generator)
    size = SAMPLES // GROUPS
    return [
        Batch(
            torch.zeros(size, 3, 0, 0, 0), [""] * size, torch.ones(size), [f"{group}-{j}" for j in range(size)], step, SAMPLES,
            latents=mean[group * size : (group + 1) * size], logvar=torch.full((size, 3, 2, 4, 4), -4.0),
        )
        for group in range(rank, GROUPS, degree)
    ]  # fmt: skip


def config(stage: int, degree: int) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "seed": SEED,
            "models": {"tokenizer": {"name": "arlon/tokenizer"}, "vae": {"name": "vae/ltx"}},
            "objective": {"kind": "latent_tokens"},
            "data": {
                "manifest": "none", "num_frames": 5, "height": 32, "width": 32,
                "micro_batch_size": SAMPLES // GROUPS, "num_micro_batches": GROUPS,
            },
            "optimizer": {"lr": max(RATES), "grad_clip": 0.0, "weight_decay": 0.0, "ema_decay": 0.0},
            "trainer": {"max_steps": STEPS, "precision": "fp32"},
            "parallel": {"zero_stage": stage, "data_degree": degree},
        }
    )  # fmt: skip


def kept(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def run_rank(folder: Path) -> None:
    """All steps; then three, a checkpoint's content out and into new objects, and the rest. Each rank writes what it has."""
    from videofm.parallel.mesh import create_mesh, destroy_mesh
    from videofm.train.engine import PhaseEngine

    torch.set_num_threads(1)
    degree, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    mesh = create_mesh(config(0, degree).parallel, torch.device("cpu"), folder / "rendezvous")

    def new(stage: int, weights: dict[str, Tensor] | None = None) -> tuple[nn.Module, PhaseEngine]:
        model = tokenizer()
        if weights is not None:
            models.load_weights(model, {key: value.clone() for key, value in weights.items()}, "a checkpoint")
        roles = {"tokenizer": model, "vae": AsTheyAre()}
        return model, PhaseEngine(roles, objective(), "train", config(stage, degree), mesh)

    results: dict[int, Any] = {}
    for stage in STAGES:
        model, engine = new(stage)
        states, rows = [], []
        for step in range(STEPS):
            rows.append(engine.step(batches(step, rank, degree), RATES[step]))
            states.append(kept(model))
        half, engine = new(stage)
        again = [engine.step(batches(step, rank, degree), RATES[step]) for step in range(HALF)]
        state, weights = engine.optimizer_state(), kept(half)
        resumed, engine = new(stage, weights)
        engine.load_optimizer_state(state)
        again += [engine.step(batches(step, rank, degree), RATES[step]) for step in range(HALF, STEPS)]
        results[stage] = {"rows": rows, "states": states, "resumed_rows": again, "resumed": kept(resumed)}
    gathered = mesh.gather(torch.arange(2 + 3 * rank).view(-1, 1) + 10 * rank)
    nothing = mesh.gather(torch.zeros(rank, 2))
    torch.save({"stages": results, "gathered": gathered, "nothing": nothing}, folder / f"results_{rank}.pt")
    destroy_mesh()


def reference() -> tuple[list[dict[str, Tensor]], list[dict[str, float]]]:
    """State after each step, and losses with the codebook's measures, of a plain loop."""
    model = tokenizer()
    roles: dict[str, nn.Module] = {"tokenizer": model, "vae": AsTheyAre()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    states, rows = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros(())
        for batch in batches(step):
            rng = KeyedRng(SEED, step, batch.sample_ids)
            total = total + LatentTokensObjective.loss(objective(), roles, batch, rng, "train").total
        if step != SKIPPED:
            (total / SAMPLES).backward()
            optimizer.param_groups[0]["lr"] = RATES[step]
            optimizer.step()
        measures = objective().after_step(roles, "train", step == SKIPPED, ALONE)
        states.append(kept(model))
        rows.append({"loss": float(total.detach()) / SAMPLES, **measures})
    return states, rows


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("latent_tokens")
    launch_ranks(__file__, 2, folder)
    return [torch.load(folder / f"results_{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_are_one_process(ranks: list[dict[str, Any]], stage: int) -> None:
    """Weights to 1e-5 (Adam divides by small second moments), the codebook and its sums to 1e-6 of their size, and all whole
    numbers (use, counters, probe) exactly, after every step; losses and what is logged of the codebook too."""
    states, rows = reference()
    for found in (rank["stages"][stage] for rank in ranks):
        for step, (mine, wanted) in enumerate(zip(found["states"], states, strict=True)):
            for key, value in wanted.items():
                tolerance = 1e-5 if not key.startswith("quantizer.") else 1e-6 * max(1.0, float(value.abs().max()))
                exact = not value.is_floating_point()
                torch.testing.assert_close(
                    mine[key], value, atol=0 if exact else tolerance, rtol=0, msg=lambda text, at=(step, key): f"{at}: {text}"
                )
        for mine, wanted in zip(found["rows"], rows, strict=True):
            assert {key: mine[key] for key in wanted} == pytest.approx(wanted, abs=1e-5)


def test_the_steps_hold_what_they_are_for(ranks: list[dict[str, Any]]) -> None:
    """The codebook starts within the steps, codes are revived, one step is skipped and changes nothing, weights are trained."""
    found = ranks[0]["stages"][0]
    assert "codebook/usage" not in found["rows"][1] and "codebook/usage" in found["rows"][3]
    assert found["rows"][-1]["codebook/revived"] > 0
    assert [row["skipped"] for row in found["rows"]] == [float(step == SKIPPED) for step in range(STEPS)]
    before, after = found["states"][SKIPPED - 1], found["states"][SKIPPED]
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed <= {"quantizer.probe_indices"}, changed
    weight = "encoder.conv_in.weight"
    assert (found["states"][-1][weight] - found["states"][0][weight]).abs().max() > 1e-3
    assert not torch.equal(found["states"][-1]["quantizer.books"], after["quantizer.books"])


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_hold_the_same_codebook(ranks: list[dict[str, Any]], stage: int) -> None:
    """Bit for bit after each step: DeepSpeed broadcasts no buffers."""
    first, second = (rank["stages"][stage]["states"] for rank in ranks)
    for mine, other in zip(first, second, strict=True):
        for key, value in mine.items():
            assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bitwise(ranks: list[dict[str, Any]], stage: int) -> None:
    """A run that is stopped after three steps, before its codebook's revival, and goes on from what a checkpoint holds."""
    for found in (rank["stages"][stage] for rank in ranks):
        assert found["resumed_rows"] == found["rows"]
        assert all(torch.equal(found["resumed"][key], value) for key, value in found["states"][-1].items())


def test_gather_joins_ranks_in_order(ranks: list[dict[str, Any]]) -> None:
    """Of two rows of rank 0 and five of rank 1, and of none and one."""
    wanted = torch.tensor([0, 1, 10, 11, 12, 13, 14]).view(-1, 1)
    for rank in ranks:
        assert torch.equal(rank["gathered"], wanted) and rank["nothing"].shape == (1, 2)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
