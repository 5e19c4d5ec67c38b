"""The weighted average of checkpoints, as a folder that is read like the run of a training.

Models that were fine-tuned on different data, averaged, did better than the moving average of one (Step-Video-T2V, arXiv
2502.10248, on supervised fine-tuning); late checkpoints of one run can be averaged as well. Every tensor is summed in float64
and rounded once, to the dtype that it is stored in. Files are read and written as streams: one tensor is in memory at a time.

    OUT/config.yaml  lineage.json (parents, weights)  frozen/ROLE (of the first parent's run)
    OUT/checkpoints/step_00000200/{COMMITTED.json, train_config.json, models/ROLE/{model.json, model.safetensors}}
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videofm.checkpoint.record import COMMITTED, Facts, FileEntry, Record, file_problem, read_record, step_folder
from videofm.checkpoint.tensors import SUFFIX, TensorFiles
from videofm.checkpoint.writer import write_durably, write_tensors
from videofm.errors import CheckpointError, ConfigError
from videofm.files import sha256_of, sync
from videofm.run_dir import code_version, leaves, now, read_json, write_json

DESCRIPTION, CONFIG = "model.json", "train_config.json"
STATISTICS = ("latents_mean", "latents_std")
"""Buffers of a VAE that were measured on its latents."""


@dataclass(frozen=True)
class Parent:
    """A checkpoint that is averaged, and its share of the sum; shares add up to 1."""

    folder: Path
    share: float
    record: Record

    @property
    def run(self) -> Path:
        """The run that it is of."""
        return self.folder.resolve().parents[1]


@dataclass
class Average:
    """What was made: the folder, the parents, roles, and what a reader should know (`notes`)."""

    folder: Path
    parents: list[Parent]
    roles: list[str]
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values: of lineage.json, and for programs."""
        parents = [
            {
                "checkpoint": str(parent.folder),
                "step": parent.record.facts.step,
                "share": parent.share,
                "fingerprint": parent.record.facts.fingerprint,
                "sha256": sha256_of(parent.folder / COMMITTED),
            }
            for parent in self.parents
        ]
        return {"parents": parents, "roles": self.roles, "notes": self.notes}


def average(folders: Sequence[Path], out: Path, weights: Sequence[float] | None = None, ema: bool = False) -> Average:
    """Write the average of checkpoints to `out`.

    Args:
        folders: two or more checkpoints of one kind of model, each in its run.
        out: folder to write; it must not exist, or be empty.
        weights: positive, one a checkpoint, divided by their sum; all the same by default.
        ema: average the moving averages, where a role has one, in the place of the weights.

    Raises:
        ConfigError: fewer than two checkpoints, weights that do not fit, or `out` is something else already.
        CheckpointError: a checkpoint is damaged, or of another model than the first.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists already: choose another folder, or move it away")
    made = Average(out, _parents(folders, weights), [])
    made.roles = _common_roles(made.parents)
    names = {role: _name(made, role, ema) for role in made.roles}
    _check_files(made.parents, list(names.values()))
    _check_frozen(made)
    _compare_objectives(made)
    aside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _write(made, names, ema, aside)
        out.parent.mkdir(parents=True, exist_ok=True)
        os.replace(aside, out)
        sync(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return made


# -- what may be averaged


def _parents(folders: Sequence[Path], weights: Sequence[float] | None) -> list[Parent]:
    if len({folder.resolve() for folder in folders}) != len(folders) or len(folders) < 2:
        raise ConfigError(
            f"an average takes two or more different checkpoints, not {', '.join(map(str, folders)) or 'none'}: name a run "
            "with --last K or --steps A,B, or several checkpoints"
        )
    given = list(weights) if weights is not None else [1.0] * len(folders)
    if len(given) != len(folders) or not all(weight > 0 and math.isfinite(weight) for weight in given):
        raise ConfigError(
            f"--weights {','.join(f'{weight:g}' for weight in given)}: give {len(folders)} positive numbers, one a checkpoint, "
            "in their order; they are divided by their sum"
        )
    total = math.fsum(given)
    return [Parent(folder, weight / total, read_record(folder)) for folder, weight in zip(folders, given, strict=True)]


def _common_roles(parents: Sequence[Parent]) -> list[str]:
    """The roles that all parents trained, after a look at what models these are."""
    described = [_descriptions(parent.folder) for parent in parents]
    first = described[0]
    if not first:
        raise CheckpointError(f"{parents[0].folder} holds no models/ROLE/{DESCRIPTION}: it is no checkpoint of a training")
    for parent, models in zip(parents[1:], described[1:], strict=True):
        if set(models) != set(first):
            raise CheckpointError(
                f"{parent.folder} trained {', '.join(models) or 'nothing'}, {parents[0].folder} {', '.join(first)}: only "
                "checkpoints of the same models can be averaged"
            )
        for role, model in models.items():
            if different := _different_keys(first[role], model):
                raise CheckpointError(
                    f"{parent.folder} has another model as {role} than {parents[0].folder}: {'; '.join(different)}. Only "
                    "checkpoints of one model, of one size, can be averaged."
                )
    for role, model in first.items():
        if "lora" in model:
            raise CheckpointError(
                f"{role} of {parents[0].folder} are adapters: the average of their factors is not the average of what they "
                "add. Train without models.ROLE.lora to average, or use one of the checkpoints."
            )
    return sorted(first)


def _descriptions(folder: Path) -> dict[str, Any]:
    return {path.parent.name: read_json(path) for path in sorted(folder.glob(f"models/*/{DESCRIPTION}"))}


def _different_keys(one: Any, other: Any) -> list[str]:
    ours, theirs = dict(leaves(one)), dict(leaves(other))
    keys = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    return [f"{key} {theirs.get(key)!r}, not {ours.get(key)!r}" for key in keys]


def _name(made: Average, role: str, ema: bool) -> str:
    """Where the tensors of a role lie in every parent: of its moving average if that is asked for and there is one."""
    weights, averaged = f"models/{role}/model", f"ema/{role}/model"
    has = [any(name.startswith(f"ema/{role}/") for name in parent.record.files) for parent in made.parents]
    if not ema or not any(has):
        if ema:
            made.notes.append(f"{role} has no moving average: its weights were averaged")
        return weights
    if not all(has):
        lacking = made.parents[has.index(False)].folder
        raise CheckpointError(f"{lacking} has no moving average of {role}, others have: leave out --ema, or this checkpoint")
    return averaged


def _check_files(parents: Sequence[Parent], names: Sequence[str]) -> None:
    """Hash what will be read: an average must not take in a damaged tensor."""
    for parent in parents:
        for file, entry in parent.record.files.items():
            used = file.startswith(tuple(f"{name}." for name in names) + tuple(f"{name}-" for name in names))
            if (used or file.endswith(".json")) and (problem := file_problem(parent.folder, file, entry)):
                raise CheckpointError(f"{problem}. `videofm checkpoint verify {parent.folder}` tells what to do.")


def _check_frozen(made: Average) -> None:
    """See that the models that the parents only used are there, and are the same in every run."""
    first = made.parents[0]
    needed = set(_config(first).get("models", {})) - set(made.roles)
    if missing := sorted(role for role in needed if not (first.run / "frozen" / role).is_dir()):
        raise CheckpointError(
            f"{first.folder} was trained with {', '.join(missing)}, which should lie in {first.run / 'frozen'}: give a "
            "checkpoint that is still in its run"
        )
    for parent in made.parents[1:]:
        for role in sorted(needed) if parent.run != first.run else []:
            hashes = [_hashes(run / "frozen" / role) for run in (first.run, parent.run)]
            if hashes[0] != hashes[1]:
                raise CheckpointError(
                    f"{parent.run} was trained with another {role} (frozen/{role}) than {first.run}: what they learned does "
                    "not fit together"
                )


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.glob("*")) if path.is_file()}


def _compare_objectives(made: Average) -> None:
    configs = [_config(parent).get("objective", {}) for parent in made.parents]
    different = sorted({change for config in configs[1:] for change in _different_keys(configs[0], config)})
    if different:
        made.notes.append(f"objectives differ, the config is that of the first checkpoint: {'; '.join(different)}")


def _config(parent: Parent) -> dict[str, Any]:
    path = parent.folder / CONFIG
    found: dict[str, Any] = read_json(path if path.is_file() else parent.run / "config.yaml")
    return found


# -- how it is written


def _write(made: Average, names: Mapping[str, str], ema: bool, aside: Path) -> None:
    first, summary = made.parents[0], made.to_json()
    config, code = _config(first), code_version()
    inputs = {f"checkpoint: {os.path.normpath(parent['checkpoint'])}": parent["sha256"] for parent in summary["parents"]}
    told = {"shares": [parent.share for parent in made.parents], "ema": ema, "inputs": inputs}
    fingerprint = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    step = max(parent.record.facts.step for parent in made.parents)
    facts = Facts(step, all(parent.record.facts.healthy for parent in made.parents), code, fingerprint)
    _write_checkpoint(made, names, step_folder(aside / "checkpoints", step), facts)
    summary = made.to_json()  # again: there may be notes now
    write_json(aside / "config.yaml", config)
    lineage = {"fingerprint": fingerprint, "inputs": inputs, "code": code, "created": now()}
    write_json(aside / "lineage.json", {**lineage, "average": {**summary, "ema": ema}})
    for source in sorted((first.run / "frozen").rglob("*")):
        if source.is_file():
            _link(source, aside / "frozen" / source.relative_to(first.run / "frozen"))
    sync(aside)


def _write_checkpoint(made: Average, names: Mapping[str, str], folder: Path, facts: Facts) -> None:
    """The files, each flushed and hashed on the way, and then the marker that lists them."""
    first = made.parents[0]
    files = {CONFIG: _write_json(folder / CONFIG, _config(first))}
    for role, name in names.items():
        described, weights = f"models/{role}/{DESCRIPTION}", f"models/{role}/model{SUFFIX}"
        files[described] = _write_json(folder / described, read_json(first.folder / described))
        files[weights] = _write_role(made, role, name, folder / weights)
    for inside in sorted({path.parent for path in folder.rglob("*")}, reverse=True):
        sync(inside)
    _write_json(folder / COMMITTED, Record(facts, now(), files).to_json())


def _write_json(path: Path, value: Any) -> FileEntry:
    return write_durably(path, [json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"])


def _write_role(made: Average, role: str, name: str, target: Path) -> FileEntry:
    with ExitStack() as stack:
        files = [stack.enter_context(TensorFiles(parent.folder, name)) for parent in made.parents]
        layouts = [{key: (file.dtype(key), file.shape(key)) for key in file.keys()} for file in files]  # noqa: SIM118
        for parent, layout in zip(made.parents[1:], layouts[1:], strict=True):
            if wrong := sorted(key for key in {*layout, *layouts[0]} if layout.get(key) != layouts[0].get(key)):
                there, wanted = (of.get(wrong[0], "no such tensor") for of in (layout, layouts[0]))
                raise CheckpointError(
                    f"{parent.folder} has other tensors as {role} than {made.parents[0].folder}: {wrong[0]} {there}, not "
                    f"{wanted} ({len(wrong)} in all)"
                )
        return write_tensors(target, layouts[0], lambda key: _mean(key, files, made, role))


def _mean(key: str, files: Sequence[TensorFiles], made: Average, role: str) -> Tensor:
    """The average of one tensor; what is not a floating-point number must be the same everywhere."""
    first = files[0].tensor(key)
    is_statistic = key.rpartition(".")[2] in STATISTICS
    if is_statistic or not first.is_floating_point():
        others = zip(made.parents[1:], files[1:], strict=True)
        different = next((parent for parent, file in others if not torch.equal(file.tensor(key), first)), None)
        if different is None:
            return first
        if not is_statistic:
            raise CheckpointError(
                f"{key} of {role} is {first.dtype} and differs between {made.parents[0].folder} and {different.folder}: whole "
                "numbers have no average"
            )
        return _unmeasured(key, first, made, role)
    dtype, total = first.dtype, first.double().mul_(made.parents[0].share)
    del first  # the sum and one tensor are in memory
    for parent, file in zip(made.parents[1:], files[1:], strict=True):
        total.add_(file.tensor(key), alpha=parent.share)  # adds in float64
    return total.to(dtype)


def _unmeasured(key: str, statistic: Tensor, made: Average, role: str) -> Tensor:
    """What a VAE has before its latents were measured: the averaged encoder makes latents that nobody has measured."""
    note = (
        f"{role} has no latent statistics: those of the checkpoints differ, and the average has latents of its own. Measure "
        "them (an evaluate stage with the metric latent_diagnostics) before a diffusion model is trained on it"
    )
    if note not in made.notes:
        made.notes.append(note)
    return torch.zeros_like(statistic) if key.endswith("mean") else torch.ones_like(statistic)


def _link(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy on another file system; nothing changes a model once it is written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
