"""Models on disk: our folder (`model.json` + `model.safetensors`), diffusers folders, the single files of authors, and the
checkpoints of a run. Weights may lie in shards beside an index (`stored.weight_files`).

RUN/checkpoints/step_00000200/  COMMITTED.json  models/ROLE/{model.json, model.safetensors}  ema/ROLE/model.safetensors
RUN/base/ROLE/{model.json, model.safetensors}  of a role that trains adapters: what they are added to
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from videofm.errors import CheckpointError, ConfigError
from videofm.models.catalog import config as make_config
from videofm.models.catalog import model_spec, names
from videofm.models.injection import InjectionSpec, inject_features, injection_spec, refuse_injection
from videofm.models.lora import LoraSpec, add_lora, is_lora, lora_spec, save_public_lora, without_lora
from videofm.models.spec import STATISTICS, list_all_keys, list_keys
from videofm.models.stored import damaged, parse_json, read_json, read_weights, weight_files
from videofm.types import ModelSpec

DESCRIPTION, WEIGHTS, COMMITTED = "model.json", "model.safetensors", "COMMITTED.json"
CRITIC = "discriminator"
"""The role that exists for the training of another only."""
PUBLIC_WEIGHTS = ("diffusion_pytorch_model.safetensors", WEIGHTS)
_MISSING_STATISTICS = (
    " latents_mean and latents_std are the latent statistics, without which no diffusion model fits these latents: take a "
    "complete checkpoint, or measure them."
)


def describe(model: nn.Module) -> dict[str, Any]:
    """Name and config of a model, as JSON holds them, and what adapters and injection were made with: all of `model.json`."""
    specs = {"lora": lora_spec(model), "injection": injection_spec(model)}
    added = {key: dataclasses.asdict(spec) for key, spec in specs.items() if spec is not None}
    return {"name": model.spec_name, "config": dataclasses.asdict(model.config), **added}  # type: ignore[call-overload]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict to store: contiguous, a tensor with two names only under the first, and of a model with adapters those
    only.
    """
    return {key: tensor.contiguous() for key, tensor in _stored(model).items()}


def save(model: nn.Module, folder: str | Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
    """Write `model.json` and `model.safetensors` into `folder`, which is created; returns it.

    `tensors` is what `weights(model)` would be with whole tensors, for a model that holds shares of them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).write_text(json.dumps(describe(model), indent=2) + "\n")
    save_file(weights(model) if tensors is None else dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def save_base(model: nn.Module, folder: str | Path) -> Path:
    """Write a model with adapters as `save` does, but without them; returns `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = {key: value for key, value in describe(model).items() if key != "lora"}
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n")
    aliases = _aliases(model)
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items() if key not in aliases}
    save_file(without_lora(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def save_adapter(
    path: str | Path, folder: str | Path, role: str | None = None, ema: bool = True, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the adapters of a run or checkpoint, as `dtype`, in the format of diffusers into `folder`; returns the file.

    Raises:
        CheckpointError: the role trained no adapters.
        ConfigError: diffusers has no place for adapters of this model, or for its injection, or the role is missing or unknown.
    """
    stored, file = _trained(Path(path), role, ema)
    described = read_json(stored / DESCRIPTION)
    if "lora" not in described:
        raise CheckpointError(f"{stored} holds a whole model and no adapters: it was trained without models.ROLE.lora.")
    refuse_injection(described, "diffusers")
    spec = LoraSpec.from_json(described["lora"], stored / DESCRIPTION)
    return save_public_lora(described["name"], read_weights(file, "cpu"), spec, folder, dtype)


def save_public(model: nn.Module, folder: str | Path) -> Path:
    """Write `config.json` and safetensors in the public layout of `model` into `folder`, which is created; returns it.

    What a public layout has no place for, as latent statistics that its `config.json` does not name, is not in the folder.

    Raises:
        ConfigError: the model has an injection, without which it is another.
    """
    refuse_injection(model, "the public layout")
    folder, adapter = Path(folder), model_spec(model.spec_name).adapter  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    config = adapter.public_config(model.config)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {key: tensor.contiguous() for key, tensor in adapter.to_public(weights(model)).items()}
    of_transformers = "architectures" in config
    save_file(tensors, folder / (WEIGHTS if of_transformers else PUBLIC_WEIGHTS[0]), metadata={"format": "pt"})
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
            diffusers or transformers, a pipeline folder of diffusers with `component`, or an original single file
            (`.safetensors`), with `component` where it holds more than one model.
        role: which model of a run or checkpoint; may be left out when there is one that it trained, a `discriminator`
            apart. A role that the run only used (the VAE of a DiT) lies in `frozen/ROLE` of the run.
        ema: read the averaged weights of a checkpoint where it has them.
        component: which model of a pipeline folder or of a single file, such as `"vae"` or `"transformer"`.
        device: where the weights go.

    Raises:
        CheckpointError: nothing there that can be loaded, or files that do not fit the model.
        ConfigError: role or component missing or unknown.
    """
    path = Path(path)
    if path.is_file():
        return _load_single_file(path, component, device)
    if (path / DESCRIPTION).is_file():
        return _load_ours(path, path / WEIGHTS, device)
    if (path / "model_index.json").is_file():
        return _load_public(_pick(path, component, "component", _components(path)), device)
    if (path / "config.json").is_file():
        return _load_public(path, device)
    frozen = _frozen(path, role)
    if frozen is not None:
        return _load_ours(frozen, frozen / WEIGHTS, device)
    if (path / "checkpoints").is_dir() or (path / COMMITTED).is_file():
        folder, weights_file = _trained(path, role, ema)
        return _load_ours(folder, weights_file, device)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    raise CheckpointError(
        f"{path} holds no model: expected {DESCRIPTION} (ours), config.json or model_index.json (diffusers), checkpoints/ "
        f"(a run), or {COMMITTED} (a checkpoint that was saved to its end)."
    )


def trained_roles(path: str | Path) -> list[str]:
    """The roles that a run or checkpoint trained; none for any other folder."""
    path = Path(path)
    if (path / "checkpoints").is_dir():
        path = newest_checkpoint(path)
    return sorted(entry.parent.name for entry in path.glob(f"models/*/{DESCRIPTION}"))


def _trained(path: Path, role: str | None, ema: bool) -> tuple[Path, Path]:
    """The folder of a role that a run or checkpoint trained, and the file of its weights: averaged if asked for and there."""
    if (path / "checkpoints").is_dir():
        path = newest_checkpoint(path)
    there = trained_roles(path)
    folder = _pick(path / "models", role, "role", there if role else [name for name in there if name != CRITIC] or there)
    averaged = path / "ema" / folder.name / WEIGHTS
    return folder, averaged if ema and weight_files(averaged) else folder / WEIGHTS


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
        CheckpointError: missing or unexpected keys, or other shapes; all are listed, `source` is named, and the size that
            the tensors look like, where the model's adapter can tell.
    """
    aliases, expected = _aliases(model), _stored(model)
    given = {key: tensor for key, tensor in tensors.items() if key not in aliases}
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    shapes = {
        key: f" {tuple(given[key].shape)} for {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in given and given[key].shape != tensor.shape
    }
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": list(shapes)}
    found = [f"{len(keys)} {what}: {list_all_keys(keys, shapes)}" for what, keys in problems.items() if keys]
    if found:
        raise CheckpointError(
            f"{source} does not fit {_name(model)}. {_guess(model, expected, given)}Tensors {'; '.join(found)}."
            f"{_MISSING_STATISTICS if set(missing) & set(STATISTICS) else ''}"
        )
    model.load_state_dict(given, strict=False, assign=True)
    for alias, key in aliases.items():  # a tensor with two names stays one tensor
        owner, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter(key))


def _guess(model: nn.Module, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """A sentence that says of which other size `given` is, or nothing."""
    name = getattr(model, "spec_name", "")
    looks_like = getattr(model_spec(name).adapter, "looks_like", None) if name in names() else None
    found, wanted = (looks_like(given), looks_like(expected)) if looks_like else (None, None)
    if found is None or found == wanted:
        return ""
    return f"These tensors look like {name} {found}, not {wanted or 'this config of it'}. "


def _load_ours(folder: Path, file: Path, device: str | torch.device) -> nn.Module:
    described = read_json(folder / DESCRIPTION)
    if not isinstance(described, dict) or set(described) - {"lora", "injection"} != {"name", "config"}:
        raise CheckpointError(f"{folder / DESCRIPTION} must hold 'name' and 'config'.")
    tensors = read_weights(file, device)
    if "lora" in described:
        base = base_folder(folder)
        if not (base / DESCRIPTION).is_file():
            raise CheckpointError(f"{folder} holds adapters, and what they are added to is not in {base}: keep the run whole.")
        model = _load_ours(base, base / WEIGHTS, device)
        add_lora(model, tensors, LoraSpec.from_json(described["lora"], folder / DESCRIPTION), file)
        return model
    values = make_config(described["name"], None, **described["config"])
    spec = InjectionSpec.from_json(described["injection"], folder / DESCRIPTION) if "injection" in described else None
    return _load(model_spec(described["name"]), values, tensors, file, spec)


def base_folder(folder: Path) -> Path:
    """Where the run of `RUN/checkpoints/STEP/models/ROLE` keeps the model that the adapters of the role are added to."""
    return folder.resolve().parents[3] / "base" / folder.name


def _load_public(folder: Path, device: str | torch.device) -> nn.Module:
    public = read_json(folder / "config.json")
    parts = _spec_of_class(public.get("_class_name") or public.get("architectures", [None])[0], folder)
    values = parts.adapter.config_from_public(public)
    if hasattr(values, "tokenizer_path") and (folder.parent / "tokenizer").is_dir():
        values = dataclasses.replace(values, tokenizer_path=str(folder.parent / "tokenizer"))
    tensors = {}
    for file in public_files(folder):
        tensors.update(read_weights(file, device))
    model = _load(parts, values, _translate(parts.adapter.from_public, tensors, folder), folder)
    if shift := getattr(values, "shift_factor", 0.0):
        model.get_buffer("latents_mean").fill_(shift)  # public layouts keep the mean of latents in config.json
    return model


def _load_single_file(file: Path, component: str | None, device: str | torch.device) -> nn.Module:
    """A model out of an original single file: known by its tensors, with the config of its metadata or of a release."""
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is no .safetensors file. Nothing else is read (a pickle can run code): convert it.")
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            there = list(opened.keys())
            parts, keys = _part_of(file, there, component)
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise damaged(file, error) from error
    adapter: Any = parts.adapter
    ours = _translate(adapter.from_original, tensors, file)
    if "config" in metadata:
        values = adapter.config_from_original(parse_json(metadata["config"], f"the config in the metadata of {file}"))
        return _load(parts, values, ours, file)
    size = adapter.looks_like(ours)
    if size is None:
        raise CheckpointError(
            f"{file} has no config in its metadata, and its tensors are of no size of {parts.name} "
            f"({', '.join(parts.sizes)}): write the config of the authors there, as JSON under the key 'config'."
        )
    return _load(parts, parts.sizes[size], ours, file)


def _part_of(file: Path, there: Sequence[str], component: str | None) -> tuple[ModelSpec, list[str]]:
    """The model of a single file that is asked for, and the names of its tensors there."""
    found: dict[str, tuple[ModelSpec, list[str]]] = {}
    for parts in map(model_spec, names()):
        adapter: Any = parts.adapter
        keys = adapter.original_keys(there) if hasattr(adapter, "original_keys") else []
        if keys:
            found[adapter.original_component] = (parts, keys)
    if not found:
        beside = [name for name in (DESCRIPTION, "config.json") if (file.parent / name).is_file()]
        hint = f" It lies beside a {beside[0]}: pass the folder." if beside else ""
        raise CheckpointError(
            f"{file} is no original single file of a model here; its first tensors: {list_keys(there)}.{hint}"
        )
    num_others = len(there) - sum(len(keys) for _, keys in found.values())
    if component is None and (len(found) > 1 or num_others):
        raise ConfigError(
            f"{file} holds more than one model; say which component: {', '.join(found)} ({num_others} tensors are of none)."
        )
    if component is not None and component not in found:
        raise ConfigError(f"{file} has no component {component!r} that is read here. There are: {', '.join(found)}.")
    return found[component or next(iter(found))]


def _translate(
    translate: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], tensors: Mapping[str, Tensor], source: Path
) -> dict[str, Tensor]:
    try:
        return translate(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _load(parts: ModelSpec, values: Any, tensors: Mapping[str, Tensor], source: Path, spec: Any = None) -> nn.Module:
    if hasattr(values, "path"):
        values = dataclasses.replace(values, path=None)  # the weights are here: the folder they once came from is not needed
    with torch.device("meta"):
        model = parts.build(values)
    if spec is not None:
        inject_features(model, spec)
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


def public_files(folder: Path) -> list[Path]:
    """The safetensors files of a component folder of diffusers or transformers, whole or in shards.

    Raises:
        CheckpointError: there are none; pickles are not read.
    """
    for name in PUBLIC_WEIGHTS:
        if found := weight_files(folder / name):
            return found
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    hint = f" It has {pickled[0]}, a pickle, which is not read: convert it to safetensors once." if pickled else ""
    raise CheckpointError(f"{folder} has no {' or '.join(PUBLIC_WEIGHTS)} (nor an index of shards).{hint}")


def _stored(model: nn.Module) -> dict[str, Tensor]:
    aliases, all_ = _aliases(model), lora_spec(model) is None
    return {key: tensor for key, tensor in model.state_dict().items() if key not in aliases and (all_ or is_lora(key))}


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
