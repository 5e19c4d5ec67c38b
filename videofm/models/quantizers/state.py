"""State that is not trained by gradients: kept in float32, compared between ranks; and draws that are the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

_PRIME = 2**36 - 5
"""Of priorities. 17 bits of a number times a weight below it, summed over up to 1024 channels, stays below 2^63."""
_MIX = 0x9E3779B97F4A7C15


class StateModule(nn.Module):
    """A module whose buffers keep their dtype when it is cast (`module.bfloat16()`), and when weights are loaded into it.

    A running sum in bfloat16 would stop to grow after 256 equal additions, and indices above 256 would melt into each other.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            key = prefix + name
            if buffer is not None and key in state_dict:
                state_dict[key] = state_dict[key].to(buffer.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


def generator(seed: int, step: int, name: str) -> torch.Generator:
    """A CPU generator that is a function of its arguments alone, so that all ranks draw the same, also after a resume."""
    mixed = seed
    for number in (step, *name.encode()):
        mixed = ((mixed ^ number) * _MIX + 1) % 2**63
    return torch.Generator("cpu").manual_seed(mixed)


def place(values: Tensor) -> Tensor:
    """`values`, drawn on the CPU, where torch now makes new tensors: under `torch.device("meta")` nothing is kept."""
    return values.to(torch.get_default_device())


def digest(module: nn.Module, names: Collection[str]) -> Tensor:
    """A number `(1,)` int64 that differs, for all practical purposes, where any bit of the buffers called `names` differs.

    Each buffer's bits are multiplied by weights that depend on the place, and summed modulo 2^64: exact, in any order.
    """
    total = None
    for number, (name, buffer) in enumerate(module.named_buffers()):
        if name not in names:
            continue
        bits = buffer.detach().contiguous().view(torch.int32).long() if buffer.is_floating_point() else buffer.long()
        weights = torch.arange(1, bits.numel() + 1, device=bits.device) * 2 + 1
        part = (bits.flatten() * weights).sum().reshape(1) * (2 * number + 1)
        total = part if total is None else total + part
    assert total is not None, "there must be a buffer of such a name"
    return total


@torch.no_grad()
def priorities(vectors: Tensor, seed: int, step: int) -> Tensor:
    """A pseudo-random number `(N,)` int64 for each row of `vectors` `(N, D)`: a universal hash of its values, rounded.

    To take the rows with the lowest numbers is to draw rows at random, with a result that depends on the set of rows only:
    not on their order, nor on how they lie over ranks and micro-batches. Values are rounded to bfloat16 first, so that a
    difference in the last bits (of sums over ranks) most often changes nothing; rows that round to the same have one number.
    """
    rows = vectors.detach().float().contiguous()
    bits = (rows.view(torch.int32).long() + 0x8000) >> 16
    draws = generator(seed, step, "priorities")
    weights = torch.randint(1, _PRIME, (rows.shape[1] + 1,), generator=draws, device="cpu").to(rows.device)
    return torch.remainder((bits * weights[:-1]).sum(1) + weights[-1], _PRIME)


@torch.no_grad()
def draw(vectors: Tensor, num: int, seed: int, step: int, distinct: bool = False) -> Tensor:
    """At most `num` rows of `vectors` `(N, D)`, by lowest priority, in the order of it; `distinct`: one of each priority."""
    numbers = priorities(vectors, seed, step)
    order = numbers.argsort(stable=True)
    if distinct and len(order) > 1:
        ranked = numbers[order]
        order = order[torch.cat([ranked.new_ones(1, dtype=torch.bool), ranked[1:] != ranked[:-1]])]
    return vectors[order[:num]]
