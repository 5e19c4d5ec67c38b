"""Tensors in safetensors files, read one at a time: `model.safetensors`, or shards beside a `model.safetensors.index.json`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from videofm.errors import CheckpointError, DataError
from videofm.run_dir import read_json

SUFFIX, INDEX = ".safetensors", ".safetensors.index.json"


class TensorFiles:
    """The tensors of one name in a folder. The files stay open until `close`; used as a context, it closes itself.

    Attributes:
        paths: the safetensors files, in order.
    """

    def __init__(self, folder: Path, name: str) -> None:
        """
        Args:
            folder: of a checkpoint, for one.
            name: path in it without a suffix, as `models/dit/model`.

        Raises:
            CheckpointError: there is neither a file nor an index, one of them is damaged, or they do not fit each other.
        """
        whole, index = folder / f"{name}{SUFFIX}", folder / f"{name}{INDEX}"
        if not whole.is_file() and not index.is_file():
            raise CheckpointError(f"{whole} is missing, and there is no {index.name} of shards either")
        shards = {} if whole.is_file() else shards_of(index)
        self.paths = sorted(set(shards.values())) or [whole]
        self._stack = ExitStack()
        try:
            opened = {path: self._open(path) for path in self.paths}
            self._file_of = {key: path for path, file in opened.items() for key in list(file.keys())}
            if shards and shards != self._file_of:
                wrong = sorted(key for key in {*shards, *self._file_of} if shards.get(key) != self._file_of.get(key))
                raise CheckpointError(f"{index} is damaged: {wrong[0]} does not lie where it says")
        except BaseException:
            self.close()
            raise
        self._opened = opened

    def keys(self) -> list[str]:
        """The names of the tensors, sorted."""
        return sorted(self._file_of)

    def tensor(self, key: str) -> Tensor:
        """A tensor, read now, on the CPU.

        Raises:
            CheckpointError: there is none of this name, or its file is damaged.
        """
        path = self._path(key)
        try:
            tensor: Tensor = self._opened[path].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
        return tensor

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header."""
        return tuple(self._opened[self._path(key)].get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """The dtype of a tensor in the words of the file: `F32`, `BF16`, `I64`."""
        return str(self._opened[self._path(key)].get_slice(key).get_dtype())

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, path: Path) -> Any:
        try:
            return self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error

    def _path(self, key: str) -> Path:
        if key not in self._file_of:
            raise CheckpointError(f"{self.paths[0]}{' and its other shards' * (len(self.paths) > 1)} have no tensor {key!r}")
        return self._file_of[key]


def shards_of(index: Path) -> dict[str, Path]:
    """The file of each tensor, by an index of shards; all lie beside it.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        names = read_json(index)["weight_map"]
        return {str(key): index.with_name(name) for key, name in names.items()}
    except DataError as error:
        raise CheckpointError(f"{index} is damaged: {error}") from None
    except (TypeError, KeyError, AttributeError, ValueError) as error:  # `with_name` takes no path
        raise CheckpointError(f"{index} is damaged: it must map names of tensors to files beside it ({error})") from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is damaged, or no safetensors file ({error}); `videofm checkpoint verify` tells more")
