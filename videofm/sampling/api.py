"""Prompts to videos in one call, with the models of a training run, of a checkpoint or of an exported folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videofm.sampling.conditioning import AnyCondition, PixelCondition
from videofm.sampling.features import Guide
from videofm.sampling.guidance import Guidance
from videofm.sampling.images import ImageSource, fitted, is_image, read_image
from videofm.sampling.origin import check_origin
from videofm.sampling.pipeline import Pipeline
from videofm.sampling.schedule import SigmaSchedule
from videofm.sampling.source import training_size
from videofm.sampling.storyboard import Prompt, Storyboard
from videofm.sampling.token_guide import TokenGuide
from videofm.types import Compression


def generate(
    run_or_folder: str | Path,
    prompts: Prompt | Sequence[Prompt],
    seed: int = 0,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float = 25.0,
    num_steps: int = 30,
    guidance_scale: float | None = None,
    ema: bool = True,
    batch_size: int = 16,
    device: str | torch.device | None = None,
    *,
    image: ImageSource | Sequence[ImageSource] | None = None,
    conditions: Sequence[AnyCondition] = (),
    fit: str | None = None,
    guidance: Guidance | None = None,
    schedule: SigmaSchedule | None = None,
    dtype: torch.dtype = torch.float32,
    guide: Guide | str | Path | None = None,
    **settings: Any,
) -> Tensor:
    """Videos for `prompts` with the model at `run_or_folder`: `(B, 3, T, H, W)` float32 in [-1, 1].

    Args:
        run_or_folder: training run of a DiT, checkpoint of it, or exported folder.
        prompts: a caption, or several; a `Storyboard` in place of one changes it on the way.
        num_frames, height, width: of the videos; None takes those of the training clips, which a folder does not know.
        seed, fps, num_steps, batch_size, conditions: as in `Pipeline.stream`.
        guidance_scale: classifier-free guidance, 1 is off; None takes 3, or what `guidance` says.
        ema, device, schedule, dtype: as in `Pipeline.load`.
        image: first frame of all videos, or a list with one for each prompt.
        fit: what to do with an image of another shape, see `images.fitted`.
        guidance: all of it, in place of `guidance_scale`.
        guide: who makes features for a DiT with an injection: a `TokenGuide`, or the run of its autoregressive model.
        settings: further fields of `SamplingSettings`.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: a size that the model cannot make, or none given and none known; an image of another shape;
            a run as `guide` that is of another VAE, or whose tokenizer has changed.
        DataError: an image that cannot be read.
    """
    loaded = TokenGuide.load(guide, ema=ema, device=device, dtype=dtype) if isinstance(guide, str | Path) else guide
    pipeline = Pipeline.load(run_or_folder, ema=ema, device=device, schedule=schedule, dtype=dtype, guide=loaded)
    if isinstance(guide, str | Path) and isinstance(loaded, TokenGuide):
        check_origin(loaded, guide, pipeline.vae, run_or_folder)
    size = training_size(run_or_folder, {"num_frames": num_frames, "height": height, "width": width})
    if image is not None:
        conditions = [_first_frames(image, size, pipeline.vae.compression, fit), *conditions]  # type: ignore[arg-type]
    settings |= {"fps": fps, "seed": seed, "num_steps": num_steps, "guidance_scale": guidance_scale, **size}
    if guidance is not None:
        settings["guidance"] = guidance
    texts = [prompts] if isinstance(prompts, str | Storyboard) else prompts
    return pipeline.generate(texts, conditions=conditions, batch_size=batch_size, **settings)


def _first_frames(
    image: ImageSource | Sequence[ImageSource], size: dict[str, int], compression: Compression, fit: str | None
) -> PixelCondition:
    sources: list[Any] = [image] if is_image(image) else list(image)  # type: ignore[arg-type]
    frames = [fitted(read_image(source), size["height"], size["width"], compression, fit) for source in sources]
    return PixelCondition(torch.cat(frames))
