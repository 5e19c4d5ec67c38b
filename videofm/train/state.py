"""What a checkpoint of a training run holds, gathered from a job and given back to one.

```
models/ROLE/model.{json,safetensors}   ema/ROLE/model   optimizer/PHASE.safetensors
train_config.json (the run's resolved config)   state.json (step, samples seen, position in the data, what order it belongs to)
```
Tensors are whole and named by parameter, so that a checkpoint says nothing of degrees or ZeRO stages. Each is written by one
rank, so that of several ranks there are as many files (`model-00001-of-00004.safetensors` and an index). Frozen roles do not
change: they are written once, to `frozen/ROLE` of the run directory. Of a role that trains adapters only these are in the
checkpoint; what they are added to is in `base/ROLE`, and a second adapter that a preference training compares with lies beside
them, in `models/ROLE/reference.safetensors`.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videofm import models
from videofm.checkpoint.content import Content, StoredTensor, replicated
from videofm.checkpoint.keep import Best, KeepRules, sweep
from videofm.checkpoint.listing import spare_folder
from videofm.checkpoint.peers import Peers
from videofm.checkpoint.record import Facts
from videofm.checkpoint.resume import newest_whole
from videofm.checkpoint.save import read_tensors
from videofm.checkpoint.saver import Saver
from videofm.config.train import TrainerConfig
from videofm.data.plan import PlanState
from videofm.ops.adapters import REFERENCE, has_second_adapter, load_second_adapter, second_adapter_weights
from videofm.parallel.mesh import Mesh
from videofm.run_dir import RunDirectory, code_version, read_json
from videofm.train.build import Job
from videofm.train.optim import bring_shard, gather_shard, local_shard, whole_shape


def checkpoint_folder(run: RunDirectory) -> Path:
    """Where the checkpoints of a run lie."""
    return run.path / "checkpoints"


def places(run: RunDirectory, trainer: TrainerConfig) -> list[Path]:
    """The folders in which checkpoints of a run may lie."""
    spare = spare_folder(run, trainer.spare_checkpoints)
    return [checkpoint_folder(run), *([] if spare is None else [spare])]


def saver(job: Job) -> Saver:
    """What writes the checkpoints of a job, as its config says."""
    trainer, mesh = job.config.trainer, job.mesh
    best = None if trainer.keep_best is None else Best(trainer.keep_best.metric, trainer.keep_best.mode)
    return Saver(
        checkpoint_folder(job.run),
        KeepRules(trainer.keep_checkpoints, trainer.keep_every, best),
        peers_of(mesh),
        spare_folder(job.run, trainer.spare_checkpoints),
        trainer.asynchronous_checkpoints,
        mesh.any_rank,
        lambda: job.heartbeat.beat(),  # looked up when it beats: the job may get another heart
    )


def peers_of(mesh: Mesh) -> Peers:
    """The ranks of a mesh as those that write and check its checkpoints."""
    return Peers(mesh.rank, mesh.world_size, mesh.checkpoint_group)


def save(job: Job, position: PlanState) -> None:
    """Write and commit the checkpoint of the position, and wait for it. All ranks call it."""
    writer = saver(job)
    writer.copy(facts(job, position), content(job, position))
    writer.write()
    writer.wait()


def facts(
    job: Job, position: PlanState, metrics: Mapping[str, float] | None = None, healthy: bool = True, code: str | None = None
) -> Facts:
    """What the marker of a checkpoint says of this moment.

    Args:
        job: of the run.
        position: where it stands.
        metrics: of the last step.
        healthy: whether training went well up to here.
        code: version of videofm; found out unless given, which takes a while.
    """
    degrees = {axis: getattr(job.mesh, f"{axis}_degree") for axis in ("data", "context", "tensor")}
    return Facts(
        step=position.step,
        healthy=healthy,
        code=code or code_version(),
        fingerprint=job.run.fingerprint,
        layout={**degrees, "zero_stage": job.config.parallel.zero_stage},
        num_samples=job.num_samples,
        metrics={name: value if math.isfinite(value) else None for name, value in (metrics or {}).items()},
    )


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
        # Copies: a file that is mapped into memory may be deleted, on another node of a shared file system too.
        tensors = {name: tensor.clone() for name, tensor in read_tensors(folder, f"models/{role}/model").items()}
        models.load_weights(built[role], tensors, folder)
        if has_second_adapter(built[role]):
            load_second_adapter(built[role], read_tensors(folder, f"models/{role}/{REFERENCE}"), str(folder))


def load_state(job: Job, folder: Path) -> PlanState:
    """Put optimizer state and moving averages back, and say where in the data the run stood."""
    state = read_json(folder / "state.json")
    job.loader.plan.check(state["data"])
    position = PlanState.from_json(state["position"])
    job.divergence.skipped = state.get("skipped", [])
    job.num_samples = state.get("num_samples")  # not known of a run that an earlier version began
    for phase, engine in job.engines.items():
        engine.load_optimizer_state(read_tensors(folder, f"optimizer/{phase}"))
    for role, average in job.averages.items():
        average.load(read_tensors(folder, f"ema/{role}/model"), job.mesh.gradient_group)
    return position


def resume_folder(
    run: RunDirectory,
    mesh: Mesh | None = None,
    trainer: TrainerConfig | None = None,
    accept: Callable[[Facts], bool] = lambda facts: True,
) -> Path | None:
    """The checkpoint to go on from, or None for a new run. All ranks call it, before the first save; what killed saves left is
    removed.

    Args:
        run: the run.
        mesh: the ranks that look together; None is this process by itself.
        trainer: says whether there is a spare folder to look at too.
        accept: which checkpoints come into question.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
    """
    found = [checkpoint_folder(run)] if trainer is None else places(run, trainer)
    if mesh is None or mesh.is_main:
        for place in found:
            sweep(place)
    return newest_whole(found, None if mesh is None else peers_of(mesh), accept)


def content(job: Job, position: PlanState) -> Content:
    """What a checkpoint of this moment holds. All ranks call it; nothing is copied or gathered yet."""
    values: dict[str, Any] = {
        "state": {
            "step": position.step,
            "num_samples": job.num_samples,
            "position": position.to_json(),
            "data": job.loader.plan.identity,
            "skipped": job.divergence.skipped,
        },
        "train_config": job.config.model_dump(mode="json"),
    }
    tensors: list[StoredTensor] = []
    for role in job.trained_roles:
        values[f"models/{role}/model"] = models.describe(job.models[role])
        tensors += stored_weights(job, role, f"models/{role}/model")
        if has_second_adapter(job.models[role]):  # with it only the run itself goes on: nothing else reads it
            second = second_adapter_weights(job.models[role])
            tensors += [replicated(f"models/{role}/{REFERENCE}", name, value) for name, value in second.items()]
    for role, average in job.averages.items():
        file = f"ema/{role}/model"
        values[file] = models.describe(job.models[role])
        for weight in stored_weights(job, role, file):
            # Buffers, and weights that are frozen beside those that train, have no average.
            averaged = weight.name in average.shards
            bring = partial(average.bring, weight.name, job.mesh)
            tensors.append(StoredTensor(file, weight.name, weight.shape, torch.float32, bring) if averaged else weight)
    for phase, engine in job.engines.items():
        tensors += engine.stored_state(f"optimizer/{phase}")
    return Content(tensors, values)


def stored_weights(job: Job, role: str, file: str) -> list[StoredTensor]:
    """The state dict of a role, whole, as the tensors of `file` in a checkpoint."""
    model = job.models[role]
    parameters = dict(model.named_parameters())
    found = []
    for name, value in models.weights(model).items():
        parameter = parameters.get(name)
        if parameter is None:
            found.append(replicated(file, name, value.detach()))
            continue
        shard = local_shard(parameter)
        found.append(
            StoredTensor(file, name, whole_shape(parameter), shard.dtype, partial(bring_shard, parameter, shard, job.mesh))
        )
    return found


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
