"""Models on disk: our folder (`model.json` + `model.safetensors`), diffusers folders, and the checkpoints of a run.

RUN/checkpoints/step_00000200/  COMMITTED.json  models/ROLE/{model.json, model.safetensors}  ema/ROLE/model.safetensors
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from videofm.errors import CheckpointError, ConfigError
from videofm.models.catalog import config as make_config
from videofm.models.catalog import model_spec, names
from videofm.models.spec import list_keys
from videofm.types import ModelSpec

DESCRIPTION, WEIGHTS, COMMITTED = "model.json", "model.safetensors", "COMMITTED.json"
PUBLIC_WEIGHTS = ("diffusion_pytorch_model.safetensors", WEIGHTS)


def describe(model: nn.Module) -> dict[str, Any]:
    """Name and config of a model, as JSON holds them; what `model.json` contains."""
    return {"name": model.spec_name, "config": dataclasses.asdict(model.config)}  # type: ignore[call-overload]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict to store: contiguous, and a tensor with two names only under the first."""
    aliases = _aliases(model)
    return {key: tensor.contiguous() for key, tensor in model.state_dict().items() if key not in aliases}


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write `model.json` and `model.safetensors` into `folder`, which is created; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).write_text(json.dumps(describe(model), indent=2) + "\n")
    save_file(weights(model), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def load(
    path: str | Path,
    role: str | None = None,
    ema: bool = True,
    component: str | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """A model from disk, in eval mode, in the dtype of the file.

    Args:
        path: a run (its newest complete checkpoint is read), a checkpoint, a folder written by `save`, a component folder of
            diffusers or transformers, or a pipeline folder of diffusers with `component`.
        role: which model of a run or checkpoint; may be left out when there is one that it trained. A role that the run
            only used (the VAE of a DiT) lies in `frozen/ROLE` of the run.
        ema: read the averaged weights of a checkpoint where it has them.
        component: which model of a pipeline folder, such as `"vae"` or `"transformer"`.
        device: where the weights go.

    Raises:
        CheckpointError: nothing there that can be loaded, or files that do not fit the model.
        ConfigError: role or component missing or unknown.
    """
    path = Path(path)
    if (path / DESCRIPTION).is_file():
        return _load_ours(path, path / WEIGHTS, device)
    if (path / "model_index.json").is_file():
        return _load_public(_pick(path, component, "component", _components(path)), device)
    if (path / "config.json").is_file():
        return _load_public(path, device)
    frozen = _frozen(path, role)
    if frozen is not None:
        return _load_ours(frozen, frozen / WEIGHTS, device)
    if (path / "checkpoints").is_dir():
        path = newest_checkpoint(path)
    if (path / COMMITTED).is_file():
        folder = _pick(
            path / "models", role, "role", sorted(entry.parent.name for entry in path.glob(f"models/*/{DESCRIPTION}"))
        )
        averaged = path / "ema" / folder.name / WEIGHTS
        return _load_ours(folder, averaged if ema and averaged.is_file() else folder / WEIGHTS, device)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    raise CheckpointError(
        f"{path} holds no model: expected {DESCRIPTION} (ours), config.json or model_index.json (diffusers), checkpoints/ "
        f"(a run), or {COMMITTED} (a checkpoint that was saved to its end)."
    )


def _frozen(path: Path, role: str | None) -> Path | None:
    """Where the run of `path` (itself a run, or a checkpoint of one) keeps a role that it did not train, or None."""
    run = path.resolve().parents[1] if path.parent.name == "checkpoints" else path
    folder = run / "frozen" / (role or "")
    return folder if role and (folder / DESCRIPTION).is_file() else None


def newest_checkpoint(run: str | Path) -> Path:
    """The complete checkpoint of `run` with the highest step.

    Raises:
        CheckpointError: there is none.
    """
    folders = sorted((Path(run) / "checkpoints").glob("step_*"))
    complete = [folder for folder in folders if (folder / COMMITTED).is_file()]
    if not complete:
        raise CheckpointError(f"{run} has no complete checkpoint ({len(folders)} incomplete).")
    return complete[-1]


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Put `tensors`, in our layout, into `model` (which may be on the meta device) without copying.

    Raises:
        CheckpointError: missing or unexpected keys, or other shapes; up to five of each are listed, `source` is named.
    """
    aliases = _aliases(model)
    expected = {key: tensor for key, tensor in model.state_dict().items() if key not in aliases}
    given = {key: tensor for key, tensor in tensors.items() if key not in aliases}
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    shapes = [
        f"{key} {tuple(given[key].shape)} for {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in given and given[key].shape != tensor.shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    found = [f"{len(keys)} {what}: {list_keys(keys)}" for what, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f"{source} does not fit {_name(model)}. Tensors {'; '.join(found)}.")
    model.load_state_dict(given, strict=False, assign=True)
    for alias, key in aliases.items():  # a tensor with two names stays one tensor
        owner, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter(key))


def _load_ours(folder: Path, file: Path, device: str | torch.device) -> nn.Module:
    described = read_json(folder / DESCRIPTION)
    if not isinstance(described, dict) or set(described) != {"name", "config"}:
        raise CheckpointError(f"{folder / DESCRIPTION} must hold 'name' and 'config'.")
    values = make_config(described["name"], None, **described["config"])
    return _load(model_spec(described["name"]), values, _read_weights(file, device), file)


def _load_public(folder: Path, device: str | torch.device) -> nn.Module:
    public = read_json(folder / "config.json")
    parts = _spec_of_class(public.get("_class_name") or public.get("architectures", [None])[0], folder)
    values = parts.adapter.config_from_public(public)
    if hasattr(values, "tokenizer_path") and (folder.parent / "tokenizer").is_dir():
        values = dataclasses.replace(values, tokenizer_path=str(folder.parent / "tokenizer"))
    tensors = {}
    for file in _public_files(folder):
        tensors.update(_read_weights(file, device))
    try:
        ours = parts.adapter.from_public(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return _load(parts, values, ours, folder)


def _load(parts: ModelSpec, values: Any, tensors: Mapping[str, Tensor], source: Path) -> nn.Module:
    if hasattr(values, "path"):
        values = dataclasses.replace(values, path=None)  # the weights are here: the folder they once came from is not needed
    with torch.device("meta"):
        model = parts.build(values)
    load_weights(model, tensors, source)
    return model.eval()


def _spec_of_class(class_name: str | None, folder: Path) -> ModelSpec:
    for name in names():
        if getattr(model_spec(name).adapter, "public_class", None) == class_name:
            return model_spec(name)
    raise CheckpointError(f"{folder / 'config.json'} is of class {class_name!r}, which no model here reads.")


def _components(pipeline: Path) -> list[str]:
    return sorted(entry.parent.name for entry in pipeline.glob("*/config.json"))


def _pick(parent: Path, wanted: str | None, what: str, there: list[str]) -> Path:
    if wanted is None and len(there) == 1:
        return parent / there[0]
    if wanted is None:
        raise ConfigError(f"{parent} holds {len(there)} models; say which {what}: {', '.join(there)}.")
    if wanted not in there:
        raise ConfigError(f"{parent} has no {what} {wanted!r}. There are: {', '.join(there)}.")
    return parent / wanted


def _public_files(folder: Path) -> list[Path]:
    for name in PUBLIC_WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [folder / file for file in sorted(set(read_json(index)["weight_map"].values()))]
    raise CheckpointError(f"{folder} has no {' or '.join(PUBLIC_WEIGHTS)} (nor an index of shards).")


def _read_weights(file: Path, device: str | torch.device) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist.")
    try:
        return load_file(file, device=str(device))
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged: {error}.") from error


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: it is not JSON.
    """
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is damaged: {error}.") from error


def _aliases(model: nn.Module) -> dict[str, str]:
    """Second names of tied parameters -> the first name."""
    first: dict[int, str] = {}
    aliases = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        owner = first.setdefault(id(tensor), key)
        if owner != key:
            aliases[key] = owner
    return aliases


def _name(model: nn.Module) -> str:
    return str(getattr(model, "spec_name", type(model).__name__))
