"""Stage `sample`: one video for each prompt, as MP4 files, a list of them and a contact sheet.

```
samples/000.mp4 ...  samples/contact_sheet.png  samples.jsonl (file, caption, seed: that of the video's noise generator)
```
A video depends on (config, index) alone, so an interrupted run goes on behind the last video that was written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from videofm import media
from videofm.config import SampleConfig
from videofm.errors import CheckpointError, ConfigError, Interrupted
from videofm.progress import progress
from videofm.run_dir import RunDirectory, write_atomic
from videofm.sampling import Pipeline
from videofm.sampling.noise import video_seed
from videofm.sampling.pipeline import models_folder
from videofm.stages.diffusers_process import run_diffusers

_SHEET_VIDEOS = 96
"""Most videos on the contact sheet."""
_PUBLIC_MULTIPLE = 32
"""LTXPipeline refuses other sizes, whatever the VAE."""


def run(config: SampleConfig, run: RunDirectory) -> dict[str, Any]:
    """Make the videos that are not there yet.

    Returns:
        `num_videos`, `sampler`, `samples` (the file that lists them).

    Raises:
        ConfigError: no prompts, a size that the model cannot make.
        CheckpointError: the model is missing, or is not one that this sampler loads.
        Interrupted: stopped on request; finished videos stay.
    """
    if not models_folder(config.run).exists():
        raise CheckpointError(f"run = {config.run!r} does not exist: give a training run of a DiT, a checkpoint, or an export.")
    prompts = read_prompts(config)
    folder = run.path / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    while done < len(prompts) and _video_path(folder, done).exists():
        done += 1
    if done < len(prompts):
        make = _with_diffusers if config.sampler == "diffusers" else _with_videofm
        make(config, run, prompts, done)
    _write_list(config, run, prompts)
    shown = [media.read_video(_video_path(folder, index)) for index in range(min(len(prompts), _SHEET_VIDEOS))]
    media.contact_sheet(shown, prompts[: len(shown)], folder / "contact_sheet.png")
    return {"num_videos": len(prompts), "sampler": config.sampler, "samples": str(run.path / "samples.jsonl")}


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


def _with_videofm(config: SampleConfig, run: RunDirectory, prompts: list[str], done: int) -> None:
    pipeline = Pipeline.load(config.run, ema=config.ema)
    num_batches = -(-(len(prompts) - done) // config.batch_size)
    with progress("sampling steps", num_batches * config.num_steps) as bar:

        def on_step() -> None:
            if run.stop_requested:
                raise Interrupted("sampling stopped on request; finished videos stay")
            bar.advance(1)

        batches = pipeline.stream(
            prompts[done:],
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            fps=config.fps,
            seed=config.seed,
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            batch_size=config.batch_size,
            first_index=done,
            on_step=on_step,
        )
        for videos in batches:
            for video in videos:
                media.write_video(_video_path(run.path / "samples", done), media.to_frames(video), config.fps)
                done += 1


def _with_diffusers(config: SampleConfig, run: RunDirectory, prompts: list[str], done: int) -> None:
    if config.num_steps < 2 or config.height % _PUBLIC_MULTIPLE or config.width % _PUBLIC_MULTIPLE:
        raise ConfigError(
            f"num_steps {config.num_steps} at {config.height}x{config.width}: LTXPipeline of diffusers takes 2 steps or more "
            f"(its schedule is undefined for 1), and a height and width in multiples of {_PUBLIC_MULTIPLE}."
        )
    wanted = range(done, len(prompts))
    settings = ("num_frames", "height", "width", "fps", "num_steps", "guidance_scale", "batch_size")
    request = {name: getattr(config, name) for name in settings} | {
        "prompts": prompts[done:],
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

        run_diffusers(models_folder(config.run), run, request, take)
    assert not waiting, f"the child ended well, but made no video {waiting}"


def _write_list(config: SampleConfig, run: RunDirectory, prompts: list[str]) -> None:
    rows = [
        {"file": f"samples/{index:03d}.mp4", "caption": prompt, "seed": video_seed(config.seed, index)}
        for index, prompt in enumerate(prompts)
    ]
    write_atomic(run.path / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _video_path(folder: Path, index: int) -> Path:
    return folder / f"{index:03d}.mp4"
