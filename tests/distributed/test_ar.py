"""One optimizer step of the next-token objective is the one-rank step, under every layout that fits on four ranks.

The clips have 3 token frames of 5 x 3, 45 tokens: no degree divides them. Updates are compared as in `test_layouts`: Adam's
epsilon is 1e-2, so that an update follows its gradient and not the rounding of its sign.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import run_distributed
from videofm.config.train import TrainConfig
from videofm.types import Batch

SAMPLES, SHAPE, VOCAB = 4, (4, 5, 3), 256
TOLERANCE = 1e-6
TEXT = {"name": "text/t5", "size": "tiny"}
OPTIONS: dict[str, dict[str, Any]] = {
    "attended": {},
    "prefix": {"text": "prefix"},
    "tied": {"tied_head": True},
}
"""Name -> overrides of the model."""

Key = tuple[str, tuple[int, int, int], int, str]
"""Model, degrees (data, context, tensor), ZeRO stage, strategy of context ranks."""

KEYS: dict[int, list[Key]] = {
    1: [(name, (1, 1, 1), 0, "auto") for name in OPTIONS],
    2: [
        *[("attended", degrees, stage, "auto") for degrees in ((2, 1, 1), (1, 2, 1), (1, 1, 2)) for stage in (0, 2)],
        ("attended", (1, 2, 1), 0, "ring"),
        ("attended", (1, 2, 1), 2, "allgather_kv"),
        ("prefix", (1, 1, 2), 2, "auto"),
        ("tied", (1, 2, 1), 3, "auto"),
    ],
    4: [
        *[("attended", (1, 2, 2), stage, "auto") for stage in (0, 2)],
        ("attended", (2, 2, 1), 2, "auto"),
        ("attended", (1, 4, 1), 0, "unified"),
    ],
}
"""Ranks -> what they do."""


STARTED = {"kind": "vq_ema", "codebook_size": 256, "dim": 8, "start_vectors": 0}
"""Codes of a tokenizer that nothing has trained: a random book that has started, or it would be refused."""


def config_of(key: Key) -> TrainConfig:
    name, (data, context, tensor), stage, strategy = key
    sizes = {"num_layers": 2, **OPTIONS[name]}
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "models": {
                "ar": {"name": "ar/transformer", "overrides": sizes},
                "text_encoder": TEXT,
                "tokenizer": {"name": "arlon/tokenizer", "overrides": {"quantizer": STARTED}},
            },
            "objective": {
                "kind": "next_token", "caption_dropout": 0.3, "label_smoothing": 0.1, "z_loss": 1e-2, "window": 3,
                "first_window_share": 0.5, "train_text_encoder": True,
            },
            "data": {
                "manifest": "none", "num_frames": 9, "height": 32, "width": 32, "micro_batch_size": SAMPLES // 2,
                "num_micro_batches": 2, "start": "first", "cache": {"path": "none", "mode": "tokens"},
            },
            "optimizer": {"lr": 1e-2, "eps": 1e-2, "grad_clip": 0.05, "schedule": "constant", "ema_decay": 0.0},
            "trainer": {"max_steps": 1, "precision": "fp32"},
            "parallel": {
                "data_degree": data, "context_degree": context, "tensor_degree": tensor, "zero_stage": stage,
                "context_strategy": strategy, "ulysses_degree": 2 if strategy == "unified" else None,
            },
        }
    )  # fmt: skip


def batches(data_rank: int, data_degree: int) -> list[Batch]:
    """The micro-batches of one data rank; two of two samples in all."""
    half, generator = SAMPLES // 2, torch.Generator().manual_seed(1)
    indices = torch.randint(0, VOCAB, (SAMPLES, *SHAPE), generator=generator)
    captions = [["a red circle", "moving"], ["a cyan square moving up", "a red circle"]]
    return [
        Batch(
            torch.zeros(half, 3, 0, 0, 0), captions[i], torch.full((half,), 8.0), [f"{i}-0", f"{i}-1"], 0, SAMPLES,
            indices=indices[i * half :][:half],
        )
        for i in range(data_rank, 2, data_degree)
    ]  # fmt: skip


def steps(keys: list[Key]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Each key with its step; those on one mesh come together."""
    from megatron.core import parallel_state

    from videofm.parallel.mesh import split_mesh

    def layout(key: Key) -> tuple[Any, ...]:
        return key[1], key[3]

    for _, group in groupby(sorted(keys, key=layout), key=layout):
        same = list(group)
        mesh = split_mesh(config_of(same[0]).parallel, torch.device("cpu"), [4])
        try:
            for key in same:
                yield key, one_step(key, mesh)
        finally:
            parallel_state.destroy_model_parallel()


def one_step(key: Key, mesh: Any) -> dict[str, Any]:
    """Metrics, and the update of each trained tensor, whole."""
    from videofm.data.loader import Step
    from videofm.data.plan import PlanState
    from videofm.train.build import build_job, build_models
    from videofm.train.state import whole_weights
    from videofm.train.trainer import train_step

    config = config_of(key)
    built = build_models(config)
    before = {(role, name): value.clone() for role, model in built.items() for name, value in model.named_parameters()}
    job = build_job(config, None, mesh, None, built)  # type: ignore[arg-type]
    metrics = train_step(job, Step(batches(mesh.data_rank, mesh.data_degree), SAMPLES, PlanState(step=1)))
    updates: dict[str, Tensor] = {
        f"{role}.{name}": value.float() - before[role, name]
        for role in job.trained_roles
        for name, value in whole_weights(job, role).items()
    }
    return {"metrics": metrics, "updates": updates}


def compare(rank: int, world_size: int, references: dict[str, Any]) -> list[str]:
    """What differs from the one-rank step, in words."""
    wrong = []
    for key, found in steps(KEYS[world_size]):
        wanted = references[key[0]]
        label = "{} data x context x tensor {} ZeRO {} {}".format(*key)
        for metric, value in wanted["metrics"].items():
            if not math.isclose(found["metrics"][metric], value, rel_tol=2e-5, abs_tol=1e-7):
                wrong.append(f"{label}: {metric} {found['metrics'][metric]} is not {value}")
        assert set(found["updates"]) == set(wanted["updates"])
        errors = {name: (found["updates"][name] - value).abs().max().item() for name, value in wanted["updates"].items()}
        worst = max(errors, key=lambda name: errors[name])
        if errors[worst] > TOLERANCE:
            wrong.append(f"{label}: update of {worst} differs by {errors[worst]:.2g}")
    return wrong


def reference(rank: int, world_size: int) -> dict[str, Any]:
    return {key[0]: found for key, found in steps(KEYS[1])}


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return run_distributed(reference, 1)[0]


def test_the_reference_moves(references: dict[str, Any]) -> None:
    """Some tensor of each role moves by much more than the tolerance, and every tensor of the transformer moves by more."""
    for name, found in references.items():
        moved = {key: update.abs().max().item() for key, update in found["updates"].items()}
        for role in ("ar.", "text_encoder."):
            assert max(value for key, value in moved.items() if key.startswith(role)) > 1e-4, (name, moved)
        still = [key for key, value in moved.items() if key.startswith("ar.") and value <= TOLERANCE]
        assert not still, (name, still)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_layout_takes_the_step_of_one_rank(world_size: int, references: dict[str, Any]) -> None:
    wrong = {line for lines in run_distributed(compare, world_size, references) for line in lines}
    assert not wrong, "\n".join(sorted(wrong))
