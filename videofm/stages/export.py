"""Stage `export`: a folder that `diffusers.LTXPipeline.from_pretrained` loads, checked by loading it with plain diffusers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from videofm.config import ExportConfig
from videofm.errors import CheckpointError
from videofm.export import write_diffusers_folder
from videofm.progress import LOG
from videofm.run_dir import RunDirectory
from videofm.sampling import Pipeline
from videofm.stages.diffusers_process import run_diffusers


def run(config: ExportConfig, run: RunDirectory) -> dict[str, Any]:
    """Write `config.output`, then load every component of it in a fresh process without videofm.

    Returns:
        `output`, `dtype`, `bytes`, `checked` (False where diffusers is not installed), and what the check counted.

    Raises:
        CheckpointError: the run is missing, or holds no DiT, VAE and text encoder.
        ConfigError: `output` is something else than an older export.
        VideofmError: diffusers cannot load what was written.
    """
    source, output = Path(config.run), Path(config.output)
    if not source.exists():
        raise CheckpointError(f"run = {config.run!r} does not exist: give a training run of a DiT, or a checkpoint of it.")
    if (source / "model_index.json").exists():
        raise CheckpointError(f"run = {config.run!r} is an exported folder already: give the training run that it came from.")
    pipeline = Pipeline.load(source, ema=config.ema, device="cpu")
    write_diffusers_folder(
        output,
        dit=pipeline.dit,
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        scheduler_config=pipeline.schedule.public_config(),
        dtype=config.dtype,
    )
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    results: dict[str, Any] = {"output": str(output), "dtype": config.dtype, "bytes": size, "checked": False}
    if importlib.util.find_spec("diffusers") is None:
        LOG.warning("the export was not checked: diffusers is not installed here (pip install diffusers)")
        return results
    checked = run_diffusers(output, run, {"prompts": [], "seeds": [], "names": []})
    LOG.info(
        "%s: %.1f MiB, loads in diffusers %s with no missing or unexpected key", output, size / 2**20, checked["diffusers"]
    )
    return results | checked | {"checked": True}
