"""The adapters of a run by themselves: `pytorch_lora_weights.safetensors`, which `load_lora_weights` of diffusers takes."""

from __future__ import annotations

from pathlib import Path

from videofm import models
from videofm.export.diffusers_folder import DTYPES, Dtype
from videofm.export.replace import replacing
from videofm.models.lora import PUBLIC_FILE


def write_adapter_folder(output: str | Path, run: str | Path, ema: bool = True, dtype: Dtype = "fp32") -> Path:
    """Write the adapters of the role `dit` of a run or checkpoint to `output`, replacing an older export there as a whole.

    Raises:
        CheckpointError: the run trained no adapters.
        ConfigError: there is no such role, diffusers has no place for adapters of its model, or `output` is something else
            than an older export.
    """
    with replacing(output, PUBLIC_FILE) as folder:
        models.save_adapter(run, folder, "dit", ema, DTYPES[dtype])
    return Path(output)
