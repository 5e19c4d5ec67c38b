"""Files of a stored model, read with a message that says what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from videofm.errors import CheckpointError

_MAX_HEADER = 100_000_000
"""Bytes of a header from which safetensors itself takes a file for damaged."""


def weight_files(file: Path) -> list[Path]:
    """The safetensors files of the weights `file`: itself or, where it is not there and `file.index.json` is, its shards, which
    lie beside it, as on the hub of Hugging Face and in the checkpoints of several ranks. None where there is neither.

    Raises:
        CheckpointError: the index is damaged.
    """
    if file.is_file():
        return [file]
    index = file.with_name(f"{file.name}.index.json")
    if not index.is_file():
        return []
    try:
        return [index.with_name(name) for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index} is damaged: it must map names of tensors to files beside it ({error}).") from error


def read_weights(file: Path, device: str | torch.device) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of the shards of an index in its place, on `device`.

    Raises:
        CheckpointError: it does not exist, or is damaged.
    """
    tensors: dict[str, Tensor] = {}
    for part in weight_files(file) or [file]:
        if not part.is_file():
            raise CheckpointError(f"{part} does not exist.")
        try:
            tensors |= load_file(part, device=str(device))
        except SafetensorError as error:
            raise damaged(part, error) from error
    return tensors


def damaged(file: Path, error: SafetensorError) -> CheckpointError:
    """What is wrong with a file that safetensors refuses, as far as its size and its first bytes tell."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        if start == b"version ":
            reason = "it is a pointer of git-lfs in the place of the weights; run `git lfs pull`"
        elif (expected := _announced_size(start, opened)) is not None and expected > size:
            reason = f"its header announces {expected:,}: it was cut off; copy or download it again"
        else:
            reason = f"safetensors says: {error}; copy or download it again"
    return CheckpointError(f"{file} is damaged. It has {size:,} bytes; {reason}.")


def _announced_size(start: bytes, rest: IO[bytes]) -> int | None:
    """Bytes of a safetensors file by its own account (at least those of its header), or None if it gives none."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > _MAX_HEADER:
        return None
    header = rest.read(length)
    if len(header) < length:
        return 8 + length
    try:
        ends = [entry["data_offsets"][1] for key, entry in json.loads(header).items() if key != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return 8 + length + max(ends, default=0)


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: it is not JSON.
    """
    return parse_json(file.read_text(), str(file))


def parse_json(text: str, what: str) -> Any:
    """The value of JSON `text`; `what` names it in the message.

    Raises:
        CheckpointError: it is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{what} is damaged: {error}.") from error
