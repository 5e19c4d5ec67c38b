"""What attention over several ranks sends: heads against tokens, blocks around a ring, keys and values to everybody.

Every function takes its ProcessGroup, and every size follows from numbers that all ranks know (lengths of parts, ranges of
heads), so nothing is exchanged but the data itself. A rank without tokens or heads takes part like any other. A group of one
rank, or None, sends nothing. Messages on the wire pass through `all_to_all`, `all_gather` and `Exchange` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

Range = tuple[int, int]
"""Start and end (exclusive) of consecutive heads."""


def degree(group: dist.ProcessGroup | None) -> int:
    """Ranks of `group`; None is this rank alone."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: dist.ProcessGroup | None) -> int:
    """The rank of this process in `group`; None is this rank alone."""
    return 0 if group is None else dist.get_rank(group)


# --- which rank computes which heads -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadPlan:
    """The heads of each rank: `queries[r]` and the heads `keys[r]` of keys and values which those need.

    With fewer heads of keys than of queries (grouped queries), ranges of keys overlap where ranks share a head.
    """

    num_heads: int
    num_kv_heads: int
    queries: tuple[Range, ...]
    keys: tuple[Range, ...]

    def counts(self, rank: int) -> tuple[int, int]:
        """Heads of queries and of keys on `rank`."""
        (start, stop), (first, last) = self.queries[rank], self.keys[rank]
        return stop - start, last - first

    def key_of_query(self, rank: int) -> tuple[int, ...] | None:
        """For each query head of `rank` its head of keys, counted on that rank; None where equal groups say so already."""
        (start, stop), (first, last) = self.queries[rank], self.keys[rank]
        if stop == start or ((stop - start) % (last - first) == 0 and self._is_grouped(rank)):
            return None
        return tuple(head * self.num_kv_heads // self.num_heads - first for head in range(start, stop))

    def _is_grouped(self, rank: int) -> bool:
        (start, stop), (first, last) = self.queries[rank], self.keys[rank]
        size = (stop - start) // (last - first)
        return all(head * self.num_kv_heads // self.num_heads == first + (head - start) // size for head in range(start, stop))


@lru_cache(maxsize=64)
def plan_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> HeadPlan:
    """Consecutive query heads for each rank, counts that differ by one at most (zeros where ranks outnumber heads).

    A rank gets the heads of keys that its queries need and no more: a share of them, or one that several ranks get too.
    """
    assert num_heads % num_kv_heads == 0, (num_heads, num_kv_heads)
    cuts = [0, *accumulate(num_heads // num_ranks + (rank < num_heads % num_ranks) for rank in range(num_ranks))]
    queries = tuple(pairwise(cuts))
    group = num_heads // num_kv_heads
    keys = tuple((start // group, -(-stop // group)) if stop > start else (0, 0) for start, stop in queries)
    return HeadPlan(num_heads, num_kv_heads, queries, keys)


# --- heads against tokens (Ulysses) -----------------------------------------------------------------------------------------


def to_heads(
    tensors: Sequence[Tensor], ranges: Sequence[Sequence[Range]], lengths: Sequence[int], group: dist.ProcessGroup | None
) -> Tensor:
    """From some tokens with all heads to all tokens with some heads, for several tensors in one all-to-all.

    Args:
        tensors: `(B, L of this rank, N_i, K)` each, of one dtype.
        ranges: for each tensor, the heads that each rank gets; `n_i` of them come to this rank.
        lengths: tokens of each rank.
        group: the ranks.

    Returns:
        `(n_0 + n_1 + ..., B, sum of lengths, K)`, contiguous: heads of the first tensor, then of the second, and so on; tokens
        in the order of the ranks.
    """
    batch, length, _, width = tensors[0].shape
    me, num_ranks = rank_in(group), degree(group)
    assert length == lengths[me], (length, lengths, me)
    counts = [sum(stop - start for start, stop in (heads[rank] for heads in ranges)) for rank in range(num_ranks)]
    pieces = [
        x[:, :, slice(*heads[rank])].permute(2, 0, 1, 3)  # (B, L, n, K) -> (n, B, L, K): heads first, so ranks lie in a row
        for rank in range(num_ranks)
        for x, heads in zip(tensors, ranges, strict=True)
    ]
    received = all_to_all(
        torch.cat(pieces).contiguous().flatten(),
        [count * batch * length * width for count in counts],
        [counts[me] * batch * other * width for other in lengths],
        group,
    )
    return torch.cat(
        [x.view(counts[me], batch, other, width) for x, other in zip(received, lengths, strict=True)], dim=2
    ).contiguous()


def to_tokens(
    tensors: Sequence[Tensor], ranges: Sequence[Sequence[Range]], lengths: Sequence[int], group: dist.ProcessGroup | None
) -> list[Tensor]:
    """The way back of `to_heads`. Heads that several ranks had are summed (in float32 at least).

    Args:
        tensors: `(B, sum of lengths, n_i, K)` each, of one dtype.
        ranges: for each tensor, the heads that each rank has; together they are all `N_i`.
        lengths: tokens of each rank.
        group: the ranks.

    Returns:
        `(B, L of this rank, N_i, K)` for each tensor, contiguous.
    """
    batch, _, _, width = tensors[0].shape
    me = rank_in(group)
    counts = [[stop - start for start, stop in heads] for heads in ranges]
    totals = [sum(count) for count in zip(*counts, strict=True)]  # heads of each rank
    # (B, L, n, K) -> (L, n, B, K): tokens first, so ranks lie in a row
    send = torch.cat([x.permute(1, 2, 0, 3) for x in tensors], dim=1).contiguous().flatten()
    received = all_to_all(
        send,
        [length * totals[me] * batch * width for length in lengths],
        [lengths[me] * total * batch * width for total in totals],
        group,
    )
    chunks = [
        x.view(lengths[me], total, batch, width).split([count[rank] for count in counts], dim=1)
        for rank, (x, total) in enumerate(zip(received, totals, strict=True))
    ]
    return [_assemble([chunk[i] for chunk in chunks], heads) for i, heads in enumerate(ranges)]


def _assemble(pieces: Sequence[Tensor], ranges: Sequence[Range]) -> Tensor:
    """`(L, n, B, K)` of each rank -> `(B, L, N, K)`, summed where ranges overlap."""
    placed = [piece.permute(2, 0, 1, 3) for piece in pieces]  # (L, n, B, K) -> (B, L, n, K)
    filled = [(heads, x) for heads, x in zip(ranges, placed, strict=True) if heads[1] > heads[0]]
    if all(before[1] == after[0] for (before, _), (after, _) in pairwise(filled)):
        return torch.cat(placed, dim=2).contiguous()
    batch, length, _, width = placed[0].shape
    total = placed[0].new_zeros(batch, length, max(stop for _, stop in ranges), width, dtype=accumulator_dtype(placed[0].dtype))
    for heads, x in filled:
        total[:, :, slice(*heads)] += x
    return total.to(placed[0].dtype)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of tensors of `dtype` are made in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


# --- keys and values to everybody, and their gradients home --------------------------------------------------------------


def gather_tokens(x: Tensor, lengths: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """The tokens of all ranks: `(L of this rank, ...)` -> `(sum of lengths, ...)`, in the order of the ranks."""
    x = x.contiguous()
    assert x.shape[0] == lengths[rank_in(group)], (x.shape, lengths)
    if len(set(lengths)) == 1:
        return all_gather(x, group)
    # Unequal parts: gloo has no all-gather for them, so each rank sends its own to each.
    width = math.prod(x.shape[1:])
    send = x.flatten().repeat(len(lengths))
    received = all_to_all(send, [x.numel()] * len(lengths), [length * width for length in lengths], group)
    return torch.cat(received).view(sum(lengths), *x.shape[1:])


def sum_tokens(x: Tensor, lengths: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """The way back of `gather_tokens`: `(sum of lengths, ...)` -> `(L of this rank, ...)`, summed over ranks.

    Each part travels once in its own dtype, and its owner sums in float32 at least and in the order of the ranks: a
    reduce-scatter of the same bytes which rounds once and repeats bitwise.
    """
    width, own = math.prod(x.shape[1:]), lengths[rank_in(group)]
    received = all_to_all(
        x.contiguous().flatten(), [length * width for length in lengths], [own * width for _ in lengths], group
    )
    total = torch.zeros(own * width, dtype=accumulator_dtype(x.dtype), device=x.device)
    for part in received:
        total += part
    return total.to(x.dtype).view(own, *x.shape[1:])


# --- the three messages ------------------------------------------------------------------------------------------------------


def all_to_all(
    send: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: dist.ProcessGroup | None
) -> tuple[Tensor, ...]:
    """Send `send_sizes[r]` elements of the flat `send` to rank r; what came from each rank, `receive_sizes[r]` elements."""
    if degree(group) == 1:
        return (send,)
    received = send.new_empty(sum(receive_sizes))
    dist.all_to_all_single(received, send, list(receive_sizes), list(send_sizes), group=group)
    return received.split(list(receive_sizes))


def all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`x` `(L, ...)` of all ranks, of one shape, one after the other: `(ranks * L, ...)`."""
    if degree(group) == 1:
        return x
    gathered = x.new_empty(degree(group) * x.shape[0], *x.shape[1:])
    if x.numel():
        dist.all_gather_into_tensor(gathered, x, group=group)
    return gathered


class Exchange:
    """A block on its way to the next rank of a ring, while one from the rank before comes in.

    Both sides know from the lengths which blocks are empty; these are not sent. A ring has two ranks or more: gloo cannot send
    to itself.
    """

    def __init__(self, send: Tensor, receive_shape: Sequence[int], group: dist.ProcessGroup) -> None:
        me, num_ranks = rank_in(group), degree(group)
        assert num_ranks > 1, "a ring of one rank sends nothing"
        self._sent = send.contiguous()  # kept alive until `wait`
        self._received = send.new_empty(tuple(receive_shape))
        after, before = ((me + step) % num_ranks for step in (1, -1))
        messages = [(dist.isend, self._sent, after), (dist.irecv, self._received, before)]
        operations = [
            dist.P2POp(operation, x, dist.get_global_rank(group, rank), group) for operation, x, rank in messages if x.numel()
        ]
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> Tensor:
        """The block that came in. The sent one may be changed afterwards."""
        for work in self._works:
            work.wait()
        return self._received
