"""Image files, and the last frames of video files, as what a video is conditioned on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from videofm import media
from videofm.errors import ConfigError, DataError
from videofm.types import Compression

ImageSource = str | Path | np.ndarray[Any, Any] | Image.Image
"""A file, uint8 `(H, W, 3)`, or a PIL image."""


def is_image(source: Any) -> bool:
    """Whether `source` is one image, and not several."""
    return isinstance(source, str | Path | np.ndarray | Image.Image)


def read_image(source: ImageSource) -> media.Frames:
    """One frame, RGB uint8 `(1, H, W, 3)`, turned as the file says.

    Raises:
        DataError: it is missing or is no image.
    """
    try:
        image = Image.open(source) if isinstance(source, str | Path) else source
        if isinstance(image, Image.Image):
            image = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{source} cannot be read as an image: {error}") from None
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(f"an image is uint8 (H, W, 3), not {image.dtype} {image.shape}.")
    return image[None]


def last_frames(path: str | Path, num_frames: int) -> media.Frames:
    """The last `num_frames` frames of a video file, `(num_frames, H, W, 3)`.

    Raises:
        DataError: it cannot be read, or is shorter.
    """
    frames = media.read_video(path)
    if len(frames) < num_frames:
        raise DataError(f"{path} has {len(frames)} frames, and the last {num_frames} of them are wanted.")
    return frames[-num_frames:]


def fitted(frames: media.Frames, height: int, width: int, compression: Compression, fit: str | None = None) -> Tensor:
    """`frames` `(T, H, W, 3)` as a video `(1, 3, T, height, width)` in [-1, 1].

    Args:
        frames: of any size.
        height, width: wanted, in pixels.
        compression: of the VAE; a shape that differs by less than half a cell is cut to fit.
        fit: `crop` cuts what is too much, `pad` puts black around what is too little, None refuses another shape.

    Raises:
        ConfigError: the shape is another one, and `fit` does not say what to do.
    """
    have, want = frames.shape[1:3], (height, width)
    if fit is None and not _same_shape(have, want, compression):
        sizes = " or ".join(f"{rows}x{columns}" for rows, columns in nearest_sizes(have, want, compression))
        raise ConfigError(
            f"the image is {have[0]}x{have[1]} (height x width) and the video {height}x{width}: another shape. Make the video "
            f"{sizes}, or say how it fits: fit=crop or fit=pad."
        )
    resized = np.stack([_resized(frame, height, width, fit == "pad") for frame in frames])
    return torch.from_numpy(resized).permute(3, 0, 1, 2)[None].float() / 127.5 - 1  # (T, H, W, 3) -> (1, 3, T, H, W)


def nearest_sizes(have: tuple[int, int], want: tuple[int, int], compression: Compression) -> list[tuple[int, int]]:
    """Sizes that a video can have for an image of size `have`: with the width of `want`, and with its height."""
    height = max(1, round(want[1] * have[0] / have[1] / compression.height)) * compression.height
    width = max(1, round(want[0] * have[1] / have[0] / compression.width)) * compression.width
    return list(dict.fromkeys([(height, want[1]), (want[0], width)]))


def _same_shape(have: tuple[int, int], want: tuple[int, int], compression: Compression) -> bool:
    rows, columns = want[1] * have[0] / have[1], want[0] * have[1] / have[0]
    return abs(rows - want[0]) <= compression.height / 2 or abs(columns - want[1]) <= compression.width / 2


def _resized(frame: Any, height: int, width: int, whole: bool) -> Any:
    if frame.shape[:2] == (height, width):
        return frame
    image = Image.fromarray(frame)
    if whole:
        return np.asarray(ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color=(0, 0, 0)))
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
