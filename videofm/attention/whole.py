"""Masks by name where one process holds whole sequences: in the way that costs least for what a backend can do."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from videofm.attention.masks import MaskSpec
from videofm.errors import ParallelError

MAX_CHUNKS = 64
"""A block-causal mask of more chunks becomes one dense mask: small chunks cost more in launches than they save in work."""

Core = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention with a bool mask or none."""
SelfAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_whole(
    core: Core,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: MaskSpec,
    causal: SelfAttention | None = None,
) -> Tensor:
    """Attention under `mask` of sequences that start at position 0.

    Documents are taken one by one and chunks of a block-causal mask too, so that no matrix of `L x L` is stored and nothing is
    computed that the mask drops. Other masks become dense, but for a plain causal one where the backend has that.

    Args:
        core: attention of the backend; it is given a dense mask only for windows, padding and where `causal` is None.
        q: `(B, L, N, K)`.
        k: `(B, L, G, K)`.
        v: like k.
        mask: which tokens see which.
        causal: causal attention of the backend between as many queries as keys, where it has one.

    Returns:
        `(B, L, N, K)`; rows that see nothing are 0.

    Raises:
        ParallelError: `mask` was not made for these sequences.
    """
    length = k.shape[1]
    mask.check(length, q.shape[0])
    if mask.is_per_sample or mask.kind == "full":
        return core(q, k, v, dense_mask(mask, length, q.device) if mask.is_per_sample else None)
    if q.shape[1] != length:
        raise ParallelError(
            f"a mask of kind {mask.kind} between {q.shape[1]} queries and {length} keys: without positions it is for "
            "self-attention, as many queries as keys. Give a tensor mask."
        )
    whole = causal or (lambda q, k, v: core(q, k, v, dense_mask(MaskSpec.causal(), q.shape[1], q.device)))
    if mask.kind == "documents":
        return _document_by_document(whole if mask.is_causal else (lambda q, k, v: core(q, k, v, None)), q, k, v, mask)
    if mask.kind == "block_causal" and len(mask.lengths) <= MAX_CHUNKS:
        return _chunk_by_chunk(core, q, k, v, mask)
    if mask.kind == "causal" and mask.window is None:
        return whole(q, k, v)
    return core(q, k, v, dense_mask(mask, length, q.device))


def dense_mask(mask: MaskSpec, length: int, device: torch.device) -> Tensor:
    """`mask` over positions `0 ... length - 1`, bool, `(L, L)` or `(B, 1, 1, L)`; the last few are kept."""
    if torch.compiler.is_compiling() or torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
        return _build(mask, length, device)  # a traced or fake tensor must not outlive its trace
    return _kept(mask, length, device)


def _build(mask: MaskSpec, length: int, device: torch.device) -> Tensor:
    positions = torch.arange(length, device=device)
    return mask.dense(positions, positions)


@lru_cache(maxsize=8)
def _kept(mask: MaskSpec, length: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a mask first used in validation serves training too
        return _build(mask, length, device)


def _document_by_document(attend: SelfAttention, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec) -> Tensor:
    documents = zip(*(x.split(list(mask.lengths), dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([q[:, :0], *(attend(q, k, v) for q, k, v in documents if q.shape[1])], dim=1)


def _chunk_by_chunk(core: Core, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec) -> Tensor:
    attended, end = [q[:, :0]], 0
    for queries in q.split(list(mask.lengths), dim=1):
        end += queries.shape[1]
        start = 0 if mask.window is None else max(0, end - mask.window)
        keys, values = (_seen(x, start, end, mask.num_sink) for x in (k, v))
        attended.append(core(queries, keys, values, None))
    return torch.cat(attended, dim=1)


def _seen(x: Tensor, start: int, end: int, num_sink: int) -> Tensor:
    """Keys or values in `[start, end)`, after the sinks before `start`."""
    num_sink = min(num_sink, start)
    return torch.cat([x[:, :num_sink], x[:, start:end]], dim=1) if num_sink else x[:, start:end]
