"""Tokens of clips of several sizes as one sequence of documents, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from videofm.attention import Documents
from videofm.objectives.tokens import Features, TokenBatch
from videofm.types import Conditioning


@dataclass(frozen=True)
class PackedTokens:
    """What the model sees of packed clips: `noisy` `(1, L, C)`, `sigma` `(1, L)`, `coordinates` `(1, 3, L)`, which of the
    tokens are of which clip, and what guides them, or None."""

    noisy: Tensor
    sigma: Tensor
    coordinates: Tensor
    documents: Documents
    features: Features | None = None


def join(parts: Sequence[TokenBatch]) -> PackedTokens:
    """The clips of all parts, one after the other, each token at its own level."""
    noisy = [rearrange(part.noisy, "b l c -> 1 (b l) c") for part in parts]
    levels = [part.sigma if part.sigma.ndim == 2 else part.sigma[:, None].expand(part.clean.shape[:2]) for part in parts]
    places = [rearrange(part.coordinates, "b xyz l -> 1 xyz (b l)") for part in parts]
    return PackedTokens(
        torch.cat(noisy, dim=1),
        torch.cat([rearrange(level, "b l -> 1 (b l)") for level in levels], dim=1),
        torch.cat(places, dim=2),
        Documents.of([part.clean.shape[1] for part in parts for _ in range(part.clean.shape[0])]),
        _join_features([part.features for part in parts if part.features is not None]),
    )


def _join_features(parts: Sequence[Features]) -> Features | None:
    if not parts:
        return None
    tokens = [rearrange(part.tokens, "b l c -> 1 (b l) c") for part in parts]
    return Features(torch.cat(tokens, dim=1), torch.cat([rearrange(part.kept, "b l -> 1 (b l)") for part in parts], dim=1))


def take_apart(values: Tensor, parts: Sequence[TokenBatch]) -> list[Tensor]:
    """`values` `(1, L, C)` of the tokens of `join(parts)`, as `(B, L, C)` of each part."""
    pieces = values.split([part.clean.shape[0] * part.clean.shape[1] for part in parts], dim=1)
    return [rearrange(piece, "1 (b l) c -> b l c", b=part.clean.shape[0]) for piece, part in zip(pieces, parts, strict=True)]


def join_texts(texts: Sequence[Conditioning]) -> Conditioning:
    """The rows of several texts under each other; shorter ones are padded with what their mask hides."""
    length = max(text.mask.shape[1] for text in texts)
    short = [length - text.mask.shape[1] for text in texts]
    clips = [text.clip_embeddings for text in texts if text.clip_embeddings is not None]
    longest = [text.longest for text in texts]
    return Conditioning(
        torch.cat([pad(text.embeddings, (0, 0, 0, missing)) for text, missing in zip(texts, short, strict=True)]),
        torch.cat([pad(text.mask, (0, missing)) for text, missing in zip(texts, short, strict=True)]),
        torch.cat(clips) if clips else None,
        None if None in longest else max(count for count in longest if count is not None),
    )
