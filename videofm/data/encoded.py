"""Latents, tokens and text of micro-batches out of sidecars, in the form of the fields of a `Batch`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from videofm.config.data import DataConfig
from videofm.data.draws import Draw
from videofm.data.fixed import geometry, pixels
from videofm.data.index import ClipRecord
from videofm.data.reader import BadClipError, ClipRequest
from videofm.data.sidecar import Sidecars, differences, text_source
from videofm.errors import DataError

_CHECKED_AT_START = 4096
"""Shards whose sidecars are looked at before the first step, evenly spaced; of the others each when it is first read."""


@dataclass(frozen=True)
class EncodedClip:
    """What was stored of a clip, as the sidecars have it: `mean logvar sample`, `indices rollouts`, `text clip_text`, and the
    last two of the empty caption."""

    latents: Mapping[str, Tensor] | None
    text: Mapping[str, Tensor] | None
    empty: Mapping[str, Tensor] | None
    tokens: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Asked:
    """A clip of a micro-batch that is to be encoded: its draw, its record, where its pixels are, and the group of its shard."""

    draw: Draw
    record: ClipRecord
    request: ClipRequest
    group: str


class ClipCache:
    """Reads what `data.cache` of a training says, of the datasets that it reads."""

    def __init__(self, config: DataConfig) -> None:
        """
        Raises:
            DataError: what is asked for was not encoded.
        """
        assert config.cache is not None
        self.config = config
        self.kinds = config.cache.kinds
        self.sidecars = {
            source.name: {kind: Sidecars(config.cache.folder(source.name), kind) for kind in self.kinds}
            for source in config.sources
        }

    @property
    def max_length(self) -> int | None:
        """Tokens that the text encoder cuts captions at."""
        lengths: set[int] = {header["max_length"] for header in self.headers("text")}
        return max(lengths, default=None)

    @property
    def needs_pixels(self) -> bool:
        """Whether clips are decoded for a step: where only their text is here."""
        return "latents" not in self.kinds and "tokens" not in self.kinds

    def headers(self, kind: str) -> list[dict[str, Any]]:
        """What the sidecars of a kind were made by, one for each dataset."""
        return [found[kind].header for found in self.sidecars.values() if kind in found]

    def header(self, source: str, kind: str) -> dict[str, Any]:
        """What the sidecars of a kind and a dataset (as in `Draw.source`) were made by."""
        return self._of(source)[kind].header

    def check(self, shards: Mapping[str, Sequence[tuple[str, str]]]) -> None:
        """Refuse, before the first step, sidecars that were cut in another way, are missing, or were made from other shards.

        Args:
            shards: of each dataset the group and the SHA-256 of the tar of its shards.

        Raises:
            DataError: the message names the field, or the shard, and the fix.
        """
        for header in [*self.headers("latents"), *self.headers("tokens")]:
            if changed := differences(header["geometry"], geometry(self.config)):
                raise DataError(
                    f"the cache holds other windows than the training asks for: {'; '.join(changed)}. Set these as "
                    "they were, or encode again with the new ones"
                )
        if len({header["store"] for header in self.headers("latents")}) > 1:
            raise DataError(
                "data.cache.mix holds latents stored as `sample` of some datasets and as `mean_logvar` of others, which no "
                "micro-batch can hold together; encode all datasets with one latents.store"
            )
        if len({header["rollouts"] is None for header in self.headers("tokens")}) > 1:
            raise DataError(
                "data.cache.mix holds rollouts of some datasets and none of others, which no micro-batch can hold together; "
                "encode all datasets with tokens.rollouts, or none"
            )
        for name, found in self.sidecars.items():
            for group, sha256 in _spaced(shards[name]):
                for sidecars in found.values():
                    sidecars.check(group, sha256)

    def read(self, source: str, group: str, record: ClipRecord, draw: Draw) -> EncodedClip:
        """What is stored of the pixels of `draw` and of the caption of its clip, which lies in the shard of `group`.

        Raises:
            DataError: it is missing, stale or damaged, or has ids that are none of the tokenizer's.
        """
        found = self._of(source)
        latents = text = empty = tokens = None
        if "latents" in found:
            latents = found["latents"].read(group, record.key, clip_source(found["latents"].header, record, draw))
        if "tokens" in found:
            header = found["tokens"].header
            tokens = found["tokens"].read(group, record.key, clip_source(header, record, draw))
            _check_ids(tokens, header["vocab_size"], record.key)
        if "text" in found:
            text, empty = (found["text"].read(group, *of) for of in _texts(record))
        return EncodedClip(latents, text, empty, tokens)

    def encoded(self, asked: Asked) -> EncodedClip:
        """`read` of what is asked for."""
        return self.read(asked.draw.source, asked.group, asked.record, asked.draw)

    def follow(self, batches: Iterator[list[Asked]]) -> Iterator[list[EncodedClip | BadClipError]]:
        """What is stored of each micro-batch, read when its turn comes; in place of a clip that was not encoded, why."""
        for batch in batches:
            yield [self._try(asked) for asked in batch]

    def close(self) -> None:
        """Nothing is held open."""

    def _try(self, asked: Asked) -> EncodedClip | BadClipError:
        try:
            return self.encoded(asked)
        except BadClipError as error:
            return error

    def _of(self, source: str) -> dict[str, Sidecars]:
        """The sidecars of a dataset; the only one has the name "" in a draw."""
        return self.sidecars[source] if source else next(iter(self.sidecars.values()))


def clip_source(header: Mapping[str, Any], record: ClipRecord, draw: Draw) -> dict[str, Any]:
    """What latents or tokens of a clip are made from, besides what their header says."""
    source = {"video": record.sha256, **pixels(draw)}
    return source | text_source(record.caption) if header.get("rollouts") else source


def _check_ids(tokens: Mapping[str, Tensor], vocab_size: int, key: str) -> None:
    for name, ids in tokens.items():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab_size:
            raise DataError(
                f"the {name} of {key} have ids from {low} to {high}, and the tokenizer's are 0 to {vocab_size - 1}: they are "
                "of another tokenizer, or were written by something else. Encode again into a new run directory"
            )


def _texts(record: ClipRecord) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and source of a clip's caption, and of the empty one."""
    yield record.key, text_source(record.caption)
    yield "", text_source("")


def batch_fields(clips: Sequence[EncodedClip], max_length: int | None) -> dict[str, Any]:
    """Fields of a `Batch` for the clips of a micro-batch, which were encoded on the same things; float32, ids int64.

    `max_length` is that of the text encoder: embeddings are padded with zeros to a multiple of 32 tokens, or to it.
    """
    fields: dict[str, Any] = {}
    latents = [clip.latents for clip in clips if clip.latents is not None]
    if latents:
        fields["latents"] = _stack(stored["mean" if "mean" in stored else "sample"] for stored in latents)
        if "logvar" in latents[0]:
            fields["logvar"] = _stack(stored["logvar"] for stored in latents)
    tokens = [clip.tokens for clip in clips if clip.tokens is not None]
    for name in tokens[0] if tokens else ():
        fields[name] = torch.stack([stored[name].long() for stored in tokens])
    texts = [clip.text for clip in clips if clip.text is not None]
    if texts and clips[0].empty is not None:
        texts.append(clips[0].empty)
        lengths = [len(text["text"]) for text in texts]
        width = -(-max(lengths) // 32) * 32 if max_length is None else min(-(-max(lengths) // 32) * 32, max_length)
        padded = torch.zeros(len(texts), width, texts[0]["text"].shape[1])
        for row, text in zip(padded, texts, strict=True):
            row[: len(text["text"])] = text["text"].float()
        fields |= {"text": padded, "text_lengths": lengths}
        if "clip_text" in texts[0]:
            fields["clip_text"] = _stack(text["clip_text"] for text in texts)
    return fields


def _stack(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([tensor.float() for tensor in tensors])


def _spaced(shards: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    return shards[:: max(1, -(-len(shards) // _CHECKED_AT_START))]
