"""A training goes on under any layout: what one saved, another loads to the last bit, and then takes the step that the first
one takes itself.

`NODES` is a forest: a root trains three steps, saves, and goes on; a child loads a checkpoint of its parent under another
layout, saves what it has before it does anything (so that tensors are gathered whole again, by other ranks, from other shards),
and takes the next step. Every step is saved, and what is compared is what lies in the files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.demo_shards import write_demo_shards
from tests.helpers import run_distributed
from videofm.checkpoint.record import step_folder
from videofm.config.train import TrainConfig

SAVED, TOLERANCE = 3, 1e-6
SIZE = {"num_frames": 9, "height": 32, "width": 32}
VAE = {"name": "vae/ltx", "overrides": {"encoder_widths": [8, 8, 16], "decoder_widths": [16, 8], "latent_channels": 4}}
CRITIC = {"name": "discriminator/patchgan_3d", "overrides": {"widths": [8, 16], "flat_widths": [16], "num_groups": 4}}
TRANSFORMER = {"name": "dit/ltx", "overrides": {"in_channels": 4, "num_layers": 1, "num_heads": 4, "head_width": 56}}
"""224 x 896 / 2 = 100,352 elements: the half that a tensor rank has of a matrix is one that DeepSpeed still shards."""
CASES: dict[str, dict[str, Any]] = {
    "dit": {
        "models": {
            "vae": VAE,
            "dit": TRANSFORMER,
            "text_encoder": {"name": "text/t5", "overrides": {"num_layers": 1, "max_length": 32}},
        },
        "objective": {"kind": "flow_matching", "train_text_encoder": True, "caption_dropout": 0.1},
    },
    "vae": {
        "models": {"vae": VAE, "discriminator": CRITIC},
        "objective": {"kind": "autoencoder", "gan": {"weight": 0.1, "adaptive": True}, "num_statistics_clips": 2},
    },
}


@dataclass(frozen=True)
class Node:
    """A training under one layout: degrees (data, context, tensor), ZeRO stage; of a child, where it comes from."""

    degrees: tuple[int, int, int]
    stage: int
    parent: str | None = None
    step: int = SAVED
    case: str = "dit"

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.degrees[0] * self.degrees[1] * self.degrees[2]

    @property
    def last_step(self) -> int:
        """Steps that are done in the end: one behind the last that a child loads, or behind the one that was loaded."""
        return self.step + (2 if self.parent is None else 1)


NODES = {
    "one": Node((1, 1, 1), 1),
    "vae": Node((1, 1, 1), 1, case="vae"),
    "two": Node((2, 1, 1), 1),
    "sharded": Node((2, 1, 1), 3),
    "tensor": Node((1, 1, 2), 1),
    "four": Node((2, 2, 1), 2),
    "1 rank -> 2": Node((2, 1, 1), 1, "one"),
    "2 ranks -> 4": Node((4, 1, 1), 1, "two"),
    "4 ranks -> 1": Node((1, 1, 1), 2, "four"),
    "ZeRO 1 -> 3": Node((2, 1, 1), 3, "two"),
    "ZeRO 1 -> 3 -> 2": Node((2, 1, 1), 2, "ZeRO 1 -> 3", step=SAVED + 1),
    "ZeRO 3 -> ZeRO 1 with tensor 2": Node((1, 1, 2), 1, "sharded"),
    "ZeRO 3 -> ZeRO 3 with tensor 2": Node((2, 1, 2), 3, "sharded"),
    "context 1 -> 2": Node((1, 2, 1), 1, "one"),
    "tensor 2 -> 1": Node((1, 1, 1), 1, "tensor"),
    "VAE, 1 rank -> 2": Node((2, 1, 1), 2, "vae", case="vae"),
    "VAE, context 1 -> 2": Node((1, 2, 1), 0, "vae", case="vae"),
}
ROUNDS = (1, 2, 4, 1)
"""World sizes in an order in which every child comes behind its parent; each is started once."""
CHILDREN = [name for name, node in NODES.items() if node.parent is not None]


def config_of(node: Node, folder: Path) -> TrainConfig:
    data, context, tensor = node.degrees
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "seed": 3,
            **CASES[node.case],
            "data": {"manifest": str(folder / "clips"), "micro_batch_size": 1, "num_micro_batches": 4, **SIZE},
            # Updates follow gradients, not the rounding of their signs; the limit of the norm follows its saved average.
            "optimizer": {"lr": 1e-2, "eps": 1e-2, "ema_decay": 0.5, "warmup_steps": 2, "grad_clip_ema": 1.5},
            "trainer": {"max_steps": 100, "precision": "fp32", "device": "cpu", "keep_checkpoints": 9},
            "parallel": {
                "data_degree": data, "context_degree": context, "tensor_degree": tensor, "zero_stage": node.stage,
            },
        }
    )  # fmt: skip


def run_rank(rank: int, world_size: int, folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Run some nodes, one after the other."""
    from megatron.core import parallel_state

    from videofm.parallel.mesh import split_mesh

    found = {}
    for name in names:
        mesh = split_mesh(config_of(NODES[name], folder).parallel, torch.device("cpu"), [4])
        try:
            found[name] = run_node(name, mesh, folder)
        finally:
            parallel_state.destroy_model_parallel()
    return found


def run_node(name: str, mesh: Any, folder: Path) -> dict[str, Any]:
    """Losses and sample ids of the steps by their number, this rank's data rank, and how many parameters are sharded."""
    from videofm.data.loader import StepLoader
    from videofm.run_dir import RunDirectory
    from videofm.train import state
    from videofm.train.build import build_job, build_models, build_objective, trained_roles
    from videofm.train.share import shared_steps
    from videofm.train.trainer import train_step

    node = NODES[name]
    settings = config_of(node, folder)
    run, built = RunDirectory(folder / name), build_models(settings)
    loader = StepLoader(settings.data, settings.seed, mesh.data_rank, mesh.data_degree)
    checkpoint = None if node.parent is None else step_folder(folder / node.parent / "checkpoints", node.step)
    if checkpoint is not None:
        state.load_weights(checkpoint, built, trained_roles(build_objective(settings)))
    job = build_job(settings, run, mesh, loader, built)
    position = state.PlanState() if checkpoint is None else state.load_state(job, checkpoint)
    if checkpoint is not None:
        save(job, position)
    found: dict[str, Any] = {"losses": {}, "ids": {}, "data_rank": mesh.data_rank}
    for step in islice(shared_steps(loader, position, mesh), node.last_step - position.step):
        found["losses"][step.after.step] = train_step(job, step)["loss"]
        found["ids"][step.after.step] = [list(batch.sample_ids) for batch in step.batches]
        if step.after.step >= SAVED:
            save(job, step.after)
    found["sharded"] = sum(value.shape != value.ds_shape for value in parameters(job) if hasattr(value, "ds_shape"))
    return found


def save(job: Any, position: Any) -> None:
    from videofm.train import state

    writer = state.saver(job)
    writer.copy(state.facts(job, position, code="test"), state.content(job, position))
    writer.write()
    writer.wait()


def parameters(job: Any) -> list[Any]:
    return [value for role in job.trained_roles for value in job.models[role].parameters()]


@dataclass(frozen=True)
class Forest:
    """All nodes: their folder, and by name what each rank found."""

    folder: Path
    found: dict[str, list[dict[str, Any]]]

    def checkpoint(self, name: str, step: int) -> Path:
        """The folder of a checkpoint."""
        return step_folder(self.folder / name / "checkpoints", step)

    def ids(self, name: str, step: int) -> list[list[str]]:
        """The samples of a step, micro-batch by micro-batch in the order of the plan: data ranks take turns."""
        by_rank = {found["data_rank"]: found["ids"][step] for found in self.found[name]}
        return [by_rank[rank][index] for index in range(len(by_rank[0])) for rank in sorted(by_rank)]


@pytest.fixture(scope="module")
def forest(tmp_path_factory: pytest.TempPathFactory) -> Forest:
    folder = tmp_path_factory.mktemp("layouts")
    write_demo_shards(folder / "clips", num_clips=20)
    found: dict[str, list[dict[str, Any]]] = {}
    for world_size in ROUNDS:
        ready: list[str] = []
        for name, node in NODES.items():
            is_first = name not in found and (node.parent is None or node.parent in {*found, *ready})
            if is_first and node.world_size == world_size:
                ready.append(name)
        ranks = run_distributed(run_rank, world_size, folder, ready)
        found |= {name: [rank[name] for rank in ranks] for name in ready}
    assert set(found) == set(NODES)
    return Forest(folder, found)


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor by its file's name without the suffix, and its own name; shards of one model are one."""
    found = {}
    for path in sorted(checkpoint.rglob("*.safetensors")):
        place = str(path.relative_to(checkpoint)).partition("-0")[0].removesuffix(".safetensors")
        for name, value in load_file(path).items():
            assert f"{place} {name}" not in found
            found[f"{place} {name}"] = value
    return found


@pytest.mark.parametrize("name", CHILDREN)
def test_what_is_loaded_is_what_was_saved_to_the_last_bit(forest: Forest, name: str) -> None:
    """Weights, moving averages, both of Adam's moments, counters and the position, gathered whole under the other layout."""
    node = NODES[name]
    assert node.parent is not None
    theirs, ours = (forest.checkpoint(run, node.step) for run in (node.parent, name))
    saved, again = tensors_of(theirs), tensors_of(ours)
    assert saved.keys() == again.keys()
    kinds = {key.partition("/")[0] for key in saved}
    assert kinds == {"models", "ema", "optimizer"} and any(" exp_avg_sq." in key for key in saved)
    different = [key for key, value in saved.items() if not same_bits(value, again[key])]
    assert not different
    positions = [json.loads((folder / "state.json").read_text()) for folder in (theirs, ours)]
    assert positions[0] == positions[1] and positions[0]["step"] == node.step


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("name", CHILDREN)
def test_the_next_step_is_that_of_the_layout_before(forest: Forest, name: str) -> None:
    """Its samples are the same in the same order; loss, and every weight, average and moment after it, to 1e-6."""
    node = NODES[name]
    assert node.parent is not None
    step = node.step + 1
    parent = node.parent if step in forest.found[node.parent][0]["losses"] else str(NODES[node.parent].parent)
    assert forest.ids(name, step) == forest.ids(parent, step)
    losses = {found["losses"][step] for found in forest.found[name]} | {found["losses"][step] for found in forest.found[parent]}
    assert max(losses) - min(losses) <= TOLERANCE * max(1.0, max(losses)), losses
    theirs, ours = (tensors_of(forest.checkpoint(run, step)) for run in (parent, name))
    assert theirs.keys() == ours.keys()
    errors = {key: float((ours[key].double() - value.double()).abs().max()) for key, value in theirs.items()}
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] <= TOLERANCE, f"{worst} differs by {errors[worst]:.2g}"


@pytest.mark.parametrize("name", [name for name, node in NODES.items() if node.parent is None])
def test_a_step_moves_much_more_than_the_tolerance(forest: Forest, name: str) -> None:
    """Each kind of tensor, every matrix of it; else the tests above would say little. Samples of two steps are not the same."""
    before, after = (tensors_of(forest.checkpoint(name, step)) for step in (SAVED, SAVED + 1))
    for kind in ("models", "ema", "optimizer"):
        moved = [float((after[key] - value).abs().max()) for key, value in before.items() if key.startswith(kind)]
        assert max(moved) > 1000 * TOLERANCE, kind
    assert forest.ids(name, SAVED) != forest.ids(name, SAVED + 1)


def test_zero_3_has_something_to_shard(forest: Forest) -> None:
    """Small parameters are whole on every rank; under tensor 2 the halves are still sharded."""
    for name in ("sharded", "ZeRO 1 -> 3", "ZeRO 3 -> ZeRO 3 with tensor 2"):
        assert all(found["sharded"] > 0 for found in forest.found[name]), name
