"""The demo set: short H.264 files of coloured shapes that move, with captions, and broken files that curation must catch.

Every byte follows from the config: a shot is drawn by a generator keyed by (seed, video, shot), and the encoder has one
thread.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from videofm.config.curate import DemoDataConfig
from videofm.errors import Interrupted
from videofm.progress import LOG, progress
from videofm.run_dir import RunDirectory, write_atomic, write_json
from videofm.shapes import BACKGROUND_LEVELS, COLOURS, DIRECTIONS, MAX_TINT, Motif, captions, motifs

RADIUS = 7 / 32
"""Radius of a circle, and half the side of a square times 1.1, over the side of the frame."""


def run(config: DemoDataConfig, run: RunDirectory) -> dict[str, Any]:
    """Write `videos/` (files with sidecars) and `prompts.txt` (all 48 captions) into the run directory.

    Returns:
        `num_videos`, `num_shots` and `num_broken`.

    Raises:
        Interrupted: `control/stop` was touched.
    """
    folder = run.path / "videos"
    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_shots(config)
    with progress("demo videos", total=config.num_videos) as bar:
        for index, shots in enumerate(plan):
            if run.stop_requested:
                raise Interrupted(f"rendering stopped at video {index} of {config.num_videos}; run it again to go on")
            sidecar = folder / f"demo-{index:05d}.json"  # written last: where it is, an earlier attempt finished the video
            if not sidecar.exists():
                write_video(sidecar.with_suffix(".mp4"), render_video(config, index, shots), config.fps)
                write_json(sidecar, {"captions": caption_spans(told(config, index, shots), config.num_frames)})
            bar.advance()
    num_broken = len(write_broken(folder, config)) if config.broken else 0
    write_atomic(run.path / "prompts.txt", "".join(f"{text}\n" for text in captions()))
    LOG.info("%d videos of %d shots, %d broken files in %s", config.num_videos, config.shots_per_video, num_broken, folder)
    return {"num_videos": config.num_videos, "num_shots": config.num_videos * config.shots_per_video, "num_broken": num_broken}


def plan_shots(config: DemoDataConfig) -> list[list[Motif]]:
    """What each shot of each video shows. Over the set every motif comes as often as any other (to within one)."""
    rng = np.random.default_rng([config.seed, 0])
    deck: list[Motif] = []
    plan: list[list[Motif]] = []
    for _ in range(config.num_videos):
        while len(deck) < config.shots_per_video:
            deck += [motifs()[i] for i in rng.permutation(len(motifs()))]
        plan.append(deck[: config.shots_per_video])
        deck = deck[config.shots_per_video :]
    return plan


def told(config: DemoDataConfig, index: int, shots: list[Motif]) -> list[Motif]:
    """What the captions of video `index` say: the shots, but for a share of `config.wrong_direction` with one of the three
    directions that are not shown."""
    rng = np.random.default_rng([config.seed, 3, index])
    draws, turns = rng.random(len(shots)), rng.integers(1, len(DIRECTIONS), len(shots))
    return [
        replace(shot, direction=_turned(shot.direction, turn)) if draw < config.wrong_direction else shot
        for shot, draw, turn in zip(shots, draws, turns, strict=True)
    ]


def _turned(direction: str, turn: int) -> str:
    """The direction that comes `turn` places behind `direction`."""
    names = list(DIRECTIONS)
    return names[(names.index(direction) + turn) % len(names)]


def caption_spans(shots: list[Motif], num_frames: int) -> list[dict[str, Any]]:
    """The sidecar's intervals, end exclusive, for shots of `num_frames` frames."""
    spans = [(i * num_frames, (i + 1) * num_frames, motif.caption) for i, motif in enumerate(shots)]
    return [{"start_frame": start, "end_frame": stop, "caption": caption} for start, stop, caption in spans]


def render_video(config: DemoDataConfig, index: int, shots: list[Motif]) -> np.ndarray[Any, Any]:
    """The frames of video `index`, uint8 `(T, H, W, 3)`: its shots, on backgrounds that differ enough for a cut to be found."""
    parts = []
    for number, motif in enumerate(shots):
        rng = np.random.default_rng([config.seed, 1, index, number])
        frames = render_shot(
            *(motif.colour, motif.shape, motif.direction, config.num_frames, config.size, rng, number % 2 == 1),
            speeds=(config.speed[0], config.speed[1]),
            radius=config.radius,
        )
        parts.append(frames)
    return np.concatenate(parts)


def render_shot(
    colour: str,
    shape: str,
    direction: str,
    num_frames: int,
    size: int,
    rng: np.random.Generator,
    light: bool | None = None,
    speeds: tuple[float, float] = (0.8, 1.0),
    radius: float = RADIUS,
) -> np.ndarray[Any, Any]:
    """A shape that moves over a still background, uint8 `(num_frames, size, size, 3)`.

    Args:
        rng: draws background, place and speed.
        light: whether the background is of the lighter half of its range; None draws that too. Neighbours in a video differ.
        speeds: lowest and highest speed, in pixels a frame at size 32; less where that would leave the frame.
        radius: of a circle, and half the side of a square times 1.1, over `size`.
    """
    light = bool(rng.integers(2)) if light is None else light
    background = _background(size, rng, light)
    radius *= size
    room = size - 1.3 * radius  # the centre stays this far within the frame, so most of the shape is in view
    speed = min(rng.uniform(*speeds) * size / 32, room / max(num_frames - 1, 1))
    travel = speed * (num_frames - 1)
    dy, dx = DIRECTIONS[direction]
    across = rng.uniform(radius, size - radius)
    slack = rng.uniform(-0.5, 0.5) * (room - travel)
    along = size / 2 + slack + (np.arange(num_frames) * speed - travel / 2) * (dy + dx)
    ys, xs = (along, np.full(num_frames, across)) if dy else (np.full(num_frames, across), along)
    cover = _coverage(shape, ys - 0.5, xs - 0.5, radius, size)[..., None]  # (T, H, W, 1)
    paint = np.array(COLOURS[colour], np.float64) * rng.uniform(0.92, 1.0)
    return np.asarray(np.rint(background * (1 - cover) + paint * cover), np.uint8)


def _background(size: int, rng: np.random.Generator, light: bool) -> np.ndarray[Any, Any]:
    """Nearly grey with a slight gradient, `(H, W, 3)`. Warm where light and cool where dark, so that a cut changes hue too."""
    low, high = BACKGROUND_LEVELS
    middle = (low + high) / 2
    level = rng.uniform(middle + 10, high - 8) if light else rng.uniform(low + 8, middle - 15)
    slope = rng.uniform(-8, 8, 2)
    ramp = np.linspace(-0.5, 0.5, size)
    grey = level + slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    tint = np.array([1.0, 0.0, -1.0]) * (MAX_TINT / 2 - 0.5) * (1 if light else -1)
    return np.clip(grey[..., None] + tint, low, high)


def _coverage(shape: str, ys: np.ndarray[Any, Any], xs: np.ndarray[Any, Any], radius: float, size: int) -> np.ndarray[Any, Any]:
    """Share of each pixel that the shape covers, `(T, H, W)`, for centres `ys`, `xs` `(T,)`."""
    pixels = np.arange(size)
    vertical = np.abs(pixels[None, :] - ys[:, None])[:, :, None]  # (T, H, 1)
    horizontal = np.abs(pixels[None, :] - xs[:, None])[:, None, :]  # (T, 1, W)
    if shape == "circle":
        return np.clip(radius - np.hypot(vertical, horizontal) + 0.5, 0, 1)
    half = radius / 1.1
    return np.clip(half - vertical + 0.5, 0, 1) * np.clip(half - horizontal + 0.5, 0, 1)


def write_video(path: Path, frames: np.ndarray[Any, Any], fps: int) -> None:
    """Write `(T, H, W, 3)` uint8 as H.264 MP4; replaces `path` once it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    options = {"crf": "12", "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}  # see stages/transcode.py
    with av.open(str(temporary), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        converter = VideoReformatter()
        for image in frames:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(converter.reformat(frame, format="yuv420p", threads=1)))
        container.mux(stream.encode(None))
    temporary.replace(path)


def write_broken(folder: Path, config: DemoDataConfig) -> list[str]:
    """Write the files that curation must catch, beside ordinary ones; their names."""
    rng = np.random.default_rng([config.seed, 2])
    still = render_shot("red", "circle", "left", 2, config.size, rng)[:1].repeat(48, axis=0)
    first = folder / "demo-00000.mp4"
    write_video(folder / "odd-static.mp4", still, config.fps)
    write_video(folder / "odd-black.mp4", np.zeros_like(still), config.fps)
    shutil.copyfile(first, folder / "odd-duplicate.mp4")
    _remux(first, folder / "odd-remuxed.mkv")
    content = first.read_bytes()
    (folder / "odd-truncated.mp4").write_bytes(content[: len(content) * 6 // 10])
    _write_audio(folder / "odd-audio-only.mp4")
    (folder / "odd-empty.mp4").write_bytes(b"")
    (folder / "odd-text.mp4").write_text(json.dumps({"note": "this is not a video"}) + "\n", encoding="utf-8")
    return sorted(path.name for path in folder.glob("odd-*"))


def _remux(source: Path, target: Path) -> None:
    """The same packets in another container."""
    with av.open(str(source)) as read, av.open(str(target), "w", format="matroska", options={"fflags": "+bitexact"}) as write:
        stream = write.add_stream_from_template(read.streams.video[0])
        for packet in read.demux(read.streams.video[0]):
            if packet.size:
                packet.stream = stream
                write.mux(packet)


def _write_audio(path: Path) -> None:
    """A second of a tone as AAC, without a picture."""
    rate = 16000
    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=rate, layout="mono")
        for frame in _tone(rate):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _tone(rate: int) -> Iterator[Any]:
    length = 16 * 1024  # whole frames of AAC: a shorter last one would be filled up with what lies in memory
    samples = (0.2 * np.sin(2 * np.pi * 440 * np.arange(length) / rate)).astype(np.float32)
    for start in range(0, length, 1024):
        frame: Any = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        yield frame
