"""Decoding by torchcodec, which uses the FFmpeg libraries of the system. Always in exact seek mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from videofm.data.decode import VideoInfo, check_indices, describe
from videofm.errors import DataError


class TorchCodecDecoder:
    """See `videofm.data.decode.Decoder`."""

    name = "torchcodec"

    def unavailable(self) -> str | None:
        try:
            from torchcodec.decoders import VideoDecoder  # noqa: F401
        except (ImportError, RuntimeError, OSError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            return (
                f"torchcodec does not load ({first}); it needs `pip install torchcodec` in the build of the installed torch, "
                "and the FFmpeg libraries of the system (`apt-get install ffmpeg`)"
            )
        return None

    def probe(self, source: bytes | Path) -> VideoInfo:
        facts = _open(source).metadata
        fps, num_frames = float(facts.average_fps or 0), int(facts.num_frames or 0)
        duration = float(facts.duration_seconds or 0)
        shape = self.read(source, [0]).shape if num_frames else (0, 0, 0, 3)
        return VideoInfo(num_frames, fps, shape[1], shape[2], duration)

    def read(self, source: bytes | Path, indices: Sequence[int]) -> np.ndarray[Any, Any]:
        decoder = _open(source)
        wanted = check_indices(indices, int(decoder.metadata.num_frames or 0))
        try:
            frames: np.ndarray[Any, Any] = decoder.get_frames_at(wanted).data.numpy()
        except (RuntimeError, IndexError, ValueError) as error:
            raise DataError(f"torchcodec cannot decode {describe(source)}: {_first_line(error)}") from None
        return frames


def _open(source: bytes | Path) -> Any:
    from torchcodec.decoders import VideoDecoder

    try:
        return VideoDecoder(
            source if isinstance(source, bytes) else str(source),
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            seek_mode="exact",
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(f"torchcodec cannot open {describe(source)}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


DECODER = TorchCodecDecoder()
