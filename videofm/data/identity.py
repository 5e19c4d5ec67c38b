"""What an order of samples is the order of: everything that it depends on, in plain values, so that two can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from videofm.config.data import DataConfig
from videofm.data.source import ClipSource

_OPTIONAL = (
    "frame_strides", "resize_short_side", "crop", "start", "image_share", "image_micro_batch_size", "buckets", "packing"
)  # fmt: skip

DEFAULTS: dict[str, Any] = {name: DataConfig.model_fields[name].default for name in _OPTIONAL}
"""Fields that stand in an order's identity only where they differ from these values."""


def identity_of(config: DataConfig, seed: int, sources: Sequence[ClipSource]) -> dict[str, Any]:
    """Everything that the order depends on, in plain values."""
    found: dict[str, Any] = {"seed": seed}
    if config.mix is None:
        (source,) = sources
        found |= {"manifest": source.dataset.hash, "split": source.split}
        if source.view is not None:
            found["view"] = source.view.hash
    else:
        weights = {source.name: source.weight for source in config.mix}
        found["mix"] = {
            source.name: {
                "manifest": source.dataset.hash,
                "split": source.split,
                "weight": weights[source.name],
                "view": source.view.hash if source.view is not None else None,
            }
            for source in sources
        }
    names = ("num_frames", "height", "width", "micro_batch_size", "num_micro_batches", "window_shards")
    found |= {name: getattr(config, name) for name in names}
    values = config.model_dump(include=set(DEFAULTS)) | {"frame_strides": sorted(config.frame_strides)}
    if config.buckets is not None:
        values["buckets"]["sizes"].sort(key=lambda size: (size["num_frames"], size["height"], size["width"]))
    return found | {name: values[name] for name in DEFAULTS if values[name] != DEFAULTS[name]}


def flat(identity: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of an identity; those of `buckets`, `packing`, `pairs` and of each dataset of a mix by themselves."""
    found: dict[str, Any] = {}
    for name, value in identity.items():
        if isinstance(value, Mapping) and (name in ("buckets", "packing", "pairs", "mix") or prefix == "mix."):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
