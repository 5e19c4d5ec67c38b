"""What a block of queries needs of a block of keys: rectangles to compute, most of them without a mask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from videofm.attention.layout import SequenceLayout
from videofm.attention.masks import MaskSpec

MAX_TILES = 64
"""A block that needs more rectangles than this (striped tokens, many documents) is computed in one piece, under a mask."""


@dataclass(frozen=True)
class Tile:
    """Queries `[queries]` attend to keys `[keys]` of a block, all of them or under a bool mask that broadcasts."""

    queries: slice
    keys: slice
    mask: Tensor | None


def positions(layout: SequenceLayout, num_inner: int, block: int | None) -> Tensor:
    """Global positions of the tokens of block number `block`, `num_inner` consecutive parts; of all parts for None."""
    parts = range(len(layout.lengths)) if block is None else range(block * num_inner, (block + 1) * num_inner)
    return torch.cat([layout.positions(part) for part in parts])


@lru_cache(maxsize=64)
def block_tiles(
    mask: MaskSpec, layout: SequenceLayout, num_inner: int, q_block: int, k_block: int | None, device: torch.device
) -> tuple[Tile, ...]:
    """The rectangles that cover what queries of one block see of another; none where they see nothing. The last are kept.

    Args:
        mask: on global positions.
        layout: which part holds which.
        num_inner: consecutive parts that form a block.
        q_block: number of the block of queries.
        k_block: number of the block of keys; None for the keys of all parts, in their order.
        device: of the masks.
    """
    return cut(mask, positions(layout, num_inner, q_block), positions(layout, num_inner, k_block), device)


@lru_cache(maxsize=64)
def whole_tiles(mask: MaskSpec, num_queries: int, num_keys: int, device: torch.device) -> tuple[Tile, ...]:
    """The same for queries and keys that are both counted from position 0."""
    return cut(mask, torch.arange(num_queries), torch.arange(num_keys), device)


@torch.inference_mode(False)  # what is kept serves later calls that differentiate
def cut(mask: MaskSpec, q_positions: Tensor, k_positions: Tensor, device: torch.device) -> tuple[Tile, ...]:
    """Rectangles that cover the pairs that `mask` allows between tokens at these positions.

    Both sides are cut where positions jump and where a chunk or document ends; what sees the same is joined again. A causal
    ring over zigzag parts then computes half of each block, with a mask on the diagonal only, and a block-causal mask needs
    no matrix at all.
    """
    q_runs, k_runs = _runs(q_positions, mask), _runs(k_positions, mask)
    if len(q_runs) * len(k_runs) > MAX_TILES**2:
        return _cut(mask, q_positions, k_positions, [_everything(q_positions)], [_everything(k_positions)], device)
    tiles = _cut(mask, q_positions, k_positions, q_runs, k_runs, device)
    if len(tiles) > MAX_TILES:
        return _cut(mask, q_positions, k_positions, [_everything(q_positions)], [_everything(k_positions)], device)
    return tiles


def _cut(
    mask: MaskSpec, q_positions: Tensor, k_positions: Tensor, q_runs: list[slice], k_runs: list[slice], device: torch.device
) -> tuple[Tile, ...]:
    tiles: list[Tile] = []
    above: list[Tile] = []
    for rows in q_runs:
        row: list[Tile] = []
        for keys in k_runs:
            block = mask.block(q_positions[rows], k_positions[keys])
            if isinstance(block, Tensor):
                row.append(Tile(rows, keys, block.to(device)))
            elif block == "full":
                left = row.pop() if row and row[-1].mask is None and row[-1].keys.stop == keys.start else None
                row.append(Tile(rows, slice(left.keys.start if left else keys.start, keys.stop), None))
        if _alike(above, row):
            row = [Tile(slice(tile.queries.start, rows.stop), tile.keys, None) for tile in above]
            del tiles[len(tiles) - len(above) :]
        tiles += row
        above = row
    return tuple(tiles)


def _alike(above: list[Tile], row: list[Tile]) -> bool:
    """Whether two neighbouring rows see the same keys, all of them."""
    return (
        len(above) == len(row) > 0
        and above[0].queries.stop == row[0].queries.start
        and all(a.mask is None and b.mask is None and a.keys == b.keys for a, b in zip(above, row, strict=True))
    )


def _everything(values: Tensor) -> slice:
    return slice(0, len(values))


def _runs(values: Tensor, mask: MaskSpec) -> list[slice]:
    """Where `values` rise by one, inside one chunk or document of `mask`."""
    if not len(values):
        return []
    new = values.diff() != 1
    if mask.lengths and not mask.is_per_sample:
        segment = torch.bucketize(values, torch.tensor(list(accumulate(mask.lengths))), right=True)
        new |= segment.diff() != 0
    cuts = [0, *(torch.nonzero(new).flatten() + 1).tolist(), len(values)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]
