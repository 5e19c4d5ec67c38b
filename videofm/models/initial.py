"""A model that starts from weights that are there: those of a run, of a folder of diffusers or of an original single file.

Strict: every tensor of the model comes from there and none is left over, and the two configs agree. `models.load` gives
whatever a path holds; this gives the model that was asked for, in float32 for training, or says why it cannot.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from videofm.errors import CheckpointError
from videofm.models.catalog import config as make_config
from videofm.models.catalog import model_spec
from videofm.models.injection import inject_features, injection_spec
from videofm.models.io import load, load_weights, read_json, weights

_WHEREABOUTS = ("path", "tokenizer_path")
"""Fields of a config that say where files lie; the file may have others."""


@dataclass(frozen=True)
class Initial:
    """`model`, filled from `source`; the counts are of its tensors, all of which matched. `dtype` is that of the file."""

    model: nn.Module
    source: str
    num_tensors: int
    num_parameters: int
    dtype: str

    def report(self) -> str:
        """One line about what matched."""
        return (
            f"{self.model.spec_name} starts from {self.source}: all {self.num_tensors:,} tensors matched by name and shape, "
            f"none left over; {self.num_parameters:,} parameters, {self.dtype} there"
        )


def initial(
    name: str,
    path: str | Path,
    size: str | None = None,
    role: str | None = None,
    component: str | None = None,
    **overrides: Any,
) -> Initial:
    """The model `name` with the weights of `path`, in float32, in eval mode.

    Args:
        name: of the model.
        path: whatever `models.load` reads.
        size: the file must be of this size; None takes the config of the file.
        role: which model of a run, as in `models.load`.
        component: which model of a pipeline folder or single file; None finds the one of this class.
        overrides: fields of the model's config that replace those of the file (and of `size`).

    Raises:
        CheckpointError: `path` holds no such model, or one of another config; every tensor and field that differs is named.
        ConfigError: role, component, size or an override that there is not.
    """
    source = load(path, role=role, component=component or _component(Path(path), name))
    if source.spec_name != name:
        raise CheckpointError(f"{path} holds {source.spec_name}, not {name}: set name to it, or take another file.")
    stored: Any = source.config
    asked = make_config(name, None, **{**dataclasses.asdict(stored), **overrides})
    there = {field: getattr(asked, field) for field in _WHEREABOUTS if hasattr(asked, field)}
    values = asked if size is None else dataclasses.replace(make_config(name, size, **overrides), **there)
    tensors = weights(source)
    dtype = "/".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}))
    with torch.device("meta"):
        model = model_spec(name).build(_without_path(values))
    if (injection := injection_spec(source)) is not None:
        inject_features(model, injection)
    load_weights(model, {key: _float32(tensor) for key, tensor in tensors.items()}, path)
    differing = [
        f"{field.name} {getattr(asked, field.name)!r} there, {getattr(values, field.name)!r} in {size}"
        for field in dataclasses.fields(values)
        if field.name not in _WHEREABOUTS and getattr(asked, field.name) != getattr(values, field.name)
    ]
    if differing:
        raise CheckpointError(
            f"{path} fits the tensors of {name} {size} and not its config: {'; '.join(differing)}. Leave size out to take "
            "the config of the file, or name these fields in overrides."
        )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return Initial(model.eval(), str(path), len(tensors), num_parameters, dtype)


def _component(path: Path, name: str) -> str | None:
    """The part of a pipeline folder or of a single file that is of the class of `name`, or None if that is not one."""
    adapter = model_spec(name).adapter
    if path.is_file():
        return getattr(adapter, "original_component", None)
    if not (path / "model_index.json").is_file():
        return None
    wanted = getattr(adapter, "public_class", None)
    found = [file.parent.name for file in sorted(path.glob("*/config.json")) if _public_class(read_json(file)) == wanted]
    return found[0] if len(found) == 1 else None


def _public_class(config: Any) -> str | None:
    return config.get("_class_name") or config.get("architectures", [None])[0]


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _without_path(values: Any) -> Any:
    # The weights are here: the folder they once came from is not needed.
    return dataclasses.replace(values, path=None) if hasattr(values, "path") else values
