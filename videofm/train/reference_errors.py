"""What an objective wants to know of the models as a run starts with them, measured once and kept in the run directory.

Preference training with a cached reference is what asks for it: the errors of the first policy on every pair, at a few fixed
draws (`types.Precomputed`). Before the first step the ranks share the samples of an epoch, measure, and gather:

```
NAME.safetensors    values (N, num_draws, ...) float32
NAME.json           samples: the id of each of the N; identity: what the numbers depend on; sha256: of the other file
```
The second file is written last: without it there is nothing. A run that goes on reads them, and refuses numbers that were
measured with other weights, draws or data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from videofm.config.base import result_fields
from videofm.config.train import TrainConfig
from videofm.data.draws import PlanState
from videofm.data.plan import DataPlan
from videofm.errors import CheckpointError, Interrupted
from videofm.files import sha256_of, sync
from videofm.progress import LOG
from videofm.run_dir import read_json, write_json
from videofm.train.build import Job
from videofm.train.encoders import tensors_hash
from videofm.train.share import shared_steps
from videofm.types import Objective, Precomputed, lasting_id

_FORMAT = 1


def identity(config: TrainConfig, objective: Objective, plan: DataPlan, built: Mapping[str, nn.Module]) -> dict[str, Any]:
    """All that the numbers of `objective` depend on, as JSON gives it back; empty where it wants none.

    Args:
        config: of the run.
        objective: of the run.
        plan: the order, which names the samples.
        built: the models as the run starts with them: before a checkpoint fills them, and before an engine has them.
    """
    wanted: Precomputed | None = getattr(objective, "precomputed", None)
    if wanted is None:
        return {}
    value = {
        "format": _FORMAT,
        "name": wanted.name,
        "seed": config.seed,
        "precision": config.trainer.precision,
        "objective": result_fields(config.objective),
        "data": plan.identity,
        "weights": {role: tensors_hash(model.state_dict()) for role, model in sorted(built.items())},
    }
    found: dict[str, Any] = json.loads(json.dumps(value))
    return found


def provide(job: Job, start: Mapping[str, Any], resumed: bool) -> None:
    """Give the objective the numbers that it wants: those of the run directory, or measured now. All ranks call it.

    Args:
        job: built, before its next step.
        start: what `identity` gave.
        resumed: the weights are those of a checkpoint, at which nothing can be measured.

    Raises:
        CheckpointError: the numbers in the run directory are damaged or were measured on something else, or they are gone and
            the run is under way.
    """
    wanted: Precomputed | None = getattr(job.objective, "precomputed", None)
    if wanted is None:
        return
    listing = job.run.path / f"{wanted.name}.json"
    there = listing.is_file()
    job.mesh.barrier()  # every rank has looked before one writes
    if not there:
        if resumed:
            raise CheckpointError(
                f"{listing} is missing, and the weights that it was measured with have moved since. Restore it with "
                f"{wanted.name}.safetensors, or start a new run."
            )
        _measure(job, wanted, start)
    wanted.take(_read(listing, start))


def _measure(job: Job, wanted: Precomputed, start: Mapping[str, Any]) -> None:
    """Measure every sample of the first epoch, and let one rank write."""
    engine = next(iter(job.engines.values()))
    LOG.info("before the first step: %s of %s, at %d draws", wanted.name, job.loader.plan.describe(), wanted.num_draws)
    mine: dict[str, Tensor] = {}
    steps: Any = shared_steps(job.loader, PlanState(), job.mesh)
    with closing(steps):
        for step in job.heartbeat.over(steps, f"measuring of {wanted.name}"):
            for batch in step.batches:
                found: Tensor = engine.module.measure(wanted, batch.to(job.mesh.device)).float()
                mine |= dict(zip(map(lasting_id, batch.sample_ids[: len(found)]), found, strict=True))
            if step.after.step % job.config.trainer.log_every == 0:
                LOG.info("%s: %d samples of this rank measured", wanted.name, len(mine))
            if job.mesh.any_rank(job.run.stop_requested):
                raise Interrupted(f"stopped on request while {wanted.name} were measured; the same command measures them anew")
            if step.after.epoch > 0 and all(clip.epoch > 0 for clip in step.after.carry):
                break  # every sample of epoch 0 was read
    values = job.mesh.gather(torch.stack(list(mine.values())))
    text = "".join(f"{json.dumps(name)}\n" for name in mine)
    names = bytes(job.mesh.gather(_as_tensor(text, job.mesh.device)).cpu().tolist()).decode().splitlines()
    table = dict(zip(map(json.loads, names), values.cpu(), strict=True))  # what a step of two epochs had twice, once
    if job.mesh.is_main:
        _write(job.run.path / f"{wanted.name}.json", table, start)
        LOG.info("measured %s of %d samples", wanted.name, len(table))
    job.mesh.barrier()


def _write(listing: Path, table: Mapping[str, Tensor], start: Mapping[str, Any]) -> None:
    file, names = listing.with_suffix(".safetensors"), sorted(table)
    aside = file.with_name(f".{file.name}.tmp")
    save_file({"values": torch.stack([table[name] for name in names]).contiguous()}, aside)
    sync(aside)
    os.replace(aside, file)
    write_json(listing, {"identity": dict(start), "samples": names, "sha256": sha256_of(file)})


def _read(listing: Path, start: Mapping[str, Any]) -> dict[str, Tensor]:
    """The numbers by sample.

    Raises:
        CheckpointError: see `provide`.
    """
    file, told = listing.with_suffix(".safetensors"), read_json(listing)
    if told["identity"] != start:
        before, now = told["identity"], start
        differ = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        raise CheckpointError(
            f"{listing} was measured on something else than this run starts from: they differ in {', '.join(differ)}. Restore "
            "the weights, the preferences and the config that the run was started with, or start a new run."
        )
    if not file.is_file() or sha256_of(file) != told["sha256"]:
        raise CheckpointError(
            f"{file} is missing or damaged: its SHA-256 is not the one that {listing.name} names. Restore both, or, where no "
            "checkpoint was written yet, remove both to have them measured again."
        )
    return dict(zip(told["samples"], load_file(file)["values"], strict=True))


def _as_tensor(text: str, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(device)
