"""One step of preference training is the one-rank step, under data, context and tensor ranks, with every kind of reference.

The loss is not linear in the errors of a clip, so that a rank which had a share of one only would give another loss. Clips have
3 latent frames of 5 x 3 cells, 45 tokens, which two context ranks cannot share evenly; a step has two micro-batches of two
pairs, with weights, a tie, and segments in one case (oracle list F-C 11). Updates are compared as in test_layouts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.distributed.test_layouts import TEXT
from tests.helpers import run_distributed
from videofm.config.train import TrainConfig
from videofm.types import Batch

PAIRS, FRAMES, HEIGHT, WIDTH = 4, 9, 40, 24
TOLERANCE = 1e-6
LORA = {"lora": {"rank": 2}}
CASES: dict[str, dict[str, Any]] = {
    "adapters_off": {"dit": LORA, "reference": {"kind": "adapters_off"}},
    "second_adapter": {"dit": LORA, "reference": {"kind": "second_adapter"}},
    "frozen": {"dit": {}, "reference": {"kind": "frozen"}, "segments": True},
    "cached": {"dit": {}, "reference": {"kind": "cached", "num_draws": 2}, "loser_safeguard": 0.9},
}
Key = tuple[str, tuple[int, int, int], int]
"""Case, degrees (data, context, tensor), ZeRO stage."""
LAYOUTS: list[Key] = [
    ("adapters_off", (2, 1, 1), 3), ("adapters_off", (1, 2, 1), 1),
    ("second_adapter", (2, 1, 1), 2), ("second_adapter", (1, 2, 1), 0),
    ("frozen", (2, 1, 1), 3), ("frozen", (1, 2, 1), 3), ("frozen", (1, 1, 2), 1),
    ("cached", (2, 1, 1), 0), ("cached", (1, 2, 1), 0),
]  # fmt: skip
METRICS = ("loss", "grad_norm", "margin", "implicit_accuracy", "winner_error", "loser_error", "winner_reference_error")


def config_of(case: str, degrees: tuple[int, int, int], stage: int) -> TrainConfig:
    data, context, tensor = degrees
    fields = dict(CASES[case])
    sizes = {"name": "dit/ltx", "overrides": {"num_layers": 2}}
    models = {"vae": {"name": "vae/ltx"}, "text_encoder": TEXT, "dit": sizes | fields.pop("dit")}
    if fields["reference"]["kind"] == "frozen":
        models["reference"] = sizes
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "models": models,
            "objective": {"kind": "dpo", "noise_levels": {"kind": "logit_normal"}, "beta": 20.0, **fields},
            "data": {
                "manifest": "none", "num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "start": "first",
                "micro_batch_size": PAIRS // 2, "num_micro_batches": 2, "pairs": {"path": "none"},
            },
            "optimizer": {"lr": 1e-2, "eps": 1e-2, "schedule": "constant", "ema_decay": 0.0, "weight_decay": 0.0},
            "trainer": {"max_steps": 1, "precision": "fp32"},
            "parallel": {"data_degree": data, "context_degree": context, "tensor_degree": tensor, "zero_stage": stage},
        }
    )  # fmt: skip


def batches(data_rank: int, data_degree: int) -> list[Batch]:
    """The micro-batches of one data rank: winners first, losers behind them."""
    half = PAIRS // 2
    video = torch.rand(2, 2 * half, 3, FRAMES, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
    labels = torch.ones(2, half, FRAMES)
    labels[0, 0, 5:], labels[1, 1, :3] = -1.0, 0.0
    weights, ties = torch.tensor([[1.0, 0.5], [0.0, 2.0]]), torch.tensor([[False, False], [True, False]])
    return [
        Batch(
            video[i], ["a red circle", "moving"] * 2, torch.full((2 * half,), 8.0), [f"{i}-0@0", f"{i}-1@0"] * 2, 0, PAIRS,
            pair_weights=weights[i], pair_ties=ties[i], frame_labels=labels[i],
        )
        for i in range(data_rank, 2, data_degree)
    ]  # fmt: skip


class Order:
    """A loader and its plan, of one step that is an epoch."""

    def __init__(self, mesh: Any) -> None:
        from videofm.data.plan import PlanState

        self.mesh, self.plan, self.identity = mesh, self, {"name": "order"}
        self.after, self.num_samples, self.fill = PlanState(step=1, epoch=1), PAIRS, None

    def steps(self, state: Any) -> Iterator[Any]:
        """The step, for ranks that read; what they have to wait for, for those that are told."""
        from videofm.data.loader import Step

        if self.mesh.sample_degree > 1 and not self.mesh.is_leader:
            yield self
        yield Step(batches(self.mesh.data_rank, self.mesh.data_degree), PAIRS, self.after)

    def share(self, data_rank: int, data_degree: int) -> list[Batch]:
        return batches(data_rank, data_degree)

    def describe(self) -> str:
        return f"{PAIRS} pairs"


def move(model: nn.Module, only_trained: bool) -> None:
    """Move weights by a draw of their name, whoever holds them: a fresh transformer predicts 0, and a fresh adapter adds 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or not only_trained:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))


def one_step(key: Key, mesh: Any, folder: str) -> dict[str, Any]:
    """The metrics, the update of each trained tensor, whole, and how many weights of the reference this rank holds."""
    from videofm.data.loader import Step
    from videofm.run_dir import RunDirectory
    from videofm.train import reference_errors
    from videofm.train.build import build_job, build_models
    from videofm.train.optim import local_shard
    from videofm.train.state import whole_weights
    from videofm.train.trainer import train_step

    config, order = config_of(*key), Order(mesh)
    models = build_models(config)
    for role in ("dit", "reference"):
        if role in models:
            move(models[role], only_trained=False)
    run = RunDirectory(Path(folder) / "-".join(map(str, (key[0], *key[1], key[2]))))
    run.path.mkdir(exist_ok=True)
    job = build_job(config, run, mesh, order, models)  # type: ignore[arg-type]
    start = reference_errors.identity(config, job.objective, order, models)  # type: ignore[arg-type]
    reference_errors.provide(job, start, resumed=False)
    if key[0] == "cached":  # else the policy still is its reference
        move(models["dit"], only_trained=True)
    before = {name: value.clone() for name, value in whole_weights(job, "dit").items()}
    metrics = train_step(job, Step(batches(mesh.data_rank, mesh.data_degree), PAIRS, order.after))
    updates = {name: value - before[name] for name, value in whole_weights(job, "dit").items()}
    held = sum(local_shard(parameter).numel() for parameter in models.get("reference", nn.Module()).parameters())
    return {"metrics": metrics, "updates": updates, "held": held}


def every_step(rank: int, world_size: int, folder: str) -> list[tuple[Key, dict[str, Any]]]:
    from megatron.core import parallel_state

    from videofm.parallel.mesh import split_mesh

    keys: list[Key] = LAYOUTS if world_size == 2 else [(case, (1, 1, 1), 0) for case in CASES]
    found = []
    for _, same in groupby(sorted(keys, key=lambda key: key[1]), key=lambda key: key[1]):
        group = list(same)
        mesh = split_mesh(config_of(*group[0]).parallel, torch.device("cpu"), [4])
        try:
            found += [(key, one_step(key, mesh, folder)) for key in group]
        finally:
            parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dpo")


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Any]]:
    return {key[0]: found for key, found in run_distributed(every_step, 1, str(folder))[0]}


@pytest.fixture(scope="module")
def shared(folder: Path) -> list[list[tuple[Key, dict[str, Any]]]]:
    return run_distributed(every_step, 2, str(folder))


def test_the_step_alone_says_something(alone: dict[str, dict[str, Any]]) -> None:
    """Every case moves weights by far more than the tolerance, and no policy is its reference."""
    for case, found in alone.items():
        assert max(update.abs().max().item() for update in found["updates"].values()) > 1e-3, case
        assert abs(found["metrics"]["margin"]) > 1e-3, case
        assert found["metrics"]["tied"] == 0.25


def test_every_layout_takes_the_step_of_one_rank(
    alone: dict[str, dict[str, Any]], shared: list[list[tuple[Key, dict[str, Any]]]]
) -> None:
    for steps in shared:
        assert {key for key, _ in steps} == set(LAYOUTS)
        for key, found in steps:
            wanted: dict[str, Any] = alone[key[0]]
            assert {name: found["metrics"][name] for name in METRICS} == pytest.approx(
                {name: wanted["metrics"][name] for name in METRICS}, rel=2e-5, abs=1e-6
            ), key
            assert set(found["updates"]) == set(wanted["updates"])
            updates: dict[str, Tensor] = wanted["updates"]
            errors = {name: (found["updates"][name] - value).abs().max().item() for name, value in updates.items()}
            worst = max(errors, key=lambda name: errors[name])
            assert errors[worst] < TOLERANCE, f"{key}: update of {worst} differs by {errors[worst]:.2g}"


def test_stage_three_shards_a_frozen_reference(
    alone: dict[str, dict[str, Any]], shared: list[list[tuple[Key, dict[str, Any]]]]
) -> None:
    """Each of two ranks holds half of its weights, and what rounds a partition up; tensor ranks hold their heads."""
    whole = alone["frozen"]["held"]
    for steps in shared:
        held = {key: found["held"] for key, found in steps if key[0] == "frozen"}
        for degrees in ((2, 1, 1), (1, 2, 1)):
            assert whole / 2 <= held["frozen", degrees, 3] < 0.51 * whole
        assert whole / 2 < held["frozen", (1, 1, 2), 1] < 0.75 * whole


def test_measured_errors_are_those_of_one_rank(
    folder: Path, alone: dict[str, dict[str, Any]], shared: list[list[tuple[Key, dict[str, Any]]]]
) -> None:
    """All pairs, whichever rank measured them, by name."""
    wanted, *others = (folder / f"cached-{degrees}-0" for degrees in ("1-1-1", "2-1-1", "1-2-1"))
    values = load_file(wanted / "reference_errors.safetensors")["values"]
    assert values.shape == (PAIRS, 2, 2, 1)
    for run in others:
        assert json.loads((run / "reference_errors.json").read_text())["samples"] == ["0-0", "0-1", "1-0", "1-1"]
        torch.testing.assert_close(load_file(run / "reference_errors.safetensors")["values"], values, rtol=1e-5, atol=1e-6)
