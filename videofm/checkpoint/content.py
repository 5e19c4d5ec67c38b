"""What is to be saved, before it is anywhere: whole tensors by name, of which each goes to the one rank that writes it.

Every rank has the same list, in the same order. A tensor that lies on several ranks in parts is brought to its owner when its
turn comes, so that a rank holds its own share of a checkpoint and one tensor more, never all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from videofm.checkpoint.balance import balance
from videofm.checkpoint.writer import num_bytes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        file: relative path without a suffix, as `models/dit/model`.
        name: of the tensor in that file.
        shape: of the whole.
        dtype: of the whole.
        bring: all ranks call it with the number of a rank, which gets the whole, or with None, and every rank does; the others
            get None. What it returns may be the live weight.
    """

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bring: Callable[[int | None], Tensor | None]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole."""
        return num_bytes(self.shape, self.dtype)


def replicated(file: str, name: str, value: Tensor) -> StoredTensor:
    """A tensor that every rank has."""
    return StoredTensor(file, name, tuple(value.shape), value.dtype, lambda _: value)


@dataclass(frozen=True)
class Content:
    """All of a checkpoint: tensors, and JSON values by relative path without a suffix. The same on every rank."""

    tensors: Sequence[StoredTensor]
    values: Mapping[str, Any]


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file of a checkpoint, as every rank knows it: relative path, the rank that writes it, names of tensors."""

    path: str
    owner: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Staged:
    """What one rank has to write.

    Attributes:
        tensors: relative path of a file of this rank -> its tensors, in host memory.
        values: relative path (with suffix) -> JSON value, indices of shards among them; the main rank writes them.
        folders: relative paths of the folders of all files of all ranks; the main rank makes them.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    values: Mapping[str, Any]
    folders: Sequence[str]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors of this rank."""
        return sum(tensor.nbytes for tensors in self.tensors.values() for tensor in tensors.values())


def owners_of(tensors: Sequence[StoredTensor], num_ranks: int) -> list[int]:
    """The rank that writes each tensor; all write about as many bytes."""
    return balance([tensor.num_bytes for tensor in tensors], num_ranks)


def tensor_files(tensors: Sequence[StoredTensor], owners: Sequence[int]) -> dict[str, list[TensorFile]]:
    """The files of each `file`: one, `NAME.safetensors`, or as many as it has owners, `NAME-00001-of-00004.safetensors`."""
    by_file: dict[str, dict[int, list[str]]] = {}
    for tensor, owner in zip(tensors, owners, strict=True):
        by_file.setdefault(tensor.file, {}).setdefault(owner, []).append(tensor.name)
    return {
        file: [
            TensorFile(_shard_name(file, number, len(shares)), owner, tuple(shares[owner]))
            for number, owner in enumerate(sorted(shares), 1)
        ]
        for file, shares in by_file.items()
    }


class HostBuffers:
    """Host memory for the tensors that this rank writes, kept from one checkpoint to the next until it is released."""

    def __init__(self, pinned: bool = False) -> None:
        """
        Args:
            pinned: pin what a GPU copies to, which is faster; torch keeps pinned memory for good, so this is for buffers that
                are never released.
        """
        self._pinned = pinned
        self._buffers: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def stage(self, content: Content, rank: int, num_ranks: int) -> Staged:
        """Copy what rank `rank` of `num_ranks` writes to host memory. All ranks call it; whatever happens to the weights
        afterwards, the copy stays as it is until the next call."""
        owners = owners_of(content.tensors, num_ranks)
        plan = tensor_files(content.tensors, owners)
        place = {(file, name): part.path for file, parts in plan.items() for part in parts for name in part.names}
        mine: dict[str, dict[str, Tensor]] = {}
        waits = False
        for tensor, owner in zip(content.tensors, owners, strict=True):
            whole = tensor.bring(owner)
            if owner != rank:
                continue
            assert whole is not None and whole.shape == tensor.shape and whole.dtype == tensor.dtype, tensor
            buffer = self._buffer(tensor, pinned=self._pinned and whole.is_cuda)
            buffer.copy_(whole, non_blocking=whole.is_cuda)
            waits |= whole.is_cuda
            mine.setdefault(place[tensor.file, tensor.name], {})[tensor.name] = buffer
        if waits:
            torch.cuda.synchronize()
        values = _values(content, plan)
        files = [*values, *(part.path for parts in plan.values() for part in parts)]
        return Staged(mine, values, sorted({str(PurePosixPath(file).parent) for file in files}))

    def release(self) -> None:
        """Give the memory back."""
        self._buffers.clear()

    def _buffer(self, tensor: StoredTensor, pinned: bool) -> Tensor:
        key = tensor.file, tensor.name
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return buffer


def _values(content: Content, plan: Mapping[str, Sequence[TensorFile]]) -> dict[str, Any]:
    """The JSON files by relative path: values, and for tensors in several files where each of them is."""
    sizes: dict[str, int] = {}
    for tensor in content.tensors:
        sizes[tensor.file] = sizes.get(tensor.file, 0) + tensor.num_bytes
    found = {f"{name}.json": value for name, value in content.values.items()}
    for file, parts in plan.items():
        if len(parts) > 1:
            where = {name: PurePosixPath(part.path).name for part in parts for name in part.names}
            found[f"{file}.safetensors.index.json"] = {"metadata": {"total_size": sizes[file]}, "weight_map": where}
    return found


def _shard_name(file: str, number: int, total: int) -> str:
    return f"{file}.safetensors" if total == 1 else f"{file}-{number:05d}-of-{total:05d}.safetensors"
