"""One optimizer step of a reward model, text encoder and all, is the one-rank step under data and context ranks.

The losses of pairs are not linear in scores, so that a pair whose clips were apart would show; and context ranks, each of which
computes whole scores, would count the gradient of the text encoder twice. Updates are compared as in `test_layouts`: Adam's
epsilon is 1e-2, so that an update follows its gradient and not the rounding of its sign.
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import run_distributed
from videofm.config.train import TrainConfig
from videofm.types import Batch

PAIRS, TOLERANCE = 4, 1e-6
Key = tuple[tuple[int, int], int]
"""Degrees (data, context), ZeRO stage."""
ALONE: Key = ((1, 1), 0)
LAYOUTS: list[Key] = [((2, 1), 0), ((2, 1), 2), ((2, 1), 3), ((1, 2), 0), ((1, 2), 2)]


def config_of(key: Key) -> TrainConfig:
    (data, context), stage = key
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "models": {
                "reward": {"name": "reward/video", "overrides": {"axes": ["overall", "motion"]}},
                "vae": {"name": "vae/ltx"},
                "text_encoder": {"name": "text/t5"},
            },
            "objective": {"kind": "reward", "theta": 3.0, "centre_weight": 0.1, "train_text_encoder": True},
            "data": {
                "manifest": "none", "num_frames": 9, "height": 32, "width": 32, "start": "first",
                "micro_batch_size": PAIRS // 2, "num_micro_batches": 2, "pairs": {"path": "none", "ties": True},
            },
            "optimizer": {"lr": 1e-2, "eps": 1e-2, "grad_clip": 0.0, "schedule": "constant", "ema_decay": 0.0},
            "trainer": {"max_steps": 1, "precision": "fp32"},
            "parallel": {"data_degree": data, "context_degree": context, "zero_stage": stage},
        }
    )  # fmt: skip


def batches(data_rank: int, data_degree: int) -> list[Batch]:
    """The micro-batches of one data rank, of two pairs each: winners first, losers behind them."""
    half = PAIRS // 2
    video = torch.rand(2, PAIRS, 3, 9, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    weights, ties = torch.tensor([[1.0, 0.5], [0.0, 2.0]]), torch.tensor([[False, False], [True, False]])
    votes = [[{"motion": "loser"}, {}], [{"motion": "winner"}, {"motion": "tie"}]]
    return [
        Batch(
            video[i], ["a red circle", "moving"] * 2, torch.ones(PAIRS), [f"{i}-{j}" for j in range(half)] * 2, 0, PAIRS,
            pair_weights=weights[i], pair_ties=ties[i], pair_axes=votes[i],
        )
        for i in range(data_rank, 2, data_degree)
    ]  # fmt: skip


def steps(keys: list[Key]) -> dict[Key, dict[str, Any]]:
    """The step of each key; those on one mesh come together."""
    from megatron.core import parallel_state

    from videofm.parallel.mesh import split_mesh

    found = {}
    for _, group in groupby(sorted(keys), key=lambda key: key[0]):
        same = list(group)
        mesh = split_mesh(config_of(same[0]).parallel, torch.device("cpu"), [4])
        try:
            found |= {key: one_step(key, mesh) for key in same}
        finally:
            parallel_state.destroy_model_parallel()
    return found


def one_step(key: Key, mesh: Any) -> dict[str, Any]:
    """Metrics, and the update of each trained tensor, whole."""
    from videofm.data.loader import Step
    from videofm.data.plan import PlanState
    from videofm.train.build import build_job, build_models
    from videofm.train.state import whole_weights
    from videofm.train.trainer import train_step

    config = config_of(key)
    built = build_models(config)
    built["vae"].set_latent_statistics(torch.zeros(16), torch.ones(16))  # type: ignore[operator]
    before = {(role, name): value.clone() for role, model in built.items() for name, value in model.named_parameters()}
    job = build_job(config, None, mesh, None, built)  # type: ignore[arg-type]
    metrics = train_step(job, Step(batches(mesh.data_rank, mesh.data_degree), PAIRS, PlanState(step=1)))
    updates: dict[str, Tensor] = {
        f"{role}.{name}": value.float() - before[role, name]
        for role in job.trained_roles
        for name, value in whole_weights(job, role).items()
    }
    return {"metrics": metrics, "updates": updates}


def compare(rank: int, world_size: int, wanted: dict[str, Any]) -> list[str]:
    """What differs from the one-rank step, in words."""
    wrong = []
    for key, found in steps(LAYOUTS).items():
        for metric, value in wanted["metrics"].items():
            if not math.isclose(found["metrics"][metric], value, rel_tol=2e-5, abs_tol=1e-6):
                wrong.append(f"{key}: {metric} {found['metrics'][metric]} is not {value}")
        assert set(found["updates"]) == set(wanted["updates"])
        errors = {name: (found["updates"][name] - value).abs().max().item() for name, value in wanted["updates"].items()}
        worst = max(errors, key=lambda name: errors[name])
        if errors[worst] > TOLERANCE:
            wrong.append(f"{key}: update of {worst} differs by {errors[worst]:.2g}")
    return wrong


def alone(rank: int, world_size: int) -> dict[str, Any]:
    return steps([ALONE])[ALONE]


@pytest.fixture(scope="module")
def wanted() -> dict[str, Any]:
    found: dict[str, Any] = run_distributed(alone, 1)[0]
    return found


def test_the_reference_moves(wanted: dict[str, Any]) -> None:
    """Every matrix of the reward model moves by much more than the tolerance, and some of the text encoder."""
    moved = {name: update.abs().max().item() for name, update in wanted["updates"].items()}
    assert not [name for name, size in moved.items() if name.startswith("reward.blocks") and size <= 10 * TOLERANCE]
    assert max(size for name, size in moved.items() if name.startswith("text_encoder.")) > 100 * TOLERANCE
    assert {"grad_norm", "accuracy", "tied", "score_gap", "nll/motion", "voted/motion"} <= set(wanted["metrics"])
    assert wanted["metrics"]["tied"] == 0.25 and wanted["metrics"]["voted/motion"] == 0.75


def test_every_layout_takes_the_step_of_one_rank(wanted: dict[str, Any]) -> None:
    wrong = {line for lines in run_distributed(compare, 2, wanted) for line in lines}
    assert not wrong, "\n".join(sorted(wrong))
