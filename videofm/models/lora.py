"""Low-rank adapters (LoRA, arXiv 2106.09685) on any model: put in by `peft`, stored by themselves, merged where it is used.

A linear layer W gets two thin matrices beside it and computes with `W + alpha / rank * B A`; B starts at zero, so that training
starts from the model as it was. Only A and B train, have a moving average and are in checkpoints. What `models.load` and an
export give is the model with the product added: nothing that reads it needs to know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from videofm.errors import CheckpointError, ConfigError
from videofm.models.catalog import adapter as adapter_of
from videofm.models.spec import KeyMap, list_all_keys, list_keys
from videofm.ops.adapters import LEARNER, is_adapter

PUBLIC_FILE = "pytorch_lora_weights.safetensors"
_BASE = ".base_layer."
_ENDS = {matrix: f".lora_{matrix}.{LEARNER}.weight" for matrix in "AB"}
"""How peft ends the names of the two matrices of a layer."""


@dataclass(frozen=True)
class LoraSpec:
    """What `inject_lora` was given: the rows of A, the scale over them, and patterns of layer names."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @classmethod
    def from_json(cls, value: Mapping[str, Any], source: str | Path) -> LoraSpec:
        """What `dataclasses.asdict` gave, read back.

        Raises:
            CheckpointError: other fields than those of a spec.
        """
        if set(value) != {"rank", "alpha", "targets"}:
            raise CheckpointError(f"{source} must describe adapters by rank, alpha and targets, not by {', '.join(value)}.")
        return cls(value["rank"], value["alpha"], tuple(value["targets"]))

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank


def inject_lora(model: nn.Module, rank: int, alpha: float | None = None, targets: Sequence[str] = ("*attention.*",)) -> None:
    """Put adapters beside linear layers of `model`, in place, and freeze everything else; A is drawn from torch's generator.

    Args:
        model: gets the attribute `lora`.
        rank: rows of A.
        alpha: scale over the rank; None takes `rank`.
        targets: patterns (fnmatch) of the names of linear layers.

    Raises:
        ConfigError: a pattern matches no linear layer, or peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError("LoRA needs peft, which is not installed: pip install -c constraints.txt -e '.[lora]'.") from error
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for pattern in targets:
        if not any(fnmatch(name, pattern) for name in linear):
            raise ConfigError(
                f"lora.targets: {pattern!r} matches no linear layer of {_name(model)}. There are: {list_all_keys(linear)}."
            )
    spec = LoraSpec(rank, float(alpha or rank), tuple(targets))
    chosen = [name for name in linear if any(fnmatch(name, pattern) for pattern in targets)]
    config = peft.LoraConfig(r=rank, lora_alpha=spec.alpha, target_modules=chosen, lora_dropout=0.0, bias="none")  # type: ignore[arg-type]
    peft.inject_adapter_in_model(config, model, adapter_name=LEARNER)
    model.lora = spec  # type: ignore[assignment]
    freeze_all_but_lora(model)


def lora_spec(model: nn.Module) -> LoraSpec | None:
    """What `inject_lora` was given, or None for a model without adapters."""
    return getattr(model, "lora", None)


def freeze_all_but_lora(model: nn.Module) -> None:
    """Let gradients reach the adapters only; a model without adapters stays as it is."""
    if lora_spec(model) is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_lora(name))


def is_lora(key: str) -> bool:
    """Whether a tensor of this name is one of the adapters that train; a second one beside them (`ops.adapters`) is not."""
    return key.endswith(tuple(_ENDS.values()))


def without_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model with adapters without any of them, under the names that it had before."""
    return {key.replace(_BASE, "."): tensor for key, tensor in state.items() if not is_adapter(key)}


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """`model`, in place, with the adapters added to its weights and gone; a model without adapters stays as it is."""
    spec = lora_spec(model)
    if spec is None:
        return model
    tensors = {key: tensor for key, tensor in model.state_dict().items() if is_lora(key)}
    for name, module in list(model.named_modules()):
        if isinstance(base := getattr(module, "base_layer", None), nn.Linear):
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, base)
    del model.lora
    add_lora(model, tensors, spec, "the adapters")
    return model


@torch.no_grad()
def add_lora(model: nn.Module, tensors: Mapping[str, Tensor], spec: LoraSpec, source: str | Path) -> None:
    """Add the product of each pair of `tensors` to the weight of its layer; computed in float32.

    Raises:
        CheckpointError: tensors that are no pairs, or that do not fit a layer of the model.
    """
    parameters = dict(model.named_parameters())
    for layer, (a, b) in _pairs(tensors, source).items():
        weight = parameters.get(f"{layer}.weight")
        if weight is None or weight.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            there = "no such layer" if weight is None else f"its weight is {tuple(weight.shape)}"
            raise CheckpointError(
                f"{source} has matrices {tuple(b.shape)} and {tuple(a.shape)} for {layer} of {_name(model)}: {there}."
            )
        weight.data = (weight.float() + spec.scale * (b.float() @ a.float())).to(weight.dtype)


def save_public_lora(
    name: str, tensors: Mapping[str, Tensor], spec: LoraSpec, folder: str | Path, dtype: torch.dtype = torch.float32
) -> Path:
    """Write adapters in the format of diffusers: `PIPELINE.load_lora_weights(folder)` reads them.

    B carries the scale, so that a reader that takes alpha for the rank, as is usual, needs no other file.

    Args:
        name: of the model that they belong to.
        tensors: the adapters' part of its state dict.
        spec: what they were made with.
        folder: created.
        dtype: of the stored matrices.

    Returns:
        The file.

    Raises:
        ConfigError: the public layout of this model splits or joins layers, which thin matrices cannot follow.
        CheckpointError: tensors that are no pairs.
    """
    pairs = _pairs(tensors, "the adapter")
    public = {}
    for layer, public_layer in _public_layers(name, list(pairs)).items():
        a, b = pairs[layer]
        for matrix, tensor in (("A", a), ("B", spec.scale * b.float())):
            public[f"transformer.{public_layer}.lora_{matrix}.weight"] = tensor.to(dtype).contiguous()
    file = Path(folder) / PUBLIC_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(public, file, metadata={"format": "pt"})
    return file


def _public_layers(name: str, layers: Sequence[str]) -> dict[str, str]:
    """Our name of each linear layer -> that of diffusers."""
    found: Any = adapter_of(name)
    if not isinstance(found, KeyMap) or getattr(found, "public_class", None) != "LTXVideoTransformer3DModel":
        raise ConfigError(f"diffusers has no place for adapters of {name}: export the merged model.")
    # Each layer by itself: the key map gives one name for one tensor.
    return {layer: next(iter(found.to_public({f"{layer}.weight": torch.empty(0)}))).removesuffix(".weight") for layer in layers}


def _pairs(tensors: Mapping[str, Tensor], source: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (A, B)."""
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        matrix = next((matrix for matrix, end in _ENDS.items() if key.endswith(end)), None)
        if matrix is None:
            unknown.append(key)
        else:
            found.setdefault(key.removesuffix(_ENDS[matrix]), {})[matrix] = tensor
    unknown += [layer for layer, pair in found.items() if len(pair) < 2]
    if unknown:
        raise CheckpointError(f"{source}: {list_keys(unknown)} is no pair of matrices of an adapter.")
    return {layer: (pair["A"], pair["B"]) for layer, pair in found.items()}


def _name(model: nn.Module) -> str:
    return str(getattr(model, "spec_name", type(model).__name__))
