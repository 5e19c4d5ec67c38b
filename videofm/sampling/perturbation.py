"""Spatiotemporal skip guidance (Hyung et al. 2024, arXiv 2411.18664; spec C.5): a model whose self-attention is disturbed in a
few blocks predicts something worse, and guidance leads away from it.

Nothing in a model knows of this: attention has one door, `block.self_attention.attend`, and it is exchanged for the time of one
evaluation. The original's fourth mode, `residual`, changes nothing in LTX-Video, whose attention has no residual of its own; it
is not offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from videofm.errors import ConfigError


@dataclass(frozen=True)
class Perturbation:
    """Which blocks are disturbed, how, and how far guidance goes: `velocity += scale * (positive - disturbed)`.

    `mode` says what stands in for the self-attention of the listed blocks, before its output projection: `attention_values` its
    values, `attention_skip` its input; `transformer_block` skips those blocks altogether.
    """

    blocks: tuple[int, ...]
    scale: float = 1.0
    mode: str = "attention_values"


@contextmanager
def perturbed(dit: nn.Module, perturbation: Perturbation, first_row: int) -> Iterator[None]:
    """Inside, `dit` is disturbed for the samples of a batch from number `first_row` on; afterwards it is as before.

    Raises:
        ConfigError: the model has no such blocks, or there is no such mode.
    """
    if perturbation.mode not in _MODES:
        raise ConfigError(f"no perturbation is called {perturbation.mode!r}. There are: {', '.join(_MODES)}.")
    with ExitStack() as stack:
        for block in _blocks(dit, perturbation.blocks):
            stack.enter_context(_MODES[perturbation.mode](block, first_row))
        yield


def _blocks(dit: nn.Module, numbers: tuple[int, ...]) -> list[Any]:
    blocks = list(getattr(dit, "blocks", ()))
    outside = [number for number in numbers if not 0 <= number < len(blocks)]
    if outside or not numbers:
        raise ConfigError(
            f"cannot disturb the blocks {list(numbers)}: this model has {len(blocks)}, numbered from 0; name "
            "at least one of them."
        )
    return [blocks[number] for number in numbers]


@contextmanager
def _values(block: Any, first_row: int) -> Iterator[None]:
    with _attention(block, first_row, lambda values: values):
        yield


@contextmanager
def _skip(block: Any, first_row: int) -> Iterator[None]:
    inputs: list[Tensor] = []
    hook = block.self_attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))

    def as_heads(values: Tensor) -> Tensor:
        x = inputs.pop()[first_row:]
        if x.numel() != values.numel():
            raise ConfigError(
                f"attention_skip puts an input of width {x.shape[-1]} in place of {values.shape[2]} heads of width "
                f"{values.shape[3]}: tensor ranks hold some of the heads. Take attention_values, or parallel.tensor_degree=1."
            )
        return x.reshape(values.shape)  # (B, L, D) as heads (B, L, N, K), N slow: the output projection joins them again

    try:
        with _attention(block, first_row, as_heads):
            yield
    finally:
        hook.remove()


@contextmanager
def _whole_block(block: Any, first_row: int) -> Iterator[None]:
    hook = block.register_forward_hook(lambda module, args, out: torch.cat([out[:first_row], args[0][first_row:]]))
    try:
        yield
    finally:
        hook.remove()


_MODES: dict[str, Callable[[Any, int], Any]] = {
    "attention_values": _values,
    "attention_skip": _skip,
    "transformer_block": _whole_block,
}


@contextmanager
def _attention(block: Any, first_row: int, stand_in: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Attend for the samples before `first_row` only; the others get `stand_in` of their values, `(B, L, N, K)`."""
    attention, attend = block.self_attention, block.self_attention.attend

    def exchanged(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = mask if mask is None or len(mask) == 1 else mask[:first_row]
        return torch.cat([attend(q[:first_row], k[:first_row], v[:first_row], mask), stand_in(v[first_row:])])

    attention.attend = exchanged
    try:
        yield
    finally:
        attention.attend = attend
