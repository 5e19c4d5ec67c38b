"""Write the folder that `diffusers.LTXPipeline.from_pretrained` loads (spec C.6). diffusers itself is not needed to write it.

```
model_index.json  scheduler/scheduler_config.json  tokenizer/*  text_encoder/{config.json, model.safetensors}
transformer/{config.json, diffusion_pytorch_model.safetensors}  vae/{config.json, diffusion_pytorch_model.safetensors}
```
Weights are safetensors only. No file carries a path of this machine. The folder is written aside and renamed when complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from videofm import models
from videofm.errors import ConfigError
from videofm.export.replace import replacing
from videofm.run_dir import write_json

Dtype = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PIPELINE, _SCHEDULER = "LTXPipeline", "FlowMatchEulerDiscreteScheduler"
_TRANSFORMER, _VAE, _TEXT_ENCODER = "LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo", "T5EncoderModel"


def write_diffusers_folder(
    output: str | Path,
    *,
    dit: nn.Module,
    vae: nn.Module,
    text_encoder: nn.Module,
    scheduler_config: Mapping[str, Any],
    dtype: Dtype = "fp32",
) -> Path:
    """Write the three models, the tokenizer and the scheduler to `output`, replacing an older export there as a whole.

    Args:
        output: the folder.
        dit, vae: models whose public class is that of LTX-Video.
        text_encoder: of the public class T5EncoderModel, with a `.tokenizer` of transformers.
        scheduler_config: fields of FlowMatchEulerDiscreteScheduler (`sampling.Schedule.public_config`).
        dtype: of the stored weights.

    Returns:
        `output`.

    Raises:
        ConfigError: a model that LTXPipeline cannot hold, or `output` is something else than an older export.
    """
    with replacing(output, "model_index.json") as folder:
        write_model(folder / "transformer", dit, dtype, _TRANSFORMER)
        write_model(folder / "vae", vae, dtype, _VAE)
        write_model(folder / "text_encoder", text_encoder, dtype, _TEXT_ENCODER)
        _write_tokenizer(folder / "tokenizer", text_encoder.tokenizer)
        _write_config(folder / "scheduler" / "scheduler_config.json", {"_class_name": _SCHEDULER} | dict(scheduler_config))
        _write_config(folder / "model_index.json", _model_index(text_encoder))
    return Path(output)


def _model_index(text_encoder: nn.Module) -> dict[str, Any]:
    # Component -> [library, class], as diffusers names them.
    return {
        "_class_name": _PIPELINE,
        "scheduler": ["diffusers", _SCHEDULER],
        "text_encoder": ["transformers", _TEXT_ENCODER],
        "tokenizer": ["transformers", type(text_encoder.tokenizer).__name__],
        "transformer": ["diffusers", _TRANSFORMER],
        "vae": ["diffusers", _VAE],
    }


def write_model(folder: Path, model: nn.Module, dtype: Dtype, wanted_class: str | None = None) -> None:
    """Write `config.json` and the weights of `model`, in its public layout, into `folder`.

    Raises:
        ConfigError: its public class is not the one that the pipeline wants there, or it has an injection.
    """
    models.refuse_injection(model, "diffusers")
    adapter = models.adapter(model.spec_name)
    config = adapter.public_config(model.config)
    # diffusers names the class in `_class_name`, transformers in `architectures`.
    of_transformers = "architectures" in config
    found = config["architectures"][0] if of_transformers else config.get("_class_name")
    if wanted_class not in (None, found):
        raise ConfigError(
            f"{model.spec_name} is of the public class {found}, and {_PIPELINE} needs {wanted_class} as its {folder.name}: "
            "export a run whose models are dit/ltx, vae/ltx and text/t5."
        )
    if of_transformers:
        # What to compute in unless told otherwise: that of the other models, lest a plain `from_pretrained` mixes two types.
        config |= {"dtype": "float32"}
    _write_config(folder / "config.json", config, diffusers=not of_transformers)
    name = "model.safetensors" if of_transformers else "diffusion_pytorch_model.safetensors"
    write_tensors(folder / name, adapter.to_public(models.weights(model)), dtype)


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(str(folder))
    for path in folder.glob("*.json"):
        value = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, _without_paths(value))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: Dtype, metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors`, floats of them as `dtype`, with `metadata` beside the mark of PyTorch that readers ask for."""
    stored = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu", DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype)
        stored[name] = tensor.clone(memory_format=torch.contiguous_format)  # views that share memory cannot be stored
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(stored, path, metadata={"format": "pt", **(metadata or {})})


def _write_config(path: Path, config: Mapping[str, Any], diffusers: bool = True) -> None:
    value = _without_paths(dict(config))
    if diffusers:
        value |= _diffusers_version()
    write_json(path, value)


def _without_paths(config: dict[str, Any]) -> dict[str, Any]:
    # transformers notes where a model came from; that is a path of this machine.
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "name_or_path")}


def _diffusers_version() -> dict[str, str]:
    try:
        return {"_diffusers_version": metadata.version("diffusers")}
    except metadata.PackageNotFoundError:
        return {}  # a note for readers of the file; loading does not need it
