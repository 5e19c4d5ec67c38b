"""Stage `evaluate`: measure trained models on stored clips, and generated videos against their captions.

```
evaluation.json
originals_vs_reconstructions.png                for each `reconstruction` metric
latent_statistics.json                          for each `latent_diagnostics` metric
originals_vs_image_vae_vs_video_latents.png     for each `image_compatibility` metric
```
From the second metric of a kind on, its file has a number: `latent_statistics_2.json`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from videofm import media, models, shapes
from videofm.config import EvaluateConfig
from videofm.config.evaluate_arlon import FewStepsMetric, LongVideoMetric
from videofm.config.evaluate_reward import RewardMetric
from videofm.config.flow_matching import FeaturesConfig, FlowMatchingConfig
from videofm.config.recipe import (
    CaptionFollowingMetric,
    EvaluationMetric,
    HeldOutLossMetric,
    ImageCompatibilityMetric,
    ImageToVideoMetric,
    LatentDiagnosticsMetric,
    NextTokenMetric,
    ReconstructionMetric,
    TokenizerMetric,
)
from videofm.errors import DataError
from videofm.evaluation.caption_following import CaptionFollowing, ShapeClassifier, caption_following
from videofm.evaluation.reconstruction import psnr
from videofm.objectives.flow_matching import FlowMatchingObjective
from videofm.progress import LOG
from videofm.run_dir import RunDirectory, read_jsonl, write_json
from videofm.sampling import Pipeline
from videofm.sampling.conditioning import PixelCondition
from videofm.sampling.source import models_folder
from videofm.stages.evaluate_ar import measure_next_token
from videofm.stages.evaluate_arlon import measure_tokenizer
from videofm.stages.evaluate_guided import measure_few_steps, measure_long_videos
from videofm.stages.evaluate_reward import measure_reward
from videofm.stages.evaluate_vae import (
    Network,
    measure_compatibility,
    measure_latents,
    measure_reconstruction,
    perceptual_network,
)
from videofm.stages.stored_clips import clip_batches, existing
from videofm.train.watch import held_out_losses

FILES = {
    "reconstruction": ("sheet", "originals_vs_reconstructions.png"),
    "latent_diagnostics": ("statistics", "latent_statistics.json"),
    "image_compatibility": ("sheet", "originals_vs_image_vae_vs_video_latents.png"),
}
"""Kind of metric -> the key of its result that names the file it writes, and that name."""


def run(config: EvaluateConfig, run: RunDirectory) -> dict[str, Any]:
    """Measure everything that `config` lists.

    Returns:
        `metrics`: for each, in order, its `kind`, what it read, and its numbers; the same as in evaluation.json.

    Raises:
        CheckpointError: a model or a file of weights is missing.
        ConfigError: what is asked for does not fit the models.
        DataError: no clip to measure on, clips that the models do not take, or videos that do not fit their captions'
            vocabulary.
        Interrupted: stopped on request.
    """
    found: list[dict[str, Any]] = []
    network = cache(perceptual_network)
    for metric in config.metrics:
        read = _read_by(metric)
        result: dict[str, Any] = {"kind": metric.kind, "of": read}
        file = run.path
        if metric.kind in FILES:
            key, name = FILES[metric.kind]
            file /= _numbered(name, sum(other["kind"] == metric.kind for other in found) + 1)
            result[key] = file.name
        numbers = _measure(metric, run, config.seed, file, network)
        found.append(result | numbers)
        short = {name: value for name, value in numbers.items() if name != "per_frame" and not isinstance(value, list)}
        LOG.info("%s of %s: %s", metric.kind, read, short)
    write_json(run.path / "evaluation.json", {"metrics": found, "seed": config.seed})
    return {"metrics": found}


def _read_by(metric: EvaluationMetric) -> str:
    """What a metric is about, as its config names it."""
    match metric:
        case CaptionFollowingMetric() | LongVideoMetric():
            return metric.samples
        case FewStepsMetric():
            return ", ".join(metric.variants)
        case _:
            return metric.run


def _measure(metric: EvaluationMetric, run: RunDirectory, seed: int, file: Path, network: Network) -> dict[str, Any]:
    match metric:
        case ReconstructionMetric():
            return measure_reconstruction(metric, run, seed, file, network)
        case LatentDiagnosticsMetric():
            return measure_latents(metric, run, seed, file)
        case ImageCompatibilityMetric():
            return measure_compatibility(metric, run, seed, file)
        case HeldOutLossMetric():
            return measure_held_out_loss(metric, run, seed)
        case CaptionFollowingMetric():
            return measure_caption_following(metric)
        case ImageToVideoMetric():
            return measure_image_to_video(metric, run, seed)
        case TokenizerMetric():
            return measure_tokenizer(metric, run, seed)
        case NextTokenMetric():
            return measure_next_token(metric, run, seed)
        case FewStepsMetric():
            return measure_few_steps(metric, run, seed)
        case LongVideoMetric():
            return measure_long_videos(metric)
        case RewardMetric():
            return measure_reward(metric, run, seed)


def _numbered(name: str, number: int) -> str:
    """`sheet.png`, then `sheet_2.png`, ..."""
    path = Path(name)
    return name if number == 1 else f"{path.stem}_{number}{path.suffix}"


def measure_held_out_loss(metric: HeldOutLossMetric, run: RunDirectory, seed: int) -> dict[str, Any]:
    """Flow-matching loss at each noise level, and their mean; noise is keyed by (seed, clip), latents are the most likely.

    A DiT with an injection is guided by the features of the clips themselves, through the tokenizer of its training.
    """
    pipeline = Pipeline.load(existing(metric.run))
    roles = {"dit": pipeline.dit, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    device = next(pipeline.dit.parameters()).device
    guided = models.injection_spec(pipeline.dit) is not None
    if guided:
        roles["tokenizer"] = models.load(models_folder(metric.run), role="tokenizer", device=device)
    features = FeaturesConfig() if guided else None
    config = FlowMatchingConfig(kind="flow_matching", causal_fix=pipeline.causal_fix, features=features)
    objective = FlowMatchingObjective(config)
    batches = (batch.to(device) for batch in clip_batches(metric, run, seed))
    return held_out_losses(objective, roles, batches, metric.sigmas, seed)


def measure_image_to_video(metric: ImageToVideoMetric, run: RunDirectory, seed: int) -> dict[str, Any]:
    """PSNR of the first frame against the one that was given (dB, mean and smallest), and the shares of the captions."""
    pipeline = Pipeline.load(existing(metric.run))
    videos: list[media.Frames] = []
    captions: list[str] = []
    kept: list[float] = []
    for batch in clip_batches(metric, run, seed):
        first = batch.video[:, :, :1]
        made = pipeline.generate(
            batch.captions,
            conditions=[PixelCondition(first)],
            guidance_scale=metric.guidance_scale,
            first_index=len(videos),
            num_frames=metric.num_frames,
            height=metric.height,
            width=metric.width,
            fps=float(batch.fps[0]),
            num_steps=metric.num_steps,
            seed=seed,
        )
        kept += psnr(made[:, :, :1], first).tolist()
        videos += [media.to_frames(video) for video in made]
        captions += batch.captions
    shares = caption_following(videos, captions, ShapeClassifier(shapes.COLOURS, shapes.DIRECTIONS))
    return {"first_frame_psnr": sum(kept) / len(kept), "first_frame_psnr_min": min(kept)} | _shares(shares)


def measure_caption_following(metric: CaptionFollowingMetric) -> dict[str, Any]:
    """Shares of the videos in `samples.jsonl` with the colour, the direction, both, the shape, and all of their caption.

    Raises:
        DataError: no videos, or one of several prompts.
    """
    folder = Path(metric.samples)
    rows = list(read_jsonl(folder / "samples.jsonl"))
    if not rows:
        raise DataError(f"{folder} has no samples.jsonl with rows: give the run directory of a finished `sample` stage.")
    for row in rows:
        prompts = list(dict.fromkeys(span["prompt"] for span in row.get("windows", [])))
        if len(prompts) > 1:
            raise DataError(
                f"{folder / row['file']} has {len(prompts)} prompts ({' -> '.join(prompts)}), and caption_following compares a "
                "whole video with one caption: use metric `long_video`, which judges each window by its own prompt."
            )
    videos = [media.read_video(folder / row["file"]) for row in rows]
    shares = caption_following(videos, [row["caption"] for row in rows], ShapeClassifier(shapes.COLOURS, shapes.DIRECTIONS))
    return _shares(shares)


def _shares(found: CaptionFollowing) -> dict[str, Any]:
    """For the list of results; `shape` only where captions name one."""
    shape = {} if found.shape is None else {"shape": found.shape}
    shares = {"colour": found.colour, "direction": found.direction, "both": found.both}
    return {"num_videos": found.num_videos} | shares | shape | {"all": found.all}
