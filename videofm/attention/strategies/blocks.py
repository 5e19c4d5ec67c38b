"""Attention of some queries to some keys on one rank, tile by tile, over the functions of a backend."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from videofm.attention.comm import accumulator_dtype
from videofm.attention.merge import BlockOutput, merge
from videofm.attention.strategies.call import AttentionCall, Gradients
from videofm.attention.strategies.tiles import Tile


class Accumulator:
    """The attention of queries `(B, Lq, N, K)` to the keys seen so far, in float32 at least once there are two pieces."""

    def __init__(self, q: Tensor) -> None:
        self._q = q
        self._total: BlockOutput | None = None
        self._written: list[slice] = []

    def add(self, tiles: Iterable[Tile], k: Tensor, v: Tensor, call: AttentionCall) -> None:
        """Merge in what the queries see of `k` and `v`, cut as `tiles` say."""
        for tile in tiles:
            rows, keys = tile.queries, tile.keys
            part = call.backend.forward(self._q[:, rows], k[:, keys], v[:, keys], tile.mask, call.scale)
            is_new = all(rows.stop <= other.start or other.stop <= rows.start for other in self._written)
            self._written.append(rows)
            if part.out.shape == self._q.shape:
                total = self._total
                self._total = part if total is None else merge(total.out, total.lse, part.out, part.lse)
                continue
            total = self._writable()
            if not is_new:
                part = merge(total.out[:, rows], total.lse[..., rows], part.out, part.lse)
            total.out[:, rows] = part.out
            total.lse[..., rows] = part.lse

    def result(self) -> BlockOutput:
        """The sum, `out` in the dtype of the queries; zeros and -inf for queries that saw nothing."""
        total = self._total or self._writable()
        return BlockOutput(total.out.to(self._q.dtype).contiguous(), total.lse.contiguous())

    def _writable(self) -> BlockOutput:
        dtype = accumulator_dtype(self._q.dtype)
        if self._total is None:
            batch, length, num_heads, _ = self._q.shape
            out = torch.zeros(self._q.shape, dtype=dtype, device=self._q.device)
            self._total = BlockOutput(out, self._q.new_full((batch, num_heads, length), -torch.inf, dtype=dtype))
        elif self._total.out.dtype != dtype:
            self._total = BlockOutput(self._total.out.to(dtype), self._total.lse)
        return self._total


def forward(q: Tensor, k: Tensor, v: Tensor, tiles: Iterable[Tile], call: AttentionCall) -> BlockOutput:
    """Queries `(B, Lq, N, K)` over keys and values `(B, Lk, G, K)`."""
    accumulator = Accumulator(q)
    accumulator.add(tiles, k, v, call)
    return accumulator.result()


def add_gradients(
    total: Gradients,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: BlockOutput,
    tiles: Iterable[Tile],
    call: AttentionCall,
) -> None:
    """Add to `total` what these keys contribute; `output` is of all keys of the sequence, so no gradient needs merging."""
    out, lse = output.out, output.lse
    for tile in tiles:
        rows, keys = tile.queries, tile.keys
        dq, dk, dv = call.backend.backward(
            dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[..., rows], tile.mask, call.scale
        )
        total.dq[:, rows] += dq
        total.dk[:, keys] += dk
        total.dv[:, keys] += dv


def zeros(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """Gradients of nothing, float32 at least."""
    return Gradients(*(torch.zeros(x.shape, dtype=accumulator_dtype(x.dtype), device=x.device) for x in (q, k, v)))


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: BlockOutput, tiles: tuple[Tile, ...], call: AttentionCall
) -> Gradients:
    """Gradients of `forward`, in the dtypes of q, k and v."""
    if len(tiles) == 1 and (tiles[0].queries, tiles[0].keys) == (slice(0, q.shape[1]), slice(0, k.shape[1])):
        return Gradients(*call.backend.backward(dout, q, k, v, output.out, output.lse, tiles[0].mask, call.scale))
    total = zeros(q, k, v)
    add_gradients(total, dout, q, k, v, output, tiles, call)
    return Gradients(total.dq.to(q.dtype), total.dk.to(k.dtype), total.dv.to(v.dtype))
