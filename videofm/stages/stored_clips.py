"""Stored clips as what a metric measures on: the first frames of some clips of a split, fitted to a size."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from videofm.config.recipe import (
    HeldOutLossMetric,
    ImageCompatibilityMetric,
    ImageToVideoMetric,
    LatentDiagnosticsMetric,
    ReconstructionMetric,
    TokenizerMetric,
)
from videofm.data import decode
from videofm.data.index import ClipRecord
from videofm.data.loader import video_tensor
from videofm.data.manifest import Manifest
from videofm.data.shards import read_clip
from videofm.errors import CheckpointError, DataError, Interrupted
from videofm.progress import progress
from videofm.run_dir import RunDirectory
from videofm.sampling.source import models_folder
from videofm.types import Batch

ClipMetric = (
    ReconstructionMetric
    | LatentDiagnosticsMetric
    | ImageCompatibilityMetric
    | HeldOutLossMetric
    | ImageToVideoMetric
    | TokenizerMetric
)


def clip_batches(metric: ClipMetric, run: RunDirectory, seed: int) -> Iterator[Batch]:
    """The clips to measure on, in batches on the CPU: the first frames of at most `num_clips` clips, drawn with `seed`.

    Raises:
        DataError: no clip of the split is long enough.
        Interrupted: stopped on request.
    """
    manifest = Manifest.load(metric.manifest)
    records = manifest.records(metric.split)
    usable = [record for record in records if record.num_frames >= metric.num_frames]
    if not usable:
        raise DataError(
            f"{metric.manifest} has no clip of {metric.num_frames} frames in split {metric.split!r} ({len(records)} shorter). "
            "Ask for fewer frames, another split, or curate with a larger held_out share."
        )
    if len(usable) > metric.num_clips:
        usable = sorted(random.Random(seed).sample(usable, metric.num_clips), key=lambda record: record.key)
    decoder = decode.choose("auto")
    with progress(f"{metric.kind} clips", len(usable)) as bar:
        for start in range(0, len(usable), metric.batch_size):
            part = usable[start : start + metric.batch_size]
            if run.stop_requested:
                raise Interrupted("evaluation stopped on request; the same command starts it again")
            clips = [_read(metric, record, decoder) for record in part]
            fps = torch.tensor([record.fps for record in part], dtype=torch.float32)
            captions, keys = [record.caption for record in part], [record.key for record in part]
            yield Batch(torch.cat(clips), captions, fps, keys, step=0, num_step_samples=len(part))
            bar.advance(len(part))


def fit(video: Tensor, height: int, width: int) -> Tensor:
    """`(B, C, T, H, W)` cut around its centre to the wanted aspect ratio, then resized (antialiased) to `height` x `width`."""
    batch, _, _, old_height, old_width = video.shape
    scale = min(old_height / height, old_width / width)
    kept_height, kept_width = round(height * scale), round(width * scale)
    top, left = (old_height - kept_height) // 2, (old_width - kept_width) // 2
    video = video[..., top : top + kept_height, left : left + kept_width]
    if (kept_height, kept_width) == (height, width):
        return video
    images = video.transpose(1, 2).flatten(0, 1)  # (B, C, T, H, W) -> (B * T, C, H, W)
    images = interpolate(images, (height, width), mode="bilinear", antialias=True)
    return images.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()


def existing(path: str, field: str = "run") -> Path:
    """The folder of models that `path` names; `field` of the config said so.

    Raises:
        CheckpointError: there is none.
    """
    folder = models_folder(path)
    if not folder.exists():
        raise CheckpointError(f"{field} = {path!r} does not exist: give a training run, a checkpoint, or an exported folder.")
    return folder


def device() -> str:
    """Where to measure: CUDA where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _read(metric: ClipMetric, record: ClipRecord, decoder: decode.Decoder) -> Tensor:
    frames = decoder.read(read_clip(metric.manifest, record), range(metric.num_frames))
    return fit(video_tensor(frames[None]), metric.height, metric.width)
