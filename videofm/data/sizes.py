"""Which stored clips the one size of `data` can be taken from, and what to do where none is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from videofm.config.data import DataConfig
from videofm.data.draws import Shape


def frame_size(height: int, width: int, config: DataConfig) -> tuple[int, int]:
    """Height and width of a clip's frames before the crop, from those stored; in pixels."""
    side, short = config.resize_short_side, min(height, width)
    if side is None:
        return height, width
    return round(height * side / short), round(width * side / short)


def refusal(shape: Shape, config: DataConfig) -> str | None:
    """Why a stored clip cannot be used; None where it can."""
    if not _right_size(shape, config):
        return f"no window of {config.height}x{config.width} can be taken from its frames"
    if shape.num_frames < (fewest := num_stored(config)):
        return f"fewer than {fewest} frames"
    return None


def num_stored(config: DataConfig) -> int:
    """Stored frames that a clip needs at the smallest stride."""
    return (config.num_frames - 1) * min(config.frame_strides) + 1


def no_clip(shapes: Counter[Shape], config: DataConfig, split: str) -> str:
    """What to say where none of the stored clips, counted by shape, can be used."""
    right = [shape for shape in shapes if _right_size(shape, config)]
    if not right:
        return _no_size(shapes, config, split)
    needed = num_stored(config)
    at = f" (data.num_frames {config.num_frames} at stride {min(config.frame_strides)})" if needed > config.num_frames else ""
    return (
        f"no clip of split {split!r} has {needed} frames{at}; the longest has {max(shape.num_frames for shape in right)}. "
        f"Lower data.num_frames{' or data.frame_strides' if min(config.frame_strides) > 1 else ''}, or curate longer clips."
    )


def _right_size(shape: Shape, config: DataConfig) -> bool:
    if min(shape.height, shape.width) < (config.resize_short_side or 0):
        return False
    height, width = frame_size(shape.height, shape.width, config)
    if config.crop == "none":
        return (height, width) == (config.height, config.width)
    return height >= config.height and width >= config.width


def _no_size(shapes: Iterable[Shape], config: DataConfig, split: str) -> str:
    sizes = sorted({(shape.height, shape.width) for shape in shapes})
    stored = ", ".join(f"{height}x{width}" for height, width in sizes) or "none"
    wanted = f"at {config.height}x{config.width}{'' if config.crop == 'none' else ' or larger'}"
    if config.resize_short_side is not None:
        wanted = f"so that a shorter side of {config.resize_short_side} (data.resize_short_side) makes it {wanted[3:]}"
    fix = "to one of them, set data.crop" if config.crop == "none" else "smaller"
    return (
        f"no clip of split {split!r} is stored {wanted}; stored are {stored}. "
        f"Set data.height and data.width {fix}, or transcode to this size in the curate stage."
    )
