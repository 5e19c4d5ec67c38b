"""Sources for the benchmark of curation: videos of shots that pan over a random scene under noise, no two alike."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

Array = np.ndarray[Any, Any]


def render(folder: Path, num_files: int, seconds: tuple[float, float], size: tuple[int, int], num_processes: int) -> None:
    """Files of H.264 at 25 frames a second, as a phone or a web site writes them (with B-frames), in shots of 2 to 4 seconds.

    Args:
        folder: an empty one.
        num_files: how many.
        seconds: lengths go evenly from the first to the second.
        size: height and width of a frame.
        num_processes: renderers at once.
    """
    lengths = np.linspace(*seconds, num_files) * 25
    _in_processes(num_processes, _render_shots, [(folder, index, round(length), size) for index, length in enumerate(lengths)])


def render_tiny(folder: Path, num_files: int, num_processes: int) -> None:
    """Files of 12 frames of 64x64: one shot each, every one of its own."""
    steps = [(folder, first, min(first + 250, num_files)) for first in range(0, num_files, 250)]
    _in_processes(num_processes, _render_tiny, steps)


def _in_processes(num_processes: int, function: Any, tasks: list[Any]) -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        for future in [pool.submit(function, *task) for task in tasks]:
            future.result()


def _render_shots(folder: Path, index: int, num_frames: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng([7, index])
    with _writer(folder / f"video-{index:05d}.mp4", size, "veryfast") as write:
        while num_frames > 0:
            length = min(num_frames, int(rng.integers(50, 100)))
            length = num_frames if num_frames - length < 25 else length
            for image in _shot(rng, length, size):
                write(image)
            num_frames -= length


def _render_tiny(folder: Path, first: int, last: int) -> None:
    for index in range(first, last):
        rng = np.random.default_rng([8, index])
        with _writer(folder / f"video-{index:05d}.mp4", (64, 64), "ultrafast") as write:
            for image in _shot(rng, 12, (64, 64)):
                write(image)


def _shot(rng: np.random.Generator, num_frames: int, size: tuple[int, int]) -> Iterator[Array]:
    """A camera that pans over a scene of blobs and edges, with the noise of a sensor."""
    height, width = size
    coarse = rng.integers(20, 236, (9, 16, 3), dtype=np.uint8)
    scene = cv2.resize(coarse, (width * 3 // 2, height * 3 // 2), interpolation=cv2.INTER_CUBIC)
    for _ in range(30):
        centre = (int(rng.integers(scene.shape[1])), int(rng.integers(scene.shape[0])))
        radius = int(rng.integers(height // 24 + 1, height // 6 + 2))
        cv2.circle(scene, centre, radius, rng.integers(0, 256, 3).tolist(), -1, cv2.LINE_AA)
    noise = rng.normal(0, 3, (4, *scene.shape)).astype(np.int8)
    (top, left), (bottom, right) = rng.integers(0, (height // 2, width // 2)), rng.integers(0, (height // 2, width // 2))
    for frame in range(num_frames):
        at = frame / max(1, num_frames - 1)
        y, x = round(top + (bottom - top) * at), round(left + (right - left) * at)
        window = (slice(y, y + height), slice(x, x + width))
        yield np.clip(scene[window].astype(np.int16) + noise[frame % 4][window], 0, 255).astype(np.uint8)


@contextmanager
def _writer(path: Path, size: tuple[int, int], preset: str) -> Iterator[Callable[[Array], None]]:
    """Gives a function that appends an RGB frame to the file."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"crf": "23", "preset": preset, "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        yield lambda image: container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
