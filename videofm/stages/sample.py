"""Stage `sample`: one video for each prompt, as MP4 files, a list of them and a contact sheet.

```
samples/000.mp4 ...  samples/contact_sheet.png  samples.jsonl (file, caption, seed: that of the video's noise generator; image:
the first frame, where one is given)
```
A video depends on (config, index) alone, so an interrupted run goes on behind the last video that was written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videofm import media
from videofm.config import SampleConfig
from videofm.config.sample import ConditionConfig
from videofm.errors import CheckpointError, ConfigError, Interrupted
from videofm.progress import LOG, progress
from videofm.run_dir import RunDirectory, write_atomic
from videofm.sampling import Pipeline, PixelCondition
from videofm.sampling.images import fitted, last_frames, read_image
from videofm.sampling.noise import video_seed
from videofm.sampling.settings import SamplingSettings
from videofm.sampling.source import models_folder
from videofm.sampling.windows import spans
from videofm.stages.diffusers_process import run_diffusers
from videofm.types import Compression

_SHEET_VIDEOS = 96
"""Most videos on the contact sheet."""
_PUBLIC_MULTIPLE = 32
"""LTXPipeline refuses other sizes, whatever the VAE."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(config: SampleConfig, run: RunDirectory) -> dict[str, Any]:
    """Make the videos that are not there yet.

    Returns:
        `num_videos`, `sampler`, `samples` (the file that lists them), `num_cut_prompts` (how many prompts were longer than the
        text encoder takes; None when every video was there already).

    Raises:
        ConfigError: no prompts, a size that the model cannot make, an image of another shape, not one image a prompt.
        DataError: an image or clip that cannot be read.
        CheckpointError: the model is missing, or is not one that this sampler loads.
        Interrupted: stopped on request; finished videos stay.
    """
    if not models_folder(config.run).exists():
        raise CheckpointError(f"run = {config.run!r} does not exist: give a training run of a DiT, a checkpoint, or an export.")
    prompts = read_prompts(config)
    folder = run.path / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    if config.images and len(config.images) != len(prompts):
        raise ConfigError(f"images lists {len(config.images)} files for {len(prompts)} prompts: give one for each, in order.")
    done, num_cut = 0, None
    while done < len(prompts) and _video_path(folder, done).exists():
        done += 1
    if done < len(prompts):
        make = _with_diffusers if config.sampler == "diffusers" else _with_videofm
        num_cut = make(config, run, prompts, done)
    _write_list(config, run, prompts)
    shown = [media.read_video(_video_path(folder, index)) for index in range(min(len(prompts), _SHEET_VIDEOS))]
    media.contact_sheet(shown, prompts[: len(shown)], folder / "contact_sheet.png")
    listed = str(run.path / "samples.jsonl")
    return {"num_videos": len(prompts), "sampler": config.sampler, "samples": listed, "num_cut_prompts": num_cut}


def read_prompts(config: SampleConfig) -> list[str]:
    """The captions of `prompts`, or the lines of `prompts_file` that are not blank.

    Raises:
        ConfigError: the file is missing, is not text, or has no prompt.
    """
    if config.prompts_file is None:
        return list(config.prompts)
    try:
        lines = Path(config.prompts_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts_file = {config.prompts_file!r} cannot be read as text: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"prompts_file = {config.prompts_file!r} is empty: write one caption a line.")
    return prompts


def _with_videofm(config: SampleConfig, run: RunDirectory, prompts: list[str], done: int) -> int:
    """Make the videos from number `done` on; how many of all prompts the text encoder cuts."""
    settings = SamplingSettings.from_config(config)
    pipeline = Pipeline.load(config.run, ema=config.ema, schedule=settings.schedule, dtype=_DTYPES[config.dtype])
    always = [_condition(config, pipeline.vae.compression, given) for given in config.conditions]
    num_batches = -(-(len(prompts) - done) // config.batch_size)
    num_windows = len(spans(config.num_frames, settings.window))
    with progress("sampling steps", num_batches * num_windows * config.num_steps) as bar:

        def on_step() -> None:
            if run.stop_requested:
                raise Interrupted("sampling stopped on request; finished videos stay")
            bar.advance(1)

        while done < len(prompts):
            batch = range(done, min(done + config.batch_size, len(prompts)))
            videos = pipeline.generate(
                [prompts[index] for index in batch],
                conditions=[*_first_frames(config, pipeline.vae.compression, batch), *always],
                batch_size=config.batch_size,
                first_index=done,
                on_step=on_step,
                settings=settings,
            )
            for index, video in zip(batch, videos, strict=True):
                media.write_video(_video_path(run.path / "samples", index), media.to_frames(video), config.fps)
            done = batch.stop
    return pipeline.num_cut_prompts(prompts, config.prompt_suffix)


def _first_frames(config: SampleConfig, compression: Compression, batch: range) -> list[PixelCondition]:
    """The first frames of the videos of `batch`: of each its own, or one for all; empty where none are given."""
    files = [config.images[index] for index in batch] if config.images else [config.image] if config.image else []
    size = (config.height, config.width, compression, config.fit)
    return [PixelCondition(torch.cat([fitted(read_image(file), *size) for file in files]))] if files else []


def _condition(config: SampleConfig, compression: Compression, given: ConditionConfig) -> PixelCondition:
    frames = read_image(given.image) if given.image else last_frames(given.video or "", given.num_frames or 1)
    video = fitted(frames, config.height, config.width, compression, config.fit)
    return PixelCondition(video, given.frame, given.strength)


def _with_diffusers(config: SampleConfig, run: RunDirectory, prompts: list[str], done: int) -> int:
    """As `_with_videofm`, in a process of plain diffusers."""
    if config.num_steps < 2 or config.height % _PUBLIC_MULTIPLE or config.width % _PUBLIC_MULTIPLE:
        raise ConfigError(
            f"num_steps {config.num_steps} at {config.height}x{config.width}: LTXPipeline of diffusers takes 2 steps or more "
            f"(its schedule is undefined for 1), and a height and width in multiples of {_PUBLIC_MULTIPLE}."
        )
    wanted = range(done, len(prompts))
    settings = ("num_frames", "height", "width", "fps", "num_steps", "guidance_scale", "batch_size")
    request = {name: getattr(config, name) for name in settings} | {
        "prompts": prompts[done:],
        "all_prompts": prompts,
        "seeds": [video_seed(config.seed, index) for index in wanted],
        "names": [f"{index:03d}" for index in wanted],
    }
    waiting = list(wanted)
    with progress("videos from diffusers", len(prompts)) as bar:
        bar.start_at(done)

        def take(output: Path) -> None:
            while waiting and (output / f"{waiting[0]:03d}.npy").exists():
                index = waiting.pop(0)
                frames = np.load(output / f"{index:03d}.npy", allow_pickle=False)
                media.write_video(_video_path(run.path / "samples", index), frames, config.fps)
                bar.advance(1)

        said = run_diffusers(models_folder(config.run), run, request, take)
    assert not waiting, f"the child ended well, but made no video {waiting}"
    num_cut: int = said["num_cut_prompts"]
    if num_cut:
        LOG.warning("%d of %d prompts are longer than LTXPipeline takes; their ends are cut", num_cut, len(prompts))
    return num_cut


def _write_list(config: SampleConfig, run: RunDirectory, prompts: list[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"file": f"samples/{index:03d}.mp4", "caption": prompt, "seed": video_seed(config.seed, index)}
        for index, prompt in enumerate(prompts)
    ]
    for index, row in enumerate(rows):
        if config.image or config.images:
            row["image"] = config.images[index] if config.images else config.image
    write_atomic(run.path / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _video_path(folder: Path, index: int) -> Path:
    return folder / f"{index:03d}.mp4"
