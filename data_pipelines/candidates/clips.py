"""Real clips that candidates begin from (`from_clips`): which of a dataset serve, and their frames."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from videofm.config.candidates import CandidatesConfig, FromClipsConfig
from videofm.data import decode, storage
from videofm.data.index import ClipRecord
from videofm.data.manifest import Manifest
from videofm.data.shards import read_clip
from videofm.errors import ConfigError, DataError
from videofm.media import Frames
from videofm.progress import LOG

_SAME_RATE = 0.01
"""Frames a second by which a clip may differ from what the model is told."""


def choose_clips(config: CandidatesConfig, wanted: FromClipsConfig) -> list[ClipRecord]:
    """The clips of the dataset that serve, by key; how many do not, and why, is told in the log.

    Raises:
        ConfigError: the dataset is not in a folder.
        DataError: the dataset is missing, or none of its clips serves.
    """
    if not storage.is_local(wanted.manifest):
        raise ConfigError(
            f"from_clips.manifest = {storage.redacted(wanted.manifest)!r}: clips are begun from where they lie in a folder "
            "that every machine sees; copy the dataset."
        )
    chosen: list[ClipRecord] = []
    reasons = Counter[str]()
    for record in Manifest.load(wanted.manifest).records(wanted.split):
        if reason := _refusal(record, config):
            reasons[reason] += 1
        else:
            chosen.append(record)
    said = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    if not chosen:
        raise DataError(
            f"no clip of split {wanted.split!r} of {wanted.manifest} can be begun from ({said or 'it has none'}); change "
            "num_frames, height, width or fps"
        )
    if said:
        LOG.info("%d clips are begun from; left out: %s", len(chosen), said)
    drawn = sorted(chosen, key=lambda record: hashlib.sha256(f"clip:{config.seed}:{record.key}".encode()).digest())
    return sorted(drawn[: wanted.num_clips], key=lambda record: record.key)


def read_frames(config: CandidatesConfig, wanted: FromClipsConfig, record: ClipRecord) -> Frames:
    """The first frames of a clip, uint8 `(T, H, W, 3)`, as they are stored.

    Raises:
        DataError: it does not decode, or is not the one of the index.
    """
    content = read_clip(storage.local_path(wanted.manifest) or "", record)
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise DataError(f"clip {record.key} of {wanted.manifest} is damaged: its SHA-256 is not the one of the index")
    try:
        return decode.choose("auto", canonical=False).read(content, range(config.num_frames))
    except DataError as error:
        raise DataError(f"clip {record.key} of {wanted.manifest} does not decode: {error}") from None


def identity(clips: Sequence[ClipRecord]) -> str:
    """SHA-256 (hex) over the contents of clips, in order."""
    return hashlib.sha256("".join(record.sha256 for record in clips).encode()).hexdigest()


def _refusal(record: ClipRecord, config: CandidatesConfig) -> str | None:
    """Why a clip does not serve, or None."""
    if not record.caption.strip():
        return "without a caption"
    if record.num_frames < config.num_frames:
        return f"with fewer than {config.num_frames} frames"
    if record.height < config.height or record.width < config.width:
        return f"smaller than {config.height}x{config.width}"
    if abs(record.fps - config.fps) > _SAME_RATE:
        return f"of another rate than {config.fps:g} frames a second"
    return None
