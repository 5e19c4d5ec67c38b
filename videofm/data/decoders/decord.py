"""Decoding by decord, which brings an old FFmpeg (no AV1). Sound on our own clips; not for raw files from elsewhere."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from videofm.data.decode import VideoInfo, check_indices, describe
from videofm.errors import DataError


class DecordDecoder:
    """See `videofm.data.decode.Decoder`."""

    name = "decord"

    def unavailable(self) -> str | None:
        try:
            import decord  # noqa: F401
        except (ImportError, OSError, RuntimeError) as error:
            return (
                f"decord does not load ({str(error).splitlines()[0]}); install it with `pip install decord` "
                "(Linux on x86_64 only; elsewhere take pyav)"
            )
        return None

    def probe(self, source: bytes | Path) -> VideoInfo:
        reader = _open(source)
        num_frames, fps = len(reader), float(reader.get_avg_fps())
        height, width, _ = _frames(reader, [0], source).shape[1:]
        return VideoInfo(num_frames, fps, int(height), int(width), num_frames / fps if fps else 0.0)

    def read(self, source: bytes | Path, indices: Sequence[int]) -> np.ndarray[Any, Any]:
        reader = _open(source)
        return _frames(reader, check_indices(indices, len(reader)), source)


def _open(source: bytes | Path) -> Any:
    import decord

    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        return decord.VideoReader(file, ctx=decord.cpu(0), num_threads=1)
    except (RuntimeError, decord.DECORDError) as error:
        raise DataError(f"decord cannot open {describe(source)}: {_first_line(error)}") from None


def _frames(reader: Any, indices: list[int], source: bytes | Path) -> np.ndarray[Any, Any]:
    import decord

    try:
        frames: np.ndarray[Any, Any] = reader.get_batch(indices).asnumpy()
    except (RuntimeError, IndexError, decord.DECORDError) as error:
        raise DataError(f"decord cannot decode {describe(source)}: {_first_line(error)}") from None
    return frames


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


DECODER = DecordDecoder()
