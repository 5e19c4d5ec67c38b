"""Which pixels of a clip are read where nothing is drawn: what a cache holds, and what a plan draws that reads from one."""

from __future__ import annotations

from typing import Any

from videofm.config.data import DataConfig
from videofm.data import storage
from videofm.data.buckets import Buckets, covering
from videofm.data.draws import Draw, Shape
from videofm.data.index import ClipRecord
from videofm.data.manifest import Manifest
from videofm.data.reader import ClipRequest
from videofm.data.sizes import frame_size, refusal

_PLACING = ("sizes", "token", "aspect_tolerance", "max_crop")
"""Fields of the buckets that say which size a clip is brought to."""


def fixed_draw(record: ClipRecord, config: DataConfig, buckets: Buckets | None) -> Draw | None:
    """The one draw that a plan under `config`, which leaves nothing to chance, makes of a clip in any epoch; None where the
    clip is too short or of another size. Its epoch is 0."""
    shape = Shape(record.num_frames, record.height, record.width)
    if buckets is not None:
        place = buckets.place(shape)
        if isinstance(place, str):
            return None
        size = Shape(place.bucket.num_frames, place.bucket.height, place.bucket.width)
        resized = covering(record.height, record.width, place.bucket)
    else:
        if refusal(shape, config) is not None:
            return None
        size = Shape(config.num_frames, config.height, config.width)
        resized = frame_size(record.height, record.width, config)
    (stride,) = config.frame_strides if size.num_frames > 1 else [1]
    spare = record.num_frames - 1 - (size.num_frames - 1) * stride
    if spare < 0:
        return None
    start = spare // 2 if config.start == "centre" else 0
    top, left = (resized[0] - size.height) // 2, (resized[1] - size.width) // 2
    return Draw(record.key, 0, start, size.num_frames, stride, resized, top, left, size.height, size.width)


def geometry(config: DataConfig) -> dict[str, Any]:
    """How clips are cut, as plain values: where two of these are equal, the fixed draws are."""
    values: dict[str, Any] = {
        "num_frames": config.num_frames,
        "frame_strides": list(config.frame_strides),
        "height": config.height,
        "width": config.width,
        "resize_short_side": config.resize_short_side,
        "crop": config.crop,
        "start": config.start,
        "buckets": None,
    }
    if config.buckets is not None:
        section = config.buckets.model_dump(mode="json", include=set(_PLACING))
        section["sizes"] = sorted([size["num_frames"], size["height"], size["width"]] for size in section["sizes"])
        values |= {"buckets": section}
    return values


def pixels(draw: Draw) -> dict[str, list[int]]:
    """The frames and the window of a draw, as they enter a content key; the stored pixels are in [-1, 1] in any case."""
    return {
        "frames": [draw.start_frame, draw.num_frames, draw.stride],
        "resized": list(draw.resized),
        "window": [draw.top, draw.left, draw.height, draw.width],
    }


def clip_request(dataset: Manifest, shard: int, record: ClipRecord, draw: Draw) -> ClipRequest:
    """The pixels of a draw of a clip in row `shard` of a dataset's manifest."""
    facts = {name: dataset.table[name][shard].as_py() for name in ("sha256", "bytes", "config_hash")}
    return ClipRequest(
        key=record.key,
        place=storage.join(dataset.place, record.shard),
        offset=record.offset,
        size=record.size,
        sha256=record.sha256,
        shard_sha256=facts["sha256"],
        shard_bytes=facts["bytes"],
        canonical=not facts["config_hash"].startswith("foreign:"),
        stored=(record.height, record.width),
        num_stored=record.num_frames,
        frames=(draw.frames.start, draw.frames.stop, draw.frames.step),
        resized=draw.resized,
        window=(draw.top, draw.left, draw.height, draw.width),
    )
