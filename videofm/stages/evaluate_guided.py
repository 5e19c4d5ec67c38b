"""What stage `evaluate` measures of guided generation: models at few sampling steps, and long videos window by window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from videofm import media, shapes
from videofm.config.evaluate_arlon import FewStepsMetric, LongVideoMetric, VariantConfig
from videofm.config.sample import SampleConfig
from videofm.errors import DataError, Interrupted
from videofm.evaluation.caption_following import CaptionFollowing, ShapeClassifier, caption_following
from videofm.evaluation.motion import Drift, drift, motion_smoothness, seam_ratio
from videofm.media import Frames
from videofm.progress import progress
from videofm.run_dir import RunDirectory, read_jsonl
from videofm.sampling import Pipeline
from videofm.sampling.loading import load_pipeline
from videofm.sampling.settings import SamplingSettings
from videofm.stages.sample import read_prompts

CLASSIFIER = ShapeClassifier(shapes.COLOURS, shapes.DIRECTIONS)
DRIFT_SHARE = 3
"""Drift of a short video compares its first and last third."""


def measure_few_steps(metric: FewStepsMetric, run: RunDirectory, seed: int) -> dict[str, Any]:
    """`rows`: for each variant and count of steps the shares of captions followed, smoothness, drift, and measured seconds.

    All rows have the same captions and start from the same noise. `ar_seconds` (None without a guide) and `dit_seconds` are
    those of a batch over its videos, without the loading of models and without text encoder and decoder. What the first batch
    on a device prepares counts to the first row.

    Raises:
        CheckpointError: a model is missing.
        ConfigError: sizes that a model cannot make, a guide that does not fit, or no captions.
        Interrupted: stopped on request.
    """
    rows = []
    with progress("few steps, rows", len(metric.variants) * len(metric.num_steps)) as bar:
        for name, variant in metric.variants.items():
            # The count of steps is no matter of loading.
            first = _sampling(metric, variant, metric.num_steps[0], seed)
            prompts = read_prompts(first) * metric.repeats
            pipeline = load_pipeline(first, SamplingSettings.from_config(first))
            for num_steps in metric.num_steps:
                made = _make(pipeline, _sampling(metric, variant, num_steps, seed), prompts, run)
                seconds = {"ar_seconds": made.ar_seconds, "dit_seconds": made.dit_seconds}
                rows.append({"variant": name, "num_steps": num_steps, **_judge(made.videos, prompts), **seconds})
                bar.advance(1)
            del pipeline  # before that of the next variant is loaded
    return {"num_videos": len(prompts), "rows": rows}


def measure_long_videos(metric: LongVideoMetric) -> dict[str, Any]:
    """`rows`: for each window the shares of videos with the colour, shape and direction of its prompt; and of whole videos the
    jump at seams over the median change between frames (mean and largest over videos; `num_still` are left out, which change at
    seams only) and the drift from the first window to as many frames at the end (halves, where the video is shorter than two
    windows). `ar_seconds` and `dit_seconds` of all videos together; None where any of them has none.

    Raises:
        DataError: no videos, or videos without windows.
    """
    folder = Path(metric.samples)
    listed = list(read_jsonl(folder / "samples.jsonl"))
    if not listed or not all(row.get("windows") for row in listed):
        raise DataError(f"{folder} has no samples.jsonl with windows: give the run of a `sample` stage that has `window`.")
    videos = [media.read_video(folder / row["file"]) for row in listed]
    rows = []
    for number, spans in enumerate(zip(*(row["windows"] for row in listed), strict=True)):
        parts = [video[_first(span, number) : span["stop"]] for video, span in zip(videos, spans, strict=True)]
        found = _shares(caption_following(parts, [span["prompt"] for span in spans], CLASSIFIER))
        rows.append({"window": number, "first_frame": spans[0]["start"], **found})
    seams = [
        seam_ratio(video, [span["start"] for span in row["windows"][1:]]) for video, row in zip(videos, listed, strict=True)
    ]
    return {
        "num_videos": len(videos),
        "num_frames": len(videos[0]),
        "seam_ratio": _mean([ratio for ratio in seams if np.isfinite(ratio)]),
        "seam_ratio_max": max((ratio for ratio in seams if np.isfinite(ratio)), default=None),
        "num_still": sum(not np.isfinite(ratio) for ratio in seams),
        **_mean_drift([drift(video, min(listed[0]["windows"][0]["stop"], len(video) // 2)) for video in videos]),
        "ar_seconds": _total([row.get("ar_seconds") for row in listed]),
        "dit_seconds": _total([row.get("dit_seconds") for row in listed]),
        "rows": rows,
    }


def _first(span: dict[str, Any], number: int) -> int:
    """The first frame that tells about a window: the last of the window before, from which its motion begins."""
    return int(span["start"]) - (number > 0)


def _sampling(metric: FewStepsMetric, variant: VariantConfig, num_steps: int, seed: int) -> SampleConfig:
    fields = ("prompts_file", "num_frames", "height", "width", "fps", "guidance_scale", "batch_size")
    return SampleConfig(
        kind="sample", run=variant.run, guide=variant.guide, num_steps=num_steps, seed=seed,
        **{name: getattr(metric, name) for name in fields},
    )  # fmt: skip


@dataclass(frozen=True)
class _Made:
    """Videos, and the measured seconds of one."""

    videos: list[Frames]
    dit_seconds: float
    ar_seconds: float | None


def _make(pipeline: Pipeline, config: SampleConfig, prompts: Sequence[str], run: RunDirectory) -> _Made:
    """A video for each of `prompts`; video i starts from the noise of (seed, i) whatever the batch size."""
    settings = SamplingSettings.from_config(config)
    videos: list[Frames] = []
    ar_seconds: list[float | None] = []
    dit_seconds = 0.0
    for start in range(0, len(prompts), config.batch_size):
        if run.stop_requested:
            raise Interrupted("evaluation stopped on request; the same command starts it again")
        part = prompts[start : start + config.batch_size]
        for made in pipeline.stream_windows(part, first_index=start, settings=settings):  # one, of all frames
            videos += [media.to_frames(video) for video in made.video]
            ar_seconds.append(None if made.indices is None else made.ar_seconds)
            dit_seconds += made.dit_seconds
    drawn = _total(ar_seconds)
    return _Made(videos, dit_seconds / len(prompts), None if drawn is None else drawn / len(prompts))


def _judge(videos: Sequence[Frames], captions: Sequence[str]) -> dict[str, float | None]:
    shares = _shares(caption_following(videos, captions, CLASSIFIER))
    smooth = _mean([motion_smoothness(video) for video in videos])
    return shares | {"motion_smoothness": smooth} | _mean_drift([drift(video, len(video) // DRIFT_SHARE) for video in videos])


def _mean_drift(found: Sequence[Drift]) -> dict[str, float | None]:
    """Levels of 0 to 255 that backgrounds move by, and degrees that hues of shapes turn by, over those that have a shape."""
    return {"background_drift": _mean([one.background for one in found]), "hue_drift": _mean([one.hue for one in found])}


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _total(values: Sequence[float | None]) -> float | None:
    """The sum; None where one is not known, since the rest would pass for all."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _shares(found: CaptionFollowing) -> dict[str, float | None]:
    return {"colour": found.colour, "direction": found.direction, "shape": found.shape, "all": found.all}
