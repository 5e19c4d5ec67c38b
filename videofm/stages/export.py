"""Stage `export`: a folder that `diffusers.LTXPipeline.from_pretrained` loads, checked by loading it with plain diffusers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from videofm import models
from videofm.config import ExportConfig
from videofm.errors import CheckpointError
from videofm.export import write_adapter_folder, write_diffusers_folder, write_vae_folder
from videofm.models.vae.base import VideoVAE
from videofm.models.vae.statistics import STATISTICS_FILE, read_statistics
from videofm.progress import LOG
from videofm.run_dir import RunDirectory
from videofm.sampling import Pipeline, Schedule
from videofm.sampling.source import models_folder
from videofm.stages.diffusers_process import run_diffusers


def run(config: ExportConfig, run: RunDirectory) -> dict[str, Any]:
    """Write `config.output`. What was made of a DiT's run is then loaded, every component, in a fresh process without videofm.

    Returns:
        `output`, `dtype`, `bytes`, `checked` (False where diffusers is not installed, and for a VAE or adapters alone), and
        what the check counted.

    Raises:
        CheckpointError: the run is missing, or holds neither a DiT with its VAE and text encoder, nor a VAE.
        ConfigError: `output` is something else than an older export.
        VideofmError: diffusers cannot load what was written.
    """
    source, output = Path(config.run), Path(config.output)
    if not source.exists():
        raise CheckpointError(f"run = {config.run!r} does not exist: give a training run of a DiT or a VAE, or a checkpoint.")
    if (source / "model_index.json").exists():
        raise CheckpointError(f"run = {config.run!r} is an exported folder already: give the training run that it came from.")
    folder = models_folder(source)
    of_vae = set(models.trained_roles(folder)) - {models.CRITIC} == {"vae"}
    if config.adapter:
        write_adapter_folder(config.output, folder, config.ema, config.dtype)
    else:
        (_write_vae if of_vae else _write_pipeline)(config, folder)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    results: dict[str, Any] = {"output": str(output), "dtype": config.dtype, "bytes": size, "checked": False}
    if of_vae or config.adapter:
        LOG.info("%s: %.1f MiB", output, size / 2**20)
        return results
    if importlib.util.find_spec("diffusers") is None:
        LOG.warning("the export was not checked: diffusers is not installed here (pip install diffusers)")
        return results
    checked = run_diffusers(output, run, {"prompts": [], "seeds": [], "names": []})
    LOG.info(
        "%s: %.1f MiB, loads in diffusers %s with no missing or unexpected key", output, size / 2**20, checked["diffusers"]
    )
    return results | checked | {"checked": True}


def _write_pipeline(config: ExportConfig, folder: Path) -> None:
    pipeline = Pipeline.load(folder, ema=config.ema, device="cpu")
    write_diffusers_folder(
        config.output,
        dit=pipeline.dit,
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        scheduler_config=Schedule().public_config(),
        dtype=config.dtype,
    )


def _write_vae(config: ExportConfig, folder: Path) -> None:
    vae = models.load(folder, role="vae", ema=config.ema)
    assert isinstance(vae, VideoVAE)
    write_vae_folder(config.output, vae, _num_statistics_clips(folder), config.dtype, config.original)


def _num_statistics_clips(folder: Path) -> int:
    """Clips of the run's own statistics file; 0 when it has none, as an unfinished run."""
    run = folder if (folder / "checkpoints").is_dir() else folder.parents[1]
    own = run / STATISTICS_FILE
    return read_statistics(own).num_clips if own.is_file() else 0
