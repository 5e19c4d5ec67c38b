"""What a checkpoint of a training run holds, gathered from a job and given back to one.

```
models/ROLE/model.{json,safetensors}   ema/ROLE/model   optimizer/PHASE.safetensors
train_config.json (the run's resolved config)   state.json (step, position in the data, what order it belongs to)
```
Tensors are whole and named by parameter, so that a checkpoint says nothing of degrees or ZeRO stages. Frozen roles do not
change: they are written once, to `frozen/ROLE` of the run directory. Of a role that trains adapters only these are in the
checkpoint; what they are added to is in `base/ROLE`, and a second adapter that a preference training compares with lies beside
them, in `models/ROLE/reference.safetensors`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videofm import models
from videofm.checkpoint.save import CheckpointFiles, newest, prune, read_tensors, write_checkpoint
from videofm.data.plan import PlanState
from videofm.ops.adapters import REFERENCE, has_second_adapter, load_second_adapter, second_adapter_weights
from videofm.parallel.mesh import Mesh
from videofm.progress import LOG
from videofm.run_dir import RunDirectory, read_json
from videofm.train.build import Job
from videofm.train.optim import gather_shard, local_shard


def checkpoint_folder(run: RunDirectory) -> Path:
    """Where the checkpoints of a run lie."""
    return run.path / "checkpoints"


def save(job: Job, position: PlanState) -> None:
    """Write and commit the checkpoint of the position. All ranks call it; one writes."""
    files = _gather(job, position)
    if job.mesh.is_main:
        checkpoints = checkpoint_folder(job.run)
        folder = write_checkpoint(checkpoints, position.step, files)
        prune(checkpoints, job.config.trainer.keep_checkpoints)
        LOG.info("checkpoint %s", folder.name)
    job.mesh.barrier()


def save_frozen(job: Job) -> None:
    """Write the frozen roles once, so that a run directory is all that sampling and export need. All ranks call it."""
    own = getattr(job.objective, "own_models", {})  # what the objective loads for itself is no part of a result
    for role, model in job.models.items():
        if role not in (*job.trained_roles, *own):
            tensors = whole_weights(job, role)
            if job.mesh.is_main:
                _write_once(model, job.run.path / "frozen" / role, partial(models.save, tensors=tensors))
    job.mesh.barrier()


def save_bases(run: RunDirectory, built: Mapping[str, nn.Module], mesh: Mesh) -> None:
    """Write once what adapters are added to, since checkpoints hold the adapters only; before the engines are made, which may
    shard it.
    """
    for role, model in built.items():
        if models.lora_spec(model) is not None and mesh.is_main:
            _write_once(model, run.path / "base" / role, models.save_base)
    mesh.barrier()


def _write_once(model: nn.Module, folder: Path, write: Callable[[nn.Module, Path], object]) -> None:
    if not folder.exists():
        # Aside and renamed: a run that is killed here must not keep half a model.
        aside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        write(model, aside)
        os.replace(aside, folder)


def load_weights(folder: Path, built: Mapping[str, nn.Module], trained: tuple[str, ...]) -> None:
    """Put the checkpoint's weights into freshly built models; before the engines are made, which copy them."""
    for role in trained:
        models.load_weights(built[role], read_tensors(folder, f"models/{role}/model"), folder)
        if has_second_adapter(built[role]):
            load_second_adapter(built[role], read_tensors(folder, f"models/{role}/{REFERENCE}"), str(folder))


def load_state(job: Job, folder: Path) -> PlanState:
    """Put optimizer state and moving averages back, and say where in the data the run stood."""
    state = read_json(folder / "state.json")
    job.loader.plan.check(state["data"])
    position = PlanState.from_json(state["position"])
    for phase, engine in job.engines.items():
        engine.load_optimizer_state(read_tensors(folder, f"optimizer/{phase}"))
    for role, average in job.averages.items():
        average.load(read_tensors(folder, f"ema/{role}/model"), job.mesh.gradient_group)
    return position


def resume_folder(run: RunDirectory) -> Path | None:
    """The checkpoint to go on from, or None for a new run."""
    return newest(checkpoint_folder(run))


def _gather(job: Job, position: PlanState) -> CheckpointFiles:
    tensors: dict[str, Mapping[str, Tensor]] = {}
    values: dict[str, Any] = {
        "state": {"step": position.step, "position": position.to_json(), "data": job.loader.plan.identity},
        "train_config": job.config.model_dump(mode="json"),
    }
    for role in job.trained_roles:
        values[f"models/{role}/model"] = models.describe(job.models[role])
        tensors[f"models/{role}/model"] = whole_weights(job, role)
        if has_second_adapter(job.models[role]):  # with it only the run itself goes on: nothing else reads it
            tensors[f"models/{role}/{REFERENCE}"] = second_adapter_weights(job.models[role])
    for role, average in job.averages.items():
        values[f"ema/{role}/model"] = models.describe(job.models[role])
        # Buffers, and weights that are frozen beside those that train, have no average.
        tensors[f"ema/{role}/model"] = {**tensors[f"models/{role}/model"], **average.whole(job.mesh.gradient_group)}
    for phase, engine in job.engines.items():
        tensors[f"optimizer/{phase}"] = engine.optimizer_state()
    return CheckpointFiles(tensors, values)


@torch.no_grad()
def whole_weights(job: Job, role: str) -> dict[str, Tensor]:
    """The state dict of a role with whole tensors, whatever ZeRO and tensor ranks made of them. All ranks call it."""
    model = job.models[role]
    parameters = dict(model.named_parameters())
    state = {}
    for name, value in models.weights(model).items():
        parameter = parameters.get(name)
        if parameter is not None:
            value = gather_shard(parameter, local_shard(parameter), job.mesh.gradient_group)
        state[name] = value.detach()
    return state
