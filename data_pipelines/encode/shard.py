"""One shard through the frozen encoders: what an actor of `videofm encode` does. Ends with committed sidecars."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch

from videofm import registry
from videofm.config.data import DataConfig
from videofm.config.encode import EncodeConfig
from videofm.data.buckets import Buckets, cost_of
from videofm.data.draws import Draw
from videofm.data.encoded import clip_source
from videofm.data.files import lock
from videofm.data.fixed import clip_request, fixed_draw, geometry
from videofm.data.index import ClipRecord, records_of
from videofm.data.manifest import Manifest
from videofm.data.reader import BadClipError, ClipReader, ReaderSettings, video_tensor
from videofm.data.sidecar import (
    SidecarEntry,
    SidecarWriter,
    differences,
    entry_path,
    hash_of,
    header_name,
    parse_entry,
    text_source,
)
from videofm.data.view import View
from videofm.data.workers import Decoding, InProcess, Job
from videofm.errors import DataError
from videofm.run_dir import RunDirectory, write_atomic

_AHEAD = 3
"""Clips that are asked for before they are encoded, so that decoding and encoding go on at once."""


def data_config(config: EncodeConfig) -> DataConfig:
    """The section `data` of a training that reads what `config` encodes."""
    return DataConfig(
        manifest=config.manifest,
        num_frames=config.num_frames,
        frame_strides=[config.frame_stride],
        height=config.height,
        width=config.width,
        resize_short_side=config.resize_short_side,
        crop=config.crop,
        start=config.start,
        **_sizes(config),
        decoder=config.decoder,
    )


def _sizes(config: EncodeConfig) -> dict[str, Any]:
    """The buckets with a budget that holds a clip of each size: it says nothing about what is encoded, but has to fit."""
    if config.buckets is None:
        return {"micro_batch_size": 1}
    costs = {str(size): cost_of(config.buckets, size) for size in config.buckets.sizes}
    budget = float(max(costs.values())) * (1 + 1e-9)
    main = costs.get(f"{config.num_frames}x{config.height}x{config.width}", max(costs.values()))
    return {
        "buckets": config.buckets.model_copy(update={"budget": budget}),
        "micro_batch_size": int(Fraction(str(budget)) // main),
    }


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard: clips stored of each kind, clips that do not decode."""

    group: str
    num_clips: dict[str, int]
    num_failed: int


@dataclass(frozen=True)
class _Cut:
    """A clip, what is read of it, and its frames, uint8 `(T, H, W, 3)`."""

    record: ClipRecord
    draw: Draw
    frames: np.ndarray


class ShardEncoder:
    """Loads the encoders of a config once, then encodes shard after shard into the run directory `folder`."""

    def __init__(self, config: EncodeConfig, folder: Path, device: str, decoding: Decoding | None = None) -> None:
        """
        Args:
            config: what is encoded.
            folder: the run directory.
            device: of the encoders.
            decoding: where clips are decoded; None: in this process, which a clip can then take down.

        Raises:
            DataError: the run directory holds what other encoders made.
            CheckpointError, ConfigError: an encoder cannot be loaded.
        """
        torch.set_num_threads(config.engine.num_cpus)
        self.config, self.folder, self.dataset = config, Path(folder), Manifest.load(config.manifest)
        self._shards = {group: shard for shard, group in enumerate(self.dataset.table["group"].to_pylist())}
        self._view = View.load(config.view).resolve(self.dataset) if config.view is not None else None
        self.data = data_config(config)
        self._buckets = Buckets(self.data) if config.buckets is not None else None
        self._decoding = decoding or InProcess(ClipReader(ReaderSettings(decoder=config.decoder)))
        self.encoders: dict[str, Any] = {
            kind: registry.lookup(registry.ENCODERS, kind, "encoder").load(section, device)
            for kind, section in config.sections.items()
        }
        self.headers = {kind: {"kind": kind, **encoder.header()} for kind, encoder in self.encoders.items()}
        for kind, header in self.headers.items():
            if kind != "text":
                header["geometry"] = geometry(self.data)
            claim_header(self.folder, kind, header)

    def encode(self, group: str) -> ShardReport | None:
        """Encode the clips of a shard, and commit a sidecar of each kind; None when a stop was asked for.

        Raises:
            DataError: the shard or its index is missing or damaged; or it was encoded before from another tar.
        """
        shard = self._shards[group]
        sha256 = str(self.dataset.table["sha256"][shard].as_py())
        records = self._records(shard)
        counts: dict[str, int] = {}
        failed: set[str] = set()
        for kind in self.encoders:
            if not entry_path(self.folder, group, kind).exists():
                with SidecarWriter(self.folder, group, kind, self.headers[kind], sha256) as writer:
                    done = self._fill_text(writer, records) if kind == "text" else self._fill(writer, records, shard)
                    if not done:
                        return None
                    writer.commit()
            committed = read_entry(self.folder, group, kind, sha256)
            counts[kind] = committed.num_clips
            failed |= set(committed.failed)
        return ShardReport(group, counts, len(failed))

    def _records(self, shard: int) -> list[ClipRecord]:
        """The clips to encode."""
        table = self.dataset.read_shard(shard)
        if self._view is not None:
            table = table.filter(pyarrow.array(self._view.keep(table)))
        return [record for record in records_of(table) if self.config.split in ("all", record.split)]

    def _fill(self, writer: SidecarWriter, records: Sequence[ClipRecord], shard: int) -> bool:
        """Latents or tokens. Clips of one size wait until a batch is full, so that batches are the same whoever encodes."""
        size = self.encoders[writer.kind].batch_size
        waiting: dict[tuple[int, ...], list[_Cut]] = {}
        for cut in self._cuts(writer, records, shard):
            if cut is None:
                return False
            pending = waiting.setdefault(cut.frames.shape, [])
            pending.append(cut)
            if len(pending) == size:
                self._encode(writer, waiting.pop(cut.frames.shape))
        for shape in sorted(waiting):
            self._encode(writer, waiting[shape])
        return True

    def _cuts(self, writer: SidecarWriter, records: Sequence[ClipRecord], shard: int) -> Iterator[_Cut | None]:
        """The clips that a training would read, in order, decoded a few ahead; ends with None when a stop was asked for."""
        drawn = ((record, draw) for record in records if (draw := fixed_draw(record, self.data, self._buckets)) is not None)
        ahead: deque[tuple[ClipRecord, Draw, Job]] = deque()
        while not RunDirectory(self.folder).stop_requested:
            for record, draw in islice(drawn, _AHEAD - len(ahead)):
                request = clip_request(self.dataset, shard, record, draw)
                ahead.append((record, draw, self._decoding.ask(request, np.empty(request.shape, np.uint8))))
            if not ahead:
                return
            record, draw, job = ahead.popleft()
            try:
                self._decoding.wait(job)
            except BadClipError as error:
                writer.fail(record.key, str(error))
            else:
                yield _Cut(record, draw, job.out)
        yield None

    def _encode(self, writer: SidecarWriter, cuts: Sequence[_Cut]) -> None:
        video, names = video_tensor(np.stack([cut.frames for cut in cuts])), [cut.record.sha256 for cut in cuts]
        captions = [text_source(cut.record.caption)["caption"] for cut in cuts]
        encoder, header = self.encoders[writer.kind], self.headers[writer.kind]
        stored = encoder.encode(video, names, captions) if writer.kind == "tokens" else encoder.encode(video, names)
        for cut, tensors in zip(cuts, stored, strict=True):
            writer.add(cut.record.key, tensors, clip_source(header, cut.record, cut.draw))

    def _fill_text(self, writer: SidecarWriter, records: Sequence[ClipRecord]) -> bool:
        encoder = self.encoders["text"]
        writer.add_empty(encoder.encode([""])[0])
        for first in range(0, len(records), encoder.batch_size):
            if RunDirectory(self.folder).stop_requested:
                return False
            part = records[first : first + encoder.batch_size]
            sources = [text_source(record.caption) for record in part]
            for record, tensors, source in zip(part, encoder.encode([s["caption"] for s in sources]), sources, strict=True):
                writer.add(record.key, tensors, source)
        return True


def read_entry(folder: Path, group: str, kind: str, shard_sha256: str) -> SidecarEntry:
    """The committed sidecar of a shard.

    Raises:
        DataError: it was made from another tar than the one of this SHA-256.
    """
    path = entry_path(folder, group, kind)
    entry = parse_entry(path.read_bytes(), str(path))
    if entry.shard_sha256 != shard_sha256:
        raise DataError(
            f"the {kind} of shard {group} in {folder} were made from a tar with SHA-256 {entry.shard_sha256[:12]}, and the "
            f"shard now has {shard_sha256[:12]}; encode into another run directory, so that the cache stays of one piece"
        )
    return entry


def claim_header(folder: Path, kind: str, header: dict[str, Any], made_by: str = "encoder") -> str:
    """Write the header of a kind, or see that the one that stands there is the same; `made_by` is for the message.

    Returns:
        its SHA-256 (hex).

    Raises:
        DataError: others worked in this run directory; what differs is named.
    """
    path = folder / header_name(kind)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / f".{header_name(kind)}.lock"):
        if not path.exists():
            write_atomic(path, json.dumps(header, indent=2, sort_keys=True) + "\n")
            return hash_of(header)
        found = differences(json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(header)))
    if found:
        raise DataError(f"{folder} holds {kind} of another {made_by}: {'; '.join(found)}. Choose another run directory")
    return hash_of(header)
