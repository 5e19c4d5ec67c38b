"""The latent statistics file, `latent_statistics.json`: mean and std of each latent channel, and the VAE they were measured on.

A diffusion model lives in latents that were normalised by these numbers (spec B.4), so it fits one VAE with one such file. The
file therefore names both: the encoder by a hash of its weights, the numbers by theirs, which a run of the diffusion model pins
as `objective.latent_statistics_hash`.

    {"mean": [...], "std": [...], "num_clips": 512, "hash": "...", "vae": {"name": "vae/ltx", "weights_hash": "..."}}
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from videofm.errors import DataError
from videofm.models.vae.base import LatentStatistics, VideoVAE
from videofm.run_dir import write_atomic

STATISTICS_FILE = "latent_statistics.json"
_ENCODER = {"encoder", "quant_conv"}
"""Modules that latents depend on; some VAE wraps them in another."""
_FIELDS = {"mean", "std", "num_clips", "hash", "vae"}


@dataclass(frozen=True)
class StatisticsFile:
    """What a latent statistics file holds: the numbers, how many clips they are of, and the VAE's name and `weights_hash`."""

    statistics: LatentStatistics
    num_clips: int
    vae_name: str
    weights_hash: str


def weights_hash(vae: VideoVAE) -> str:
    """Names the encoder of `vae`: the SHA-256 over its tensors (name, shape, values) in the order of their names.

    Values are rounded to bfloat16 first, so that a VAE and its bfloat16 copy have one hash. The decoder has no part in it:
    training it further leaves latents as they are. 180 M parameters take about a second.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if _ENCODER & set(name.split(".")):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            rounded = tensor.detach().to(torch.bfloat16).cpu().contiguous()
            digest.update(rounded.view(torch.int16).numpy())  # numpy has no bfloat16: the same bits
    return digest.hexdigest()


def write_statistics(vae: VideoVAE, path: str | Path, num_clips: int) -> LatentStatistics:
    """Write the statistics that `vae` carries, measured on `num_clips` clips; returns them.

    Args:
        path: of the file, or of a folder that gets a `latent_statistics.json`.

    Raises:
        DataError: nothing was measured (the statistics are still zeros and ones).
    """
    statistics = vae.latent_statistics
    if num_clips < 1 or (not statistics.mean.any() and bool((statistics.std == 1).all())):
        raise DataError(
            f"the latent statistics of this {vae.spec_name} (num_clips {num_clips}) were not measured: call "
            "set_latent_statistics with the mean and std of its latents first."
        )
    content = {
        "mean": statistics.mean.float().tolist(),
        "std": statistics.std.float().tolist(),
        "num_clips": num_clips,
        "hash": statistics.hash,
        "vae": {"name": vae.spec_name, "weights_hash": weights_hash(vae)},
    }
    write_atomic(_file(path), json.dumps(content, indent=2) + "\n")
    return statistics


def read_statistics(path: str | Path) -> StatisticsFile:
    """The content of a latent statistics file, or of the one in a folder.

    Raises:
        DataError: there is none, it is damaged, or its numbers are not those that its hash names.
    """
    file = _file(path)
    if not file.is_file():
        raise DataError(f"{file} does not exist: measure the latent statistics of the VAE first.")
    try:
        content = json.loads(file.read_text())
        statistics = LatentStatistics(_vector(content["mean"]), _vector(content["std"]))
        name, weights, num_clips = content["vae"]["name"], content["vae"]["weights_hash"], int(content["num_clips"])
        expected = content["hash"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{file} is no latent statistics file ({type(error).__name__}: {error}); it needs {', '.join(sorted(_FIELDS))}. "
            "Measure the latent statistics again."
        ) from error
    if statistics.hash != expected:
        raise DataError(
            f"{file} says hash {expected}, but its numbers have {statistics.hash}: it was edited. Measure them again."
        )
    return StatisticsFile(statistics, num_clips, name, weights)


def apply_statistics(vae: VideoVAE, path: str | Path) -> LatentStatistics:
    """Give `vae` the statistics of a file that was measured on it; returns them.

    Raises:
        DataError: the file is of another model, another number of channels, or other weights of the encoder.
    """
    read, own = read_statistics(path), weights_hash(vae)
    num_channels = len(read.statistics.mean)
    if read.vae_name != vae.spec_name or num_channels != vae.latent_channels:
        raise DataError(
            f"{_file(path)} was measured on {read.vae_name} with {num_channels} latent channels, but this is {vae.spec_name} "
            f"with {vae.latent_channels}: measure the statistics of this VAE."
        )
    if read.weights_hash != own:
        raise DataError(
            f"{_file(path)} was measured on an encoder with weights {read.weights_hash}, but this one has {own}: it was "
            "trained on, or is another one. Measure the statistics of this VAE."
        )
    vae.set_latent_statistics(read.statistics.mean, read.statistics.std)
    return read.statistics


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / STATISTICS_FILE if path.is_dir() else path


def _vector(values: Any) -> torch.Tensor:
    vector = torch.tensor(values, dtype=torch.float32)
    if vector.ndim != 1 or not len(vector):
        raise ValueError("mean and std are lists of numbers, one a channel")
    return vector
