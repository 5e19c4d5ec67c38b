"""What the model is asked for a grid of tokens: each one from the token before it, in raster order t, h, w."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from videofm.errors import ConfigError, DataError
from videofm.ops.rope import cell_coordinates

STARTS = ("start", "continue")
"""How a window begins: with the first frame of a video, or inside of one."""

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Places:
    """Where tokens lie: `positions` `(B, L)` int64, raster numbers in the window; `cells` `(B, 2, L)` int64, row and column."""

    positions: Tensor
    cells: Tensor

    def span(self, first: int, end: int) -> Places:
        """The places of the tokens from number `first` to before `end`."""
        return Places(self.positions[:, first:end], self.cells[:, :, first:end])


@dataclass(frozen=True)
class ARInputs:
    """Arguments of `ARTransformer.forward`, and `targets` `(B, L)` int64: what its logits at each place should predict."""

    tokens: Tensor
    positions: Tensor
    cells: Tensor
    targets: Tensor


def flatten(indices: Tensor) -> Tensor:
    """Indices `(B, T', H', W')` -> tokens `(B, L)`, width fastest: a prefix of frames is a prefix of tokens."""
    return rearrange(indices, "b t h w -> b (t h w)")


def unflatten(flat: Tensor, shape: Shape) -> Tensor:
    """Tokens `(B, L)` -> indices `(B, T', H', W')`; the inverse of `flatten`.

    Raises:
        DataError: L is not T' * H' * W'.
    """
    num_frames, rows, columns = shape
    if flat.shape[1] != num_frames * rows * columns:
        raise DataError(
            f"{flat.shape[1]} tokens do not fill a grid of {num_frames}x{rows}x{columns}, which has "
            f"{num_frames * rows * columns}."
        )
    return rearrange(flat, "b (t h w) -> b t h w", t=num_frames, h=rows, w=columns)


def places(shape: Shape, batch_size: int, device: torch.device | str | None = None) -> Places:
    """The places of all tokens of a grid `shape` (T', H', W'), for each of `batch_size` samples."""
    cells = cell_coordinates(shape, batch_size, device)[:, 1:].long()  # (B, 3, L) frame, row, column -> row, column
    positions = torch.arange(cells.shape[2], device=device).expand(batch_size, -1)
    return Places(positions, cells)


def first_tokens(ar: Any, start: str | Sequence[str], batch_size: int, device: torch.device | str | None = None) -> Tensor:
    """The token before the first of each window, `(B, 1)` int64.

    Args:
        ar: the model, which has `start_token` and `continue_token`.
        start: `start` (the window begins a video) or `continue` (it begins inside of one), for all samples or one a sample.
        batch_size: B.
        device: of the result.

    Raises:
        ConfigError: another word, or words for another number of samples.
    """
    words = [start] * batch_size if isinstance(start, str) else list(start)
    if len(words) != batch_size or any(word not in STARTS for word in words):
        raise ConfigError(
            f"start is {start!r}: give `start` or `continue`, for all samples or one for each of the {batch_size}."
        )
    ids = {"start": ar.start_token, "continue": ar.continue_token}
    return torch.tensor([[ids[word]] for word in words]).to(device, non_blocking=True)


def check_range(name: str, values: Tensor, end: int, rule: str) -> None:
    """Refuse numbers that no row of a table has, where they lie on the CPU: on a GPU the host would have to wait for them.

    Args:
        name: of the numbers.
        values: whole numbers of any shape.
        end: they lie in 0 ... `end` - 1.
        rule: what has so many rows, and what to do; the end of the message.

    Raises:
        DataError: one lies outside.
    """
    if values.device.type != "cpu" or not values.numel():
        return
    lowest, highest = (int(value) for value in values.aminmax())
    if lowest < 0 or highest >= end:
        raise DataError(f"{name} from {lowest} to {highest}, but {rule}")


def inputs_of(ar: Any, indices: Tensor, start: str | Sequence[str] = "start") -> ARInputs:
    """The inputs that predict all of `indices`, and the targets.

    Args:
        ar: an `ARTransformer`.
        indices: `(B, T', H', W')` int64, those of one window.
        start: see `first_tokens`.

    Raises:
        ConfigError: see `first_tokens`.
        DataError: `indices` is no grid of whole numbers, or has ids (seen on the CPU) that are not in the vocabulary.
    """
    if indices.ndim != 4 or indices.is_floating_point():
        raise DataError(
            f"indices have shape {tuple(indices.shape)} and type {indices.dtype}; an AR model takes (B, T', H', W') of whole "
            "numbers, those of one codebook."
        )
    vocab_size = ar.config.vocab_size
    rule = (
        f"the ar model has a vocabulary of {vocab_size}, ids 0 to {vocab_size - 1}: these tokens are another tokenizer's. "
        "Encode the clips again with the one of this training."
    )
    check_range("token ids", indices, vocab_size, rule)
    targets = flatten(indices).long()
    batch_size, num_frames, rows, columns = indices.shape
    where = places((num_frames, rows, columns), batch_size, indices.device)
    first = first_tokens(ar, start, batch_size, indices.device)
    return ARInputs(torch.cat([first, targets[:, :-1]], dim=1), where.positions, where.cells, targets)
