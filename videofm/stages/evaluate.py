"""Stage `evaluate`: measure trained models on stored clips, and generated videos against their captions.

```
evaluation.json  originals_vs_reconstructions.png (one for each `reconstruction` metric, numbered from the second on)
```
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from videofm import media, models, shapes
from videofm.config import EvaluateConfig
from videofm.config.recipe import CaptionFollowingMetric, HeldOutLossMetric, ReconstructionMetric
from videofm.config.train import FlowMatchingConfig
from videofm.data import decode
from videofm.data.loader import video_tensor
from videofm.data.shards import ClipRecord, Manifest, read_clip
from videofm.errors import CheckpointError, DataError, Interrupted
from videofm.evaluation.caption_following import ShapeClassifier, caption_following
from videofm.evaluation.held_out_loss import held_out_loss
from videofm.evaluation.reconstruction import psnr, ssim
from videofm.objectives.flow_matching import FlowMatchingObjective
from videofm.parallel.rng import KeyedRng
from videofm.progress import LOG, progress
from videofm.run_dir import RunDirectory, read_jsonl, write_json
from videofm.sampling import Pipeline
from videofm.sampling.pipeline import evaluating, models_folder
from videofm.types import Batch

_BATCH_SIZE = 8
_SHEET_CLIPS = 12
ClipMetric = ReconstructionMetric | HeldOutLossMetric


def run(config: EvaluateConfig, run: RunDirectory) -> dict[str, Any]:
    """Measure everything that `config` lists.

    Returns:
        `metrics`: for each, in order, its `kind`, what it read, and its numbers; the same as in evaluation.json.

    Raises:
        CheckpointError: a model is missing.
        DataError: no clip to measure on, or videos that do not fit their captions' vocabulary.
        Interrupted: stopped on request.
    """
    found: list[dict[str, Any]] = []
    for metric in config.metrics:
        match metric:
            case ReconstructionMetric():
                earlier = sum(result["kind"] == metric.kind for result in found)
                suffix = f"_{earlier + 1}" if earlier else ""
                sheet = run.path / f"originals_vs_reconstructions{suffix}.png"
                numbers = measure_reconstruction(metric, run, config.seed, sheet) | {"sheet": sheet.name}
                read = metric.run
            case HeldOutLossMetric():
                numbers, read = measure_held_out_loss(metric, run, config.seed), metric.run
            case CaptionFollowingMetric():
                numbers, read = measure_caption_following(metric), metric.samples
        found.append({"kind": metric.kind, "of": read} | numbers)
        LOG.info("%s of %s: %s", metric.kind, read, numbers)
    write_json(run.path / "evaluation.json", {"metrics": found, "seed": config.seed})
    return {"metrics": found}


def measure_reconstruction(metric: ReconstructionMetric, run: RunDirectory, seed: int, sheet: Path) -> dict[str, Any]:
    """Mean and minimum of PSNR (dB) and mean of SSIM over clips; writes the sheet."""
    vae = models.load(_existing(metric.run), role="vae", component="vae", device=_device()).float()
    scores: list[tuple[Tensor, Tensor]] = []
    shown: list[tuple[np.ndarray, np.ndarray, str]] = []
    with evaluating(vae), torch.no_grad():
        for batch in clip_batches(metric, run, seed):
            video = batch.video.to(_device())
            output = vae.decode(vae.encode(video).mode()).clamp(-1, 1)
            scores.append((psnr(output, video).cpu(), ssim(output, video).cpu()))
            for original, copy, caption in zip(batch.video, output.cpu(), batch.captions, strict=True):
                if len(shown) < _SHEET_CLIPS:
                    shown.append((media.to_frames(original), media.to_frames(copy), caption))
    originals, copies, captions = (list(column) for column in zip(*shown, strict=True))
    media.comparison_sheet(originals, copies, captions, sheet)
    decibels, similarity = (torch.cat(column) for column in zip(*scores, strict=True))
    return {
        "num_clips": len(decibels),
        "psnr": float(decibels.mean()),
        "psnr_min": float(decibels.min()),
        "ssim": float(similarity.mean()),
    }


def measure_held_out_loss(metric: HeldOutLossMetric, run: RunDirectory, seed: int) -> dict[str, Any]:
    """Flow-matching loss at each noise level, and their mean; noise is keyed by (seed, clip), latents are the most likely."""
    pipeline = Pipeline.load(_existing(metric.run))
    roles = {"dit": pipeline.dit, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    device = next(pipeline.dit.parameters()).device
    objective = FlowMatchingObjective(FlowMatchingConfig.model_validate({"kind": "flow_matching"}))

    def prepare(batch: Batch) -> Callable[[Tensor], Tensor]:
        clean = objective.encode(pipeline.vae, batch.video)
        noise = KeyedRng(seed, 0, batch.sample_ids, device).normal("held_out_noise", tuple(clean.shape[1:]))
        return lambda sigma: objective.velocity_errors(roles, clean, batch.captions, batch.fps, sigma, noise)

    with evaluating(*roles.values()):
        batches = (batch.to(device) for batch in clip_batches(metric, run, seed))
        losses = held_out_loss(prepare, batches, metric.sigmas)
    by_sigma = {f"{sigma:g}": loss for sigma, loss in losses.items()}
    return {"loss": sum(losses.values()) / len(losses), "loss_at_sigma": by_sigma}


def measure_caption_following(metric: CaptionFollowingMetric) -> dict[str, Any]:
    """Shares of the videos in `samples.jsonl` with the colour, the direction, and both of their caption."""
    folder = Path(metric.samples)
    rows = list(read_jsonl(folder / "samples.jsonl"))
    if not rows:
        raise DataError(f"{folder} has no samples.jsonl with rows: give the run directory of a finished `sample` stage.")
    videos = [media.read_video(folder / row["file"]) for row in rows]
    shares = caption_following(videos, [row["caption"] for row in rows], ShapeClassifier(shapes.COLOURS, shapes.DIRECTIONS))
    return {"num_videos": shares.num_videos, "colour": shares.colour, "direction": shares.direction, "both": shares.both}


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
        for start in range(0, len(usable), _BATCH_SIZE):
            part = usable[start : start + _BATCH_SIZE]
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


def _read(metric: ClipMetric, record: ClipRecord, decoder: decode.Decoder) -> Tensor:
    frames = decoder.read(read_clip(metric.manifest, record), range(metric.num_frames))
    return fit(video_tensor(frames[None]), metric.height, metric.width)


def _existing(path: str) -> Path:
    folder = models_folder(path)
    if not folder.exists():
        raise CheckpointError(f"run = {path!r} does not exist: give a training run, a checkpoint, or an exported folder.")
    return folder


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
