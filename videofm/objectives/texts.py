"""The text of a micro-batch, as every objective that is told captions takes it: dropped, encoded or read, cut."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from videofm.objectives.host import from_host
from videofm.types import Batch, Conditioning

_TEXT_MULTIPLE = 32
"""Text is cut to a multiple of this many tokens, so that few different shapes occur."""


def drop_captions(captions: list[str], uniform: Tensor, dropout: float) -> list[str]:
    """Captions with those made empty whose draw of `uniform` `(B,)`, on the CPU, lies below `dropout`."""
    dropped = (uniform < dropout).tolist()
    return ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]


def text_of(text_encoder: nn.Module, batch: Batch, captions: list[str], trained: bool) -> Conditioning:
    """The text that came with a micro-batch, or that `text_encoder` makes; `captions` are its own, some made empty."""
    if batch.text is None:
        return encode_captions(text_encoder, captions, trained)
    return encoded_conditioning(batch, captions)


def encode_captions(text_encoder: nn.Module, captions: list[str], trained: bool) -> Conditioning:
    """The captions' text: each distinct one is encoded once, and columns that only hold padding are cut off.

    The model masks padding, so the cut changes no number; it spares a quarter of the step for short captions. Gradients are
    kept where the encoder is `trained`.
    """
    distinct = sorted(set(captions))
    with nullcontext() if trained else torch.no_grad():
        text: Conditioning = text_encoder.encode(distinct)  # type: ignore[operator]
    longest = text.mask.shape[1] if text.longest is None else text.longest
    kept = -(-longest // _TEXT_MULTIPLE) * _TEXT_MULTIPLE
    return text.trimmed(kept).rows(from_host([distinct.index(caption) for caption in captions], text.mask.device))


def encoded_conditioning(batch: Batch, captions: list[str]) -> Conditioning:
    """The text that came with a micro-batch, cut as `encode_captions` cuts it; `captions` are those of the batch, some made
    empty."""
    assert batch.text is not None and batch.text_lengths is not None
    empty = len(batch.captions)
    rows = [row if caption == batch.captions[row] else empty for row, caption in enumerate(captions)]
    lengths = [batch.text_lengths[row] for row in rows]
    longest = max(lengths)
    index = from_host(rows, batch.text.device)
    kept = from_host(lengths, batch.text.device)
    mask = torch.arange(batch.text.shape[1], device=batch.text.device) < kept[:, None]  # (B, L)
    clip = None if batch.clip_text is None else batch.clip_text[index]
    text = Conditioning(batch.text[index], mask, clip, longest)
    return text.trimmed(-(-longest // _TEXT_MULTIPLE) * _TEXT_MULTIPLE)


def cut_shares(text_encoder: nn.Module, captions: list[str], like: Tensor) -> dict[str, Tensor]:
    """How many captions each encoder of the text cuts, `cut_NAME`; made on the device of `like`."""
    cuts: dict[str, list[bool]] = text_encoder.cuts(captions)  # type: ignore[operator]
    return {f"cut_{name}": like.new_full((), float(sum(found))) for name, found in cuts.items()}
