"""One optimizer step with features and all tolerance of it is the one-rank step, on two data ranks and on two context ranks.

Spreads are those of micro-batches, which are the plan's: a run does not change with the number of ranks. Clips have 3 latent
frames of 6 x 2 cells, 36 tokens, in two micro-batches of two. Updates are compared as in test_layouts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.test_layouts import TEXT
from tests.helpers import run_distributed
from videofm.config.train import TrainConfig
from videofm.types import Batch

SAMPLES, FRAMES, HEIGHT, WIDTH = 4, 9, 48, 16
TOLERANCE = 1e-6
LAYOUTS = {1: [((1, 1, 1), 0)], 2: [((2, 1, 1), 0), ((2, 1, 1), 2), ((1, 2, 1), 0), ((1, 1, 2), 1)]}
"""World size -> degrees (data, context, tensor) and ZeRO stage."""


def config_of(degrees: tuple[int, int, int], stage: int) -> TrainConfig:
    data, context, tensor = degrees
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "models": {
                "dit": {"name": "dit/ltx", "overrides": {"num_layers": 2}, "injection": {"kind": "adaptive_norm"}},
                "vae": {"name": "vae/ltx"},
                "text_encoder": TEXT,
                "tokenizer": {
                    "name": "arlon/tokenizer", "size": "tiny",
                    "overrides": {"quantizer": {"kind": "vq", "codebook_size": 256, "dim": 8}},
                },
            },
            "objective": {
                "kind": "flow_matching",
                "noise_levels": {"kind": "logit_normal"},
                "features": {"dropout": 0.3, "uncertainty": 1.0, "corruption": {"probability": 0.5, "fraction": 0.5}},
            },
            "data": {
                "manifest": "none", "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH,
                "micro_batch_size": SAMPLES // 2, "num_micro_batches": 2,
            },
            "optimizer": {"lr": 1e-2, "eps": 1e-2, "schedule": "constant", "ema_decay": 0.0},
            "trainer": {"max_steps": 1, "precision": "fp32"},
            "parallel": {"data_degree": data, "context_degree": context, "tensor_degree": tensor, "zero_stage": stage},
        }
    )  # fmt: skip


def batches(data_rank: int, data_degree: int) -> list[Batch]:
    half = SAMPLES // 2
    video = torch.rand(SAMPLES, 3, FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return [
        Batch(video[i * half :][:half], ["a red circle", "moving"], torch.full((half,), 8.0), [f"{i}-0", f"{i}-1"], 0, SAMPLES)
        for i in range(data_rank, 2, data_degree)
    ]


def one_step(degrees: tuple[int, int, int], stage: int, mesh: Any) -> dict[str, Any]:
    """The metrics, and the update of each tensor of the dit, whole."""
    from videofm.data.loader import Step
    from videofm.data.plan import PlanState
    from videofm.train.build import build_job, build_models
    from videofm.train.state import whole_weights
    from videofm.train.trainer import train_step

    config = config_of(degrees, stage)
    models = build_models(config)
    with torch.no_grad():  # a fresh transformer predicts 0 whatever it sees, and its gradients say little
        for name, parameter in models["dit"].named_parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    before = {name: value.clone() for name, value in models["dit"].named_parameters()}
    job = build_job(config, None, mesh, None, models)  # type: ignore[arg-type]
    metrics = train_step(job, Step(batches(mesh.data_rank, mesh.data_degree), SAMPLES, PlanState(step=1)))
    updates: dict[str, Tensor] = {
        name: value.float() - before[name] for name, value in whole_weights(job, "dit").items() if name in before
    }
    return {"metrics": metrics, "updates": updates}


def every_step(rank: int, world_size: int) -> list[tuple[str, dict[str, Any]]]:
    from megatron.core import parallel_state

    from videofm.parallel.mesh import split_mesh

    found = []
    for degrees, stage in LAYOUTS[world_size]:
        mesh = split_mesh(config_of(degrees, stage).parallel, torch.device("cpu"), [4])
        try:
            found.append((f"data x context x tensor {degrees} ZeRO {stage}", one_step(degrees, stage, mesh)))
        finally:
            parallel_state.destroy_model_parallel()
    return found


def test_every_layout_takes_the_step_of_one_rank() -> None:
    (_, wanted), *_ = run_distributed(every_step, 1)[0]
    moved = {name: update.abs().max().item() for name, update in wanted["updates"].items()}
    assert max(value for name, value in moved.items() if name.startswith("injection")) > 1e-3
    assert wanted["metrics"]["features_spread"] > 0 and wanted["metrics"]["features_corrupted"] > 0
    names = ("loss", "grad_norm", "features_mse", "features_spread", "features_corrupted", "features_dropped")
    for steps in run_distributed(every_step, 2):
        for label, found in steps:
            assert {name: found["metrics"][name] for name in names} == pytest.approx(
                {name: wanted["metrics"][name] for name in names}, rel=2e-5
            ), label
            assert set(found["updates"]) == set(wanted["updates"])
            errors = {name: (found["updates"][name] - value).abs().max().item() for name, value in wanted["updates"].items()}
            worst = max(errors, key=lambda name: errors[name])
            assert errors[worst] < TOLERANCE, f"{label}: update of {worst} differs by {errors[worst]:.2g}"
