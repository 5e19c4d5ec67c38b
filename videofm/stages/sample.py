"""Stage `sample`: one video for each prompt, as MP4 files, a list of them and a contact sheet.

```
samples/000.mp4 ...  samples/contact_sheet.png  samples.jsonl
```
A row of the list has `file`, `caption` (the first prompt), `seed` (that of the video's noise generator), `image` (the first
frame, where one is given), and for a video that was made in windows `windows`: of each its new frames `start` to `stop - 1` and
its `prompt`. `dit_seconds` and, with a guide, `ar_seconds` are the measured times of the batch divided by its videos.

A video depends on (config, index) alone, so an interrupted run goes on behind the last video that was written. Windows go to
the file as they are made: memory does not grow with the length of a video.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videofm import media
from videofm.config import SampleConfig
from videofm.config.sample import ConditionConfig, SamplerConfig
from videofm.errors import CheckpointError, ConfigError, Interrupted
from videofm.progress import LOG, progress
from videofm.run_dir import RunDirectory, read_jsonl, write_atomic
from videofm.sampling import PixelCondition
from videofm.sampling.images import fitted, last_frames, read_image
from videofm.sampling.loading import load_pipeline
from videofm.sampling.noise import video_seed
from videofm.sampling.request import MadeWindow
from videofm.sampling.settings import SamplingSettings
from videofm.sampling.source import models_folder
from videofm.sampling.storyboard import SUFFIXES, Prompt, check_storyboards, prompt_at, read_storyboards, texts_of
from videofm.sampling.windows import Window, new_frames, spans
from videofm.stages.diffusers_process import run_diffusers
from videofm.types import Compression

_SHEET_VIDEOS = 96
"""Most videos on the contact sheet."""
_STRIP, _LONGEST_STRIP = 5, 16
"""Frames of a video on the contact sheet, and of one with many windows, which shows two a window up to this."""
_SECONDS = ("ar_seconds", "dit_seconds")
_PUBLIC_MULTIPLE = 32
"""LTXPipeline refuses other sizes, whatever the VAE."""


def run(config: SampleConfig, run: RunDirectory) -> dict[str, Any]:
    """Make the videos that are not there yet.

    Returns:
        `num_videos`, `sampler`, `samples` (the file that lists them), `num_cut_prompts` (how many prompts were longer than the
        text encoder takes; None when every video was there already).

    Raises:
        ConfigError: no prompts, a size that the model cannot make, an image of another shape, not one image a prompt, a
            storyboard that does not fit the video.
        DataError: an image or clip that cannot be read.
        CheckpointError: the model is missing, or is not one that this sampler loads.
        Interrupted: stopped on request; finished videos stay.
    """
    if not models_folder(config.run).exists():
        raise CheckpointError(f"run = {config.run!r} does not exist: give a training run of a DiT, a checkpoint, or an export.")
    prompts = _videos(config)
    check_storyboards(prompts, config.num_frames, _new_frames(config))
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
    _write_sheet(config, prompts[:_SHEET_VIDEOS], folder)
    listed = str(run.path / "samples.jsonl")
    return {"num_videos": len(prompts), "sampler": config.sampler, "samples": listed, "num_cut_prompts": num_cut}


def read_prompts(config: SamplerConfig) -> list[str]:
    """The captions of `prompts`, or the lines of `prompts_file` that are not blank.

    Raises:
        ConfigError: the file is missing, is not text, or has no prompt; it is a storyboard.
    """
    if config.prompts_file is None:
        return list(config.prompts)
    if Path(config.prompts_file).suffix in SUFFIXES:
        raise ConfigError(
            f"prompts_file = {config.prompts_file!r} is a storyboard: a text file with one caption a line is needed."
        )
    try:
        lines = Path(config.prompts_file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts_file = {config.prompts_file!r} cannot be read as text: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"prompts_file = {config.prompts_file!r} is empty: write one caption a line.")
    return prompts


def _videos(config: SampleConfig) -> list[Prompt]:
    """What each video is told: storyboards, or captions as `read_prompts` reads them."""
    if config.prompts_file is not None and Path(config.prompts_file).suffix in SUFFIXES:
        return list(read_storyboards(config.prompts_file))
    return list(read_prompts(config))


def _with_videofm(config: SampleConfig, run: RunDirectory, prompts: list[Prompt], done: int) -> int:
    """Make the videos from number `done` on; how many of all prompts the text encoder cuts."""
    settings = SamplingSettings.from_config(config)
    pipeline = load_pipeline(config, settings)
    always = [_condition(config, pipeline.vae.compression, given) for given in config.conditions]
    num_batches = -(-(len(prompts) - done) // config.batch_size)
    num_windows = len(_new_frames(config))
    with progress("sampling steps", num_batches * num_windows * config.num_steps) as bar:

        def stop_if_asked() -> None:
            if run.stop_requested:
                raise Interrupted("sampling stopped on request; finished videos stay")

        def on_step() -> None:
            stop_if_asked()
            bar.advance(1)

        while done < len(prompts):
            batch = range(done, min(done + config.batch_size, len(prompts)))
            windows = pipeline.stream_windows(
                [prompts[index] for index in batch],
                conditions=[*_first_frames(config, pipeline.vae.compression, batch), *always],
                first_index=done,
                on_step=on_step,
                on_token=stop_if_asked,
                settings=settings,
            )
            measured = _write(windows, [_video_path(run.path / "samples", index) for index in batch], config.fps)
            done = batch.stop
            _write_list(config, run, prompts[:done], dict.fromkeys(batch, measured))
    return pipeline.num_cut_prompts(prompts, config.prompt_suffix)


def _write(windows: Iterator[MadeWindow], paths: list[Path], fps: float) -> dict[str, float]:
    """Put each window into the files as it is made; the measured seconds of a video, see the head of this file."""
    ar_seconds, dit_seconds, guided = 0.0, 0.0, False
    with ExitStack() as stack:
        writers = [stack.enter_context(media.VideoWriter(path, fps)) for path in paths]
        for made in windows:
            for writer, video in zip(writers, made.video, strict=True):
                writer.write(media.to_frames(video))
            ar_seconds, dit_seconds = ar_seconds + made.ar_seconds, dit_seconds + made.dit_seconds
            guided = made.indices is not None
    seconds = {"dit_seconds": dit_seconds / len(paths)}
    return seconds | {"ar_seconds": ar_seconds / len(paths)} if guided else seconds


def _new_frames(config: SampleConfig) -> list[range]:
    """The new frames of each window of a video."""
    window = None if config.window is None else Window(config.window.num_frames, config.window.overlap_frames)
    return new_frames(spans(config.num_frames, window))


def _first_frames(config: SampleConfig, compression: Compression, batch: range) -> list[PixelCondition]:
    """The first frames of the videos of `batch`: of each its own, or one for all; empty where none are given."""
    files = [config.images[index] for index in batch] if config.images else [config.image] if config.image else []
    size = (config.height, config.width, compression, config.fit)
    return [PixelCondition(torch.cat([fitted(read_image(file), *size) for file in files]))] if files else []


def _condition(config: SampleConfig, compression: Compression, given: ConditionConfig) -> PixelCondition:
    frames = read_image(given.image) if given.image else last_frames(given.video or "", given.num_frames or 1)
    video = fitted(frames, config.height, config.width, compression, config.fit)
    return PixelCondition(video, given.frame, given.strength)


def _with_diffusers(config: SampleConfig, run: RunDirectory, prompts: list[Prompt], done: int) -> int:
    """As `_with_videofm`, in a process of plain diffusers, which makes videos at once: each has one prompt."""
    if config.num_steps < 2 or config.height % _PUBLIC_MULTIPLE or config.width % _PUBLIC_MULTIPLE:
        raise ConfigError(
            f"num_steps {config.num_steps} at {config.height}x{config.width}: LTXPipeline of diffusers takes 2 steps or more "
            f"(its schedule is undefined for 1), and a height and width in multiples of {_PUBLIC_MULTIPLE}."
        )
    wanted = range(done, len(prompts))
    settings = ("num_frames", "height", "width", "fps", "num_steps", "guidance_scale", "batch_size")
    texts = [prompt_at(prompt, 0) for prompt in prompts]
    request = {name: getattr(config, name) for name in settings} | {
        "prompts": texts[done:],
        "all_prompts": texts,
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


def _write_list(
    config: SampleConfig, run: RunDirectory, prompts: Sequence[Prompt], measured: dict[int, dict[str, float]] | None = None
) -> None:
    """The rows of the videos of `prompts`; those that were made before keep their seconds."""
    path, windows = run.path / "samples.jsonl", _new_frames(config)
    before = {row["file"]: row for row in read_jsonl(path)}
    rows: list[dict[str, Any]] = []
    for index, prompt in enumerate(prompts):
        row: dict[str, Any] = {"file": f"samples/{index:03d}.mp4", "caption": prompt_at(prompt, 0)}
        row["seed"] = video_seed(config.seed, index)
        if config.image or config.images:
            row["image"] = config.images[index] if config.images else config.image
        if len(windows) > 1:
            row["windows"] = [{"start": new.start, "stop": new.stop, "prompt": prompt_at(prompt, new.start)} for new in windows]
        known = before.get(row["file"], {})
        seconds = (measured or {}).get(index) or {name: known[name] for name in _SECONDS if name in known}
        rows.append(row | seconds)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_sheet(config: SampleConfig, prompts: Sequence[Prompt], folder: Path) -> None:
    """Strips of frames that are spread over the whole length; no video is in memory as a whole, no frame larger than shown."""
    num_frames = max(_STRIP, min(2 * len(_new_frames(config)), _LONGEST_STRIP))
    shown = [media.spread_frames(_video_path(folder, index), num_frames) for index in range(len(prompts))]
    captions = [" -> ".join(text for text, _ in groupby(texts_of(prompt))) for prompt in prompts]
    columns = max(1, 3 * _STRIP // num_frames)
    media.contact_sheet(shown, captions, folder / "contact_sheet.png", num_frames, columns)


def _video_path(folder: Path, index: int) -> Path:
    return folder / f"{index:03d}.mp4"
