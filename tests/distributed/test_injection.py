"""One optimizer step of a guided transformer is the one-rank step, under context and tensor ranks, as test_layouts has it.

Tokens are 45 (3 latent frames of 5 x 3 cells) or, packed, 45 and 8: no degree divides them. A token's feature is the noisy
latent of the token before it, so that a feature that goes to another token than its own is seen; each third has the null
feature. No layer is zero. A stand-in objective leaves out the tokenizer that would make features.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator
from itertools import groupby, product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.distributed.test_layouts import DIT, LTX, PACKED, SAMPLES, STEP_VIDEO, TOLERANCE, batches
from tests.helpers import run_distributed
from videofm import models, registry
from videofm.config.train import TrainConfig
from videofm.objectives.flow_matching import FlowMatchingObjective

LAYOUTS = {1: [(1, 1, 1)], 2: [(1, 2, 1), (1, 1, 2)], 4: [(1, 2, 2), (1, 4, 1)]}
"""World size -> degrees (data, context, tensor)."""
TRANSFORMERS = {"ltx": LTX, "step_video": STEP_VIDEO}
KINDS: dict[str, dict[str, Any]] = {
    "adaptive_norm": {"injection": {"kind": "adaptive_norm", "blocks": "first_half"}},
    "mlp": {"injection": {"kind": "mlp", "blocks": "all", "hidden_width": 24}},
    "controlnet": {"injection": {"kind": "controlnet", "blocks": "last_half"}},
    "frozen": {"injection": {"kind": "adaptive_norm", "blocks": "all"}, "freeze_base": True},
}

Key = tuple[str, str, bool, tuple[int, int, int], int]
"""Transformer, kind, whether clips are packed, degrees, ZeRO stage."""


class Guided(FlowMatchingObjective):
    """Takes a transformer with an injection, whose features `bring` adds."""

    def check(self, models: Any) -> None:
        """Nothing is refused."""


def bring(model: nn.Module) -> None:
    """Give each call of `model` features, before anything splits its arguments."""
    signature = inspect.signature(model.forward)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = signature.bind(*args, **kwargs)
        tokens = call.arguments["latent_tokens"]
        call.arguments["features"] = tokens.detach().roll(1, dims=1)
        call.arguments["features_kept"] = (torch.arange(tokens.shape[1]) % 3 != 0).expand(tokens.shape[:2])
        return call.args, call.kwargs

    model.register_forward_pre_hook(hook, with_kwargs=True)


def config_of(key: Key) -> TrainConfig:
    transformer, kind, is_packed, (data, context, tensor), stage = key
    return TrainConfig.model_validate(
        {
            "kind": "train",
            "models": {**DIT["models"], "dit": {**TRANSFORMERS[transformer], **KINDS[kind]}},
            "objective": {**(PACKED if is_packed else DIT["objective"]), "train_text_encoder": False},
            "data": {
                "manifest": "none", "num_frames": 9, "height": 40, "width": 24, "micro_batch_size": SAMPLES // 2,
                "num_micro_batches": 2,
            },
            "optimizer": {"lr": 1e-2, "eps": 1e-2, "grad_clip": 0.0, "schedule": "constant", "ema_decay": 0.5},
            "trainer": {"max_steps": 1, "precision": "fp32"},
            "parallel": {
                "data_degree": data, "context_degree": context, "tensor_degree": tensor, "zero_stage": stage,
                "activation_checkpointing": "full" if kind == "controlnet" else "none",
            },
        }
    )  # fmt: skip


def steps(keys: list[Key]) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Each key with its step; those on one mesh come together."""
    from megatron.core import parallel_state

    from videofm.parallel.mesh import split_mesh

    registry.OBJECTIVES["flow_matching"] = f"{__name__}:Guided"  # in this process, which is the test's own
    for _, group in groupby(sorted(keys, key=lambda key: key[3]), key=lambda key: key[3]):
        same = list(group)
        mesh = split_mesh(config_of(same[0]).parallel, torch.device("cpu"), [4])
        try:
            for key in same:
                yield key, one_step(key, mesh)
        finally:
            parallel_state.destroy_model_parallel()


def one_step(key: Key, mesh: Any) -> dict[str, Any]:
    """Loss, norm, the update of each tensor of the transformer, whole, and what a checkpoint holds of its moving average."""
    from videofm.data.loader import Step
    from videofm.data.plan import PlanState
    from videofm.train.build import build_job, build_models
    from videofm.train.state import content
    from videofm.train.trainer import train_step

    config = config_of(key)
    built = build_models(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in built["dit"].parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    bring(built["dit"])
    before = {name: value.clone() for name, value in built["dit"].named_parameters()}
    loader: Any = SimpleNamespace(plan=SimpleNamespace(identity={}))
    job = build_job(config, None, mesh, loader, built)  # type: ignore[arg-type]
    case = "packed" if key[2] else "plain"
    metrics = train_step(job, Step(batches(case, mesh.data_rank, mesh.data_degree), SAMPLES, PlanState(step=1)))
    stored = content(job, PlanState(step=1))
    whole = {(tensor.file, tensor.name): tensor.bring(None) for tensor in stored.tensors}
    after, average = (
        {name: value for (file, name), value in whole.items() if file == f"{what}/dit/model"} for what in ("models", "ema")
    )
    updates: dict[str, Tensor] = {name: after[name].float() - value for name, value in before.items()}
    return {"metrics": metrics, "updates": updates, "after": after, "average": average, "described": stored.values}


def compare(rank: int, world_size: int, references: dict[Any, Any]) -> list[str]:
    """What differs from the one-rank step, in words."""
    wrong = []
    for key, found in steps(keys(world_size)):
        wanted = references[key[:3]]
        label = f"{key[:3]} data x context x tensor {key[3]} ZeRO {key[4]}"
        for metric in ("loss", "grad_norm"):
            if not math.isclose(found["metrics"][metric], wanted["metrics"][metric], rel_tol=2e-5):
                wrong.append(f"{label}: {metric} {found['metrics'][metric]} is not {wanted['metrics'][metric]}")
        for what in ("updates", "average"):
            assert set(found[what]) == set(wanted[what])
            errors = {name: (found[what][name] - value).abs().max().item() for name, value in wanted[what].items()}
            worst = max(errors, key=lambda name: errors[name])
            if errors[worst] > TOLERANCE:
                wrong.append(f"{label}: {what} of {worst} differs by {errors[worst]:.2g}")
    return wrong


def keys(world_size: int) -> list[Key]:
    """What `world_size` ranks do: both transformers with adaptive norm and ControlNet, each layout and each kind at ZeRO 0 and
    2; the rest once."""
    found: list[Key] = []
    for number, degrees in enumerate(LAYOUTS[world_size]):
        for place, (transformer, kind) in enumerate(product(TRANSFORMERS, ("adaptive_norm", "controlnet"))):
            if degrees != (1, 4, 1) or place == 3:
                found.append((transformer, kind, False, degrees, (0, 2, 2, 0)[(place + number) % 4]))
    if world_size == 2:
        context, tensor = LAYOUTS[2]
        found += [("ltx", "adaptive_norm", True, context, 2), ("step_video", "controlnet", True, context, 0)]
        found += [("ltx", "frozen", False, context, 3), ("ltx", "frozen", False, tensor, 2), ("ltx", "mlp", False, context, 2)]
        found += [("ltx", "controlnet", False, context, 3)]
    return found


def reference(rank: int, world_size: int) -> dict[Any, Any]:
    wanted = sorted({key[:3] for size in (2, 4) for key in keys(size)})
    return {key[:3]: found for key, found in steps([(*case, (1, 1, 1), 0) for case in wanted])}


@pytest.fixture(scope="module")
def references() -> dict[Any, Any]:
    return run_distributed(reference, 1)[0]


def test_the_reference_moves(references: dict[Any, Any]) -> None:
    """Every tensor that features pass moves by much more than the tolerance; a frozen base does not."""
    for case, found in references.items():
        moved = {name: update.abs().max().item() for name, update in found["updates"].items()}
        injected = {name: size for name, size in moved.items() if name.startswith("injection.")}
        assert found["metrics"]["grad_norm"] > 0.01
        assert injected["injection.way_in.null"] > 20 * TOLERANCE and injected["injection.way_in.linear.weight"] > 1e-4, case
        assert all(size > 0 for name, size in injected.items() if ".layers." in name), case
        base = max(size for name, size in moved.items() if name not in injected)
        assert base == 0 if case[1] == "frozen" else base > 1e-3


def test_a_moving_average_is_a_whole_model(references: dict[Any, Any], tmp_path: Any) -> None:
    """Of a frozen base the average is the base itself; of the injection it is between the first weights and the last."""
    for case in (("ltx", "frozen", False), ("step_video", "controlnet", False)):
        found = references[case]
        folder = tmp_path / "-".join(map(str, case)) / "step_00000001"
        for what, tensors in (("models", found["after"]), ("ema", found["average"])):
            (folder / what / "dit").mkdir(parents=True)
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / what / "dit" / "model.safetensors"
            )
        loaded = _loaded(folder, found["described"]["models/dit/model"])
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, found["average"][name])
            frozen = case[1] == "frozen" and not name.startswith("injection.")
            moved = found["updates"].get(name, torch.zeros(1)).any()
            assert torch.equal(tensor, found["after"][name]) == (frozen or not moved), name


def _loaded(folder: Any, described: dict[str, Any]) -> nn.Module:
    (folder / "models" / "dit" / "model.json").write_text(json.dumps(described))
    (folder / "COMMITTED.json").write_text("{}")
    return models.load(folder, "dit", ema=True)


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_layout_takes_the_step_of_one_rank(world_size: int, references: dict[Any, Any]) -> None:
    wrong = {line for lines in run_distributed(compare, world_size, references) for line in lines}
    assert not wrong, "\n".join(sorted(wrong))
