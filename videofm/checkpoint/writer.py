"""Files that are hashed while they are written, and on disk when the call returns.

safetensors' own `save_file` makes a second copy of all tensors in memory, and a hash would read the file again. The format is
plain: the length of a header (8 bytes, little-endian), the header in JSON, padded with spaces to 8 bytes, and the tensors one
behind the other (https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from videofm.checkpoint.record import FileEntry
from videofm.errors import CheckpointError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes in the words of safetensors."""
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_PIECE = 16 << 20
"""Bytes that are hashed and written at a time."""


@dataclass
class Progress:
    """How far a save is.

    Attributes:
        pieces: of this process: moves with each piece that a file took, and each flush.
        others: moves each time that another rank, which this one waits for, is heard to have written more.
    """

    pieces: int = 0
    others: int = 0


PROGRESS = Progress()
"""Whoever waits for a thread that writes sees by it whether the save goes on."""


def write_durably(path: Path, pieces: Iterable[bytes | memoryview]) -> FileEntry:
    """Write a new file and flush it to disk; its folder is made where there is none, and not flushed. Returns size and hash.

    Raises:
        OSError: it exists, or the disk is full or fails.
    """
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for piece in pieces:
            for start in range(0, len(piece), _PIECE):
                part = piece[start : start + _PIECE]
                file.write(part)
                digest.update(part)
                PROGRESS.pieces += 1
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    PROGRESS.pieces += 1
    return FileEntry(size, digest.hexdigest())


def write_tensors(path: Path, layout: Mapping[str, tuple[str, Sequence[int]]], tensor_of: Callable[[str], Tensor]) -> FileEntry:
    """Write a new safetensors file as `write_durably` does; its tensors are asked for one by one, when their turn comes.

    Args:
        path: the file.
        layout: name of each tensor -> dtype in the words of safetensors (`dtype_name`), and shape.
        tensor_of: gives a tensor by its name, on the CPU.

    Raises:
        CheckpointError: a dtype that is not known here.
        OSError: see `write_durably`.
    """
    if unknown := sorted({dtype for dtype, _ in layout.values()} - set(_DTYPES)):
        raise CheckpointError(f"{path.name}: tensors of the dtype {unknown[0]} cannot be written; known: {', '.join(_DTYPES)}")
    return write_durably(path, _safetensors(layout, tensor_of))


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype in the words of safetensors: `F32`; in torch's own where safetensors has none."""
    return _NAMES.get(dtype, str(dtype))


def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return dtype.itemsize * math.prod(shape)


def _safetensors(
    layout: Mapping[str, tuple[str, Sequence[int]]], tensor_of: Callable[[str], Tensor]
) -> Iterator[bytes | memoryview]:
    """The content of the file, with wide types first, so that each tensor lies at a multiple of its width."""
    order = sorted(layout, key=lambda name: (-_DTYPES[layout[name][0]].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = layout[name]
        start, end = end, end + num_bytes(shape, _DTYPES[dtype])
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        tensor = tensor_of(name)
        assert (dtype_name(tensor.dtype), *tensor.shape) == (layout[name][0], *layout[name][1]), name
        # One dim: a memory view of bytes has no other.
        yield memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
