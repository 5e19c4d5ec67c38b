"""Files that are hashed on the way, in the format of safetensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from videofm.checkpoint import writer
from videofm.errors import CheckpointError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def write(path: Path, tensors: dict[str, Tensor]) -> writer.FileEntry:
    layout = {name: (writer.dtype_name(tensor.dtype), tensor.shape) for name, tensor in tensors.items()}
    return writer.write_tensors(path, layout, tensors.__getitem__)


def test_safetensors_reads_every_dtype(tmp_path: Path) -> None:
    """Every dtype, a scalar, an empty tensor, and a transposed one; each at a multiple of its width."""
    values = torch.arange(-3, 9).reshape(3, 4)
    tensors = {f"of {dtype}": values.to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "transposed": values.t().float()}
    entry = write(tmp_path / "file.safetensors", tensors)
    found = load_file(tmp_path / "file.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items())
    content = (tmp_path / "file.safetensors").read_bytes()
    assert (entry.bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for name, placed in json.loads(content[8 : 8 + length]).items():
        assert name == "__metadata__" or placed["data_offsets"][0] % tensors[name].element_size() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_of_one_dtype_is_that_of_safetensors_to_the_byte(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: torch.randn(3, size).to(dtype) for size, name in enumerate(("b", "a", "c.10", "c.9"), 1)}
    write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_large_pieces_are_hashed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece is cut for writing: every byte is hashed and written once, in order."""
    monkeypatch.setattr(writer, "_PIECE", 7)
    content = bytes(range(100))
    entry = writer.write_durably(tmp_path / "file", [content[:30], memoryview(content[30:]), b""])
    assert (tmp_path / "file").read_bytes() == content
    assert (entry.bytes, entry.sha256) == (100, hashlib.sha256(content).hexdigest())


def test_a_file_that_is_there_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileExistsError):
        writer.write_durably(tmp_path / "file", [b"new"])
    assert (tmp_path / "file").read_text() == "old"


def test_a_dtype_that_the_format_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensors of the dtype torch.complex64 cannot be written; known: F64, F32"):
        write(tmp_path / "file.safetensors", {"weight": torch.zeros(2, dtype=torch.complex64)})
    assert not (tmp_path / "file.safetensors").exists()
