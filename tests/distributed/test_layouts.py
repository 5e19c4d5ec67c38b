"""One optimizer step of real objectives on tiny models is the one-rank step, under every layout that fits on four ranks.

The clips have 3 latent frames of 5 x 3 cells, 45 tokens: no degree divides them, and of four context ranks the first has tokens
of the given first frame only, which bear no loss. Updates are compared, not weights: Adam's epsilon is 1e-2, so that an update
follows its gradient (the rate times g / (|g| + eps)) and not the rounding of its sign.
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
from videofm.data.packing import pack
from videofm.types import Batch

LAYOUTS = {
    1: [(1, 1, 1)],
    2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)],
    4: [(1, 4, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)],
}
"""World size -> degrees (data, context, tensor)."""
STAGES = (0, 1, 2, 3)
SAMPLES, FRAMES, HEIGHT, WIDTH = 4, 9, 40, 24
TOLERANCE = 1e-6
TEXT = {"name": "text/t5", "size": "tiny"}
DIT = {
    "models": {"vae": {"name": "vae/ltx"}, "text_encoder": TEXT},
    "objective": {
        "kind": "flow_matching",
        "noise_levels": {"kind": "logit_normal", "mean": 1.0, "std": 1.2},
        "conditioning": {"first_frame": 0.75},
        "train_text_encoder": True,
    },
}
PACKED = {**DIT["objective"], "conditioning": {"first_frame": 1.0}}
LTX = {"name": "dit/ltx", "overrides": {"num_layers": 2}}
STEP_VIDEO = {"name": "dit/step_video", "overrides": {"num_layers": 2, "clip_channels": 0}}
CASES: dict[str, dict[str, Any]] = {
    "ltx": {**DIT, "models": {**DIT["models"], "dit": LTX}},
    "step_video": {**DIT, "models": {**DIT["models"], "dit": STEP_VIDEO}},
    "packed_ltx": {"objective": PACKED, "models": {**DIT["models"], "dit": LTX}},
    "packed_step_video": {"objective": PACKED, "models": {**DIT["models"], "dit": STEP_VIDEO}},
    "vae": {
        "models": {"vae": {"name": "vae/ltx"}, "discriminator": {"name": "discriminator/patchgan_3d", "size": "tiny"}},
        "objective": {"kind": "autoencoder", "gan": {"weight": 0.1, "adaptive": True}, "num_statistics_clips": 2},
    },
}
"""Name -> sections of a config: two transformers with a text encoder that is trained, each also with packs of clips of two
sizes in the place of micro-batches, and a VAE against a discriminator."""


def config_of(case: str, degrees: tuple[int, int, int], stage: int, grad_clip: float, strategy: str) -> TrainConfig:
    data, context, tensor = degrees
    return TrainConfig.model_validate(
        {
            "kind": "train",
            **CASES[case],
            "data": {
                "manifest": "none", "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH,
                "micro_batch_size": SAMPLES // 2, "num_micro_batches": 2,
            },
            "optimizer": {"lr": 1e-2, "eps": 1e-2, "grad_clip": grad_clip, "schedule": "constant", "ema_decay": 0.0},
            "trainer": {"max_steps": 1, "precision": "fp32"},
            "parallel": {
                "data_degree": data, "context_degree": context, "tensor_degree": tensor, "zero_stage": stage,
                "context_strategy": strategy, "ulysses_degree": 2 if strategy == "unified" else None,
            },
        }
    )  # fmt: skip


def batches(case: str, data_rank: int, data_degree: int) -> list[Batch]:
    """The micro-batches of one data rank; two of two samples in all. Packs have a video and an image of another size, 45
    and 8 tokens: of four context ranks the last has some of both."""
    generator, half = torch.Generator().manual_seed(1), SAMPLES // 2
    video = torch.rand(SAMPLES, 3, FRAMES, HEIGHT, WIDTH, generator=generator) * 2 - 1
    if case.startswith("packed"):
        sizes = (video, video[:, :, :1, :32, :16])
        texts, rate = [["a red circle"], ["moving"]], torch.full((1,), 8.0)
        return [
            pack([Batch(sizes[j][[i * half + j]], texts[j], rate, [f"{i}-{j}"], 0, SAMPLES) for j in range(2)])
            for i in range(data_rank, 2, data_degree)
        ]
    return [
        Batch(video[i * half :][:half], ["a red circle", "moving"], torch.full((half,), 8.0), [f"{i}-0", f"{i}-1"], 0, SAMPLES)
        for i in range(data_rank, 2, data_degree)
    ]


Key = tuple[str, tuple[int, int, int], int, float, str]
"""Case, degrees, ZeRO stage, clipping limit, strategy."""


def steps(keys: list[Key]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Each key with its step. Those on one mesh come together: the file that ranks meet through gets slower with each group."""
    from megatron.core import parallel_state

    from videofm.parallel.mesh import split_mesh

    def layout(key: Key) -> tuple[Any, ...]:
        return key[1], key[4]

    for _, group in groupby(sorted(keys, key=layout), key=layout):
        same = list(group)
        mesh = split_mesh(config_of(*same[0]).parallel, torch.device("cpu"), [4])
        try:
            for key in same:
                yield key, one_step(key, mesh)
        finally:
            parallel_state.destroy_model_parallel()


def one_step(key: Key, mesh: Any) -> dict[str, Any]:
    """Loss, norm and the update of each trained tensor, whole."""
    from videofm.data.loader import Step
    from videofm.data.plan import PlanState
    from videofm.train.build import build_job, build_models
    from videofm.train.state import whole_weights
    from videofm.train.trainer import train_step

    config = config_of(*key)
    models = build_models(config)
    with torch.no_grad():  # a fresh transformer predicts 0 whatever it sees, and its gradients say little
        for name, parameter in models.get("dit", torch.nn.Module()).named_parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    before = {(role, name): value.clone() for role, model in models.items() for name, value in model.named_parameters()}
    job = build_job(config, None, mesh, None, models)  # type: ignore[arg-type]
    metrics = train_step(job, Step(batches(key[0], mesh.data_rank, mesh.data_degree), SAMPLES, PlanState(step=1)))
    updates: dict[str, Tensor] = {}
    for role in job.trained_roles:
        for name, value in whole_weights(job, role).items():
            if (role, name) in before:
                updates[f"{role}.{name}"] = value.float() - before[role, name]
    return {"metrics": metrics, "updates": updates}


def compare(rank: int, world_size: int, references: dict[str, Any]) -> list[str]:
    """What differs from the one-rank step, in words."""
    wrong = []
    for key, found in steps(keys(world_size)):
        case, degrees, stage, clip, strategy = key
        wanted = references[name_of(case, clip)]
        label = f"{case} data x context x tensor {degrees} ZeRO {stage} clip {clip} {strategy}"
        for metric in ("loss", "grad_norm"):
            if not math.isclose(found["metrics"][metric], wanted["metrics"][metric], rel_tol=2e-5):
                wrong.append(f"{label}: {metric} {found['metrics'][metric]} is not {wanted['metrics'][metric]}")
        assert set(found["updates"]) == set(wanted["updates"])
        errors = {name: (found["updates"][name] - value).abs().max().item() for name, value in wanted["updates"].items()}
        worst = max(errors, key=lambda name: errors[name])
        if errors[worst] > TOLERANCE:
            wrong.append(f"{label}: update of {worst} differs by {errors[worst]:.2g}")
    return wrong


def name_of(case: str, clip: float) -> str:
    return f"{case} {clip}"


def keys(world_size: int) -> list[Key]:
    """What `world_size` ranks do. Clipping alternates: each layout and each stage sees both."""
    found = []
    for number, degrees in enumerate(LAYOUTS[world_size]):
        strategies = ["auto"] if degrees[1] < 4 else ["auto", "unified", "ring", "allgather_kv"]
        for case in CASES:
            if case == "vae" and degrees[2] > 1:
                continue  # nothing of a VAE is split over tensor ranks
            stages = [stage for stage in STAGES if not (case == "vae" and stage == 3)]  # its phases share models
            if case.startswith("packed"):
                # What packs add is in the attention: each strategy once.
                stages = {2: [1], 4: [1, 2, 3] if case == "packed_ltx" and degrees[1] == 4 else []}[world_size]
            for stage in stages:
                strategy = strategies[stage % len(strategies)] if case != "vae" else "auto"
                found.append((case, degrees, stage, (0.0, 0.05)[(stage + number) % 2], strategy))
    return found


def reference(rank: int, world_size: int) -> dict[str, Any]:
    wanted: list[Key] = [(case, (1, 1, 1), 0, clip, "auto") for case in CASES for clip in (0.0, 0.05)]
    return {name_of(key[0], key[3]): found for key, found in steps(wanted)}


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return run_distributed(reference, 1)[0]


def test_the_reference_moves_and_is_clipped(references: dict[str, Any]) -> None:
    """Every tensor moves by much more than the tolerance somewhere, and the clipped update is another."""
    for case in CASES:
        free, clipped = (references[name_of(case, clip)] for clip in (0.0, 0.05))
        assert free["metrics"]["grad_norm"] > 0.1
        moved = {name: update.abs().max().item() for name, update in free["updates"].items()}
        assert max(moved.values()) > 1e-3, moved
        assert any(not torch.allclose(free["updates"][name], clipped["updates"][name]) for name in moved)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_layout_takes_the_step_of_one_rank(world_size: int, references: dict[str, Any]) -> None:
    wrong = {line for lines in run_distributed(compare, world_size, references) for line in lines}
    assert not wrong, "\n".join(sorted(wrong))
