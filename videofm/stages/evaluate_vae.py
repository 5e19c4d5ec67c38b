"""What stage `evaluate` measures of video VAEs: reconstructions, latents, and whether an image VAE decodes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from videofm import media, models
from videofm.config.recipe import ImageCompatibilityMetric, LatentDiagnosticsMetric, ReconstructionMetric, TilesConfig
from videofm.errors import ConfigError
from videofm.evaluation.compatibility import ImageCompatibility
from videofm.evaluation.latents import LatentDiagnostics, alarms
from videofm.evaluation.perceptual import ReconstructionFVD, lpips_per_frame
from videofm.evaluation.reconstruction import psnr, psnr_per_frame, ssim_per_frame
from videofm.models.vae.base import VideoVAE
from videofm.models.vae.statistics import write_statistics
from videofm.models.vae.tiling import Tiles, decode_tiled, encode_tiled, seam_error
from videofm.parallel.rng import keyed_generator
from videofm.progress import LOG
from videofm.run_dir import RunDirectory
from videofm.sampling.pipeline import evaluating
from videofm.stages.stored_clips import clip_batches, device, existing
from videofm.types import Batch

SHEET_CLIPS = 12
Network = Callable[[str, str, str], nn.Module]
"""(name, size, weights file) -> a perceptual network; built once an evaluation."""


def perceptual_network(name: str, size: str, weights: str) -> nn.Module:
    """A frozen network with the weights of a local file.

    Raises:
        CheckpointError: the file is missing, or of another network.
    """
    return models.build(name, size, device(), weights=weights)


def measure_reconstruction(
    metric: ReconstructionMetric, run: RunDirectory, seed: int, sheet: Path, network: Network
) -> dict[str, Any]:
    """PSNR (dB), SSIM, LPIPS and rFVD over clips and, but for the last, for each frame; writes the sheet.

    A decoder that is told the noise level is told 0; noise that it injects is drawn with `seed`, the same for all clips.

    Returns:
        - `num_clips`, `psnr` (mean over clips), `psnr_std`, `psnr_min`, `ssim`, `ssim_std` and, where asked for, `lpips`,
          `lpips_std`, `rfvd`, `rfvd_num_features`;
        - `per_frame`: the mean over clips at each frame, of `psnr`, `ssim` and `lpips`;
        - `model`, `num_parameters`, `compression` (time, height, width), `latent_channels`, `clip` (frames, height, width);
        - `mode`: whole, streaming or tiles;
        - `seam_error`, of the first clip, where tiles ask for it: differences to the whole, of `latents` and of `video`.
    """
    vae = load_vae(metric.run)
    scores = _Scores(metric, network)
    reconstruct = _reconstruction(metric, vae)
    shown = _Sheet()
    seams: dict[str, Any] = {}
    with evaluating(vae), torch.no_grad():
        for batch in clip_batches(metric, run, seed):
            video = batch.video.to(device())
            if metric.tiles is not None and metric.tiles.seam_error and not seams:
                first = video[:1]
                seams["seam_error"] = asdict(seam_error(vae, first, _tiles(metric.tiles), no_noise(vae, first), seed))
            output = reconstruct(video, keyed_generator(seed, "decoder_noise")).clamp(-1, 1)
            scores.add(output, video)
            shown.add(batch, [video, output])
    shown.write(sheet)
    compression = vae.compression
    facts = {
        "model": vae.spec_name,
        "num_parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "compression": [compression.time, compression.height, compression.width],
        "latent_channels": vae.latent_channels,
        "clip": [metric.num_frames, metric.height, metric.width],
        "mode": "streaming" if metric.streaming else "whole" if metric.tiles is None else "tiles",
    }
    return scores.result() | facts | seams


def measure_latents(metric: LatentDiagnosticsMetric, run: RunDirectory, seed: int, file: Path) -> dict[str, Any]:
    """The diagnostics of `LatentDiagnostics.result`, with `alarms` and `statistics_hash`; writes the statistics to `file`."""
    vae = load_vae(metric.run)
    diagnostics = LatentDiagnostics()
    with evaluating(vae), torch.no_grad():
        for batch in clip_batches(metric, run, seed):
            diagnostics.update(vae.encode(batch.video.to(device())))
    result = diagnostics.result()
    found = alarms(result)
    for alarm in found:
        LOG.warning("latents of %s: %s", metric.run, alarm)
    vae.set_latent_statistics(torch.tensor(result["mean"]), torch.tensor(result["std"]))
    statistics = write_statistics(vae, file, result["num_clips"])
    return result | {"alarms": found, "statistics_hash": statistics.hash}


def measure_compatibility(metric: ImageCompatibilityMetric, run: RunDirectory, seed: int, sheet: Path) -> dict[str, Any]:
    """The numbers of `ImageCompatibility.result`; the sheet shows frames, their image VAE's copy, and `D_i(E_v(X))`."""
    vae, image_vae = load_vae(metric.run), load_vae(metric.image_vae, "image_vae")
    compatibility = ImageCompatibility(vae, image_vae)
    shown = _Sheet()
    with evaluating(vae, image_vae):
        for batch in clip_batches(metric, run, seed):
            frames = compatibility.update(batch.video.to(device()))
            shown.add(batch, [frames.original, frames.by_image_vae, frames.from_video_latents])
    shown.write(sheet)
    return compatibility.result()


class _Scores:
    """Measures of reconstructions, batch by batch."""

    def __init__(self, metric: ReconstructionMetric, network: Network) -> None:
        self.clips: dict[str, list[Tensor]] = defaultdict(list)
        self.frames: dict[str, list[Tensor]] = defaultdict(list)
        self.lpips = self.rfvd = None
        if metric.lpips_weights is not None:
            self.lpips = network("perceptual/lpips", metric.lpips_size, metric.lpips_weights)
        if metric.i3d_weights is not None:
            self.rfvd = ReconstructionFVD(network("perceptual/i3d", metric.i3d_size, metric.i3d_weights))

    def add(self, output: Tensor, video: Tensor) -> None:
        """A batch, both `(B, 3, T, H, W)`."""
        self.frames["psnr"].append(psnr_per_frame(output, video).cpu())
        self.frames["ssim"].append(ssim_per_frame(output, video).cpu())
        if self.lpips is not None:
            self.frames["lpips"].append(lpips_per_frame(self.lpips, output, video).cpu())
        if self.rfvd is not None:
            self.rfvd.update(output, video)
        self.clips["psnr"].append(psnr(output, video).cpu())
        for name in self.frames.keys() - {"psnr"}:
            self.clips[name].append(self.frames[name][-1].mean(dim=1))

    def result(self) -> dict[str, Any]:
        """All numbers; the standard deviation is that of these clips."""
        decibels = torch.cat(self.clips["psnr"])
        numbers: dict[str, Any] = {"num_clips": len(decibels), "psnr_min": float(decibels.min())}
        for name, values in self.clips.items():
            std, mean = torch.std_mean(torch.cat(values), correction=0)
            numbers |= {name: float(mean), f"{name}_std": float(std)}
        if self.rfvd is not None and self.rfvd.originals is not None:
            numbers |= {"rfvd": self.rfvd.distance(), "rfvd_num_features": len(self.rfvd.originals.mean)}
        numbers["per_frame"] = {name: torch.cat(values).mean(dim=0).tolist() for name, values in self.frames.items()}
        return numbers


class _Sheet:
    """The first clips of a pass, as a stack of videos each."""

    def __init__(self) -> None:
        self.stacks: list[list[np.ndarray[Any, Any]]] = []
        self.captions: list[str] = []

    def add(self, batch: Batch, videos: Sequence[Tensor]) -> None:
        """The clips of a batch; `videos` `(B, 3, T, H, W)` each, from top to bottom."""
        for index, caption in enumerate(batch.captions[: SHEET_CLIPS - len(self.stacks)]):
            self.stacks.append([media.to_frames(video[index].cpu()) for video in videos])
            self.captions.append(caption)

    def write(self, path: Path) -> None:
        """The PNG."""
        media.stacked_sheet(self.stacks, self.captions, path)


def _reconstruction(metric: ReconstructionMetric, vae: VideoVAE) -> Callable[[Tensor, torch.Generator], Tensor]:
    """(video, generator of injected noise) -> its reconstruction, in the way that `metric` asks for."""

    def whole(video: Tensor, generator: torch.Generator) -> Tensor:
        return vae.decode(vae.encode(video).mode(), no_noise(vae, video), generator)

    def streamed(video: Tensor, generator: torch.Generator) -> Tensor:
        encoder_cache = decoder_cache = None
        pieces = []
        first = video.shape[2] % vae.chunk_frames or vae.chunk_frames
        num_later = (video.shape[2] - first) // vae.chunk_frames
        for chunk in video.split([first] + [vae.chunk_frames] * num_later, dim=2):
            encoded = vae.encode_stream(chunk, encoder_cache)
            decoded = vae.decode_stream(encoded.posterior.mode(), decoder_cache, no_noise(vae, video), generator)
            encoder_cache, decoder_cache = encoded.cache, decoded.cache
            pieces.append(decoded.video)
        return torch.cat(pieces, dim=2)

    def tiled(video: Tensor, generator: torch.Generator) -> Tensor:
        latents = encode_tiled(vae, video, tiles).mode()
        return decode_tiled(vae, latents, tiles, no_noise(vae, video), generator)

    if metric.tiles is not None:
        tiles = _tiles(metric.tiles)
        return tiled
    return streamed if metric.streaming else whole


def _tiles(config: TilesConfig) -> Tiles:
    size, overlap = (config.height, config.width), (config.overlap, config.overlap)
    return Tiles(*size, *overlap, config.num_frames, config.overlap_frames)


def no_noise(vae: VideoVAE, video: Tensor) -> Tensor | None:
    """sigma 0 for each clip, for a decoder that wants to be told."""
    return video.new_zeros(video.shape[0]) if vae.timestep_conditioning else None


def load_vae(path: str, field: str = "run") -> VideoVAE:
    """The VAE of the folder that `field` of the config names, in float32, on the device to measure on.

    Raises:
        CheckpointError: nothing there.
        ConfigError: it is no video VAE.
    """
    vae = models.load(existing(path, field), role="vae", component="vae", device=device())
    if not isinstance(vae, VideoVAE):
        raise ConfigError(f"{field} = {path!r} holds {getattr(vae, 'spec_name', type(vae).__name__)}, which is no video VAE.")
    return vae.float()
