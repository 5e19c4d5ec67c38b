"""Who writes what: balanced, and never more in one place than a share and a tensor."""

from __future__ import annotations

import random
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from videofm.checkpoint.balance import balance
from videofm.checkpoint.content import Content, HostBuffers, StoredTensor, owners_of, replicated, tensor_files


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_ranks_get_as_much_to_the_largest_piece(num_ranks: int) -> None:
    """The last piece that the fullest rank got went to the emptiest of that moment, so they differ by that piece at most."""
    draws = random.Random(num_ranks)
    for _ in range(50):
        sizes = [draws.choice([0, 1, 7, 100, 4096]) for _ in range(draws.randint(1, 40))]
        owners = balance(sizes, num_ranks)
        loads = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(num_ranks)]
        assert sum(loads) == sum(sizes) and max(loads) - min(loads) <= max(sizes)


def test_weights_of_a_transformer_are_shared_evenly() -> None:
    """Twenty blocks of four matrices over three ranks: within 5% of a third each."""
    stored = [
        replicated("models/dit/model", f"blocks.{block}.{name}", torch.empty(shape, device="meta"))
        for block in range(20)
        for name, shape in {"qkv": (64, 192), "out": (64, 64), "up": (64, 256), "norm": (64,)}.items()
    ]
    owners = owners_of(stored, 3)
    loads = [sum(tensor.num_bytes for tensor, owner in zip(stored, owners, strict=True) if owner == rank) for rank in range(3)]
    assert max(loads) < 1.05 * sum(loads) / 3
    (parts,) = tensor_files(stored, owners).values()
    assert [part.owner for part in parts] == [0, 1, 2] and sorted(name for part in parts for name in part.names) == sorted(
        tensor.name for tensor in stored
    )


def test_a_rank_holds_its_share_and_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that exist only while they are brought: at no time are there two of them, nor buffers beyond the share."""
    alive: set[int] = set()
    most = 0

    def stored(number: int) -> StoredTensor:
        def bring(to: int | None) -> Tensor | None:
            nonlocal most
            if to != rank:
                return None
            whole = torch.full((number + 1, 4), float(number))
            alive.add(number)
            weakref.finalize(whole, alive.discard, number)
            most = max(most, len(alive))
            return whole

        return StoredTensor("models/dit/model", f"{number}", (number + 1, 4), torch.float32, bring)

    made = Content([stored(number) for number in range(9)], {})
    shares = []
    for rank in range(3):
        buffers = HostBuffers()
        staged = buffers.stage(made, rank, 3)
        held: Any = buffers._buffers
        shares.append(sum(buffer.nbytes for buffer in held.values()))
        assert staged.num_bytes == shares[-1]
        assert all((tensor == float(name)).all() for own in staged.tensors.values() for name, tensor in own.items())
    assert most <= 2, "one that is brought, one that the loop still names"
    assert sum(shares) == sum(tensor.num_bytes for tensor in made.tensors) and max(shares) - min(shares) <= 9 * 16


def test_buffers_are_used_again() -> None:
    weight = torch.ones(5)
    buffers = HostBuffers()
    first = buffers.stage(Content([replicated("file", "weight", weight)], {}), 0, 1).tensors["file.safetensors"]["weight"]
    weight.fill_(2)
    assert first.eq(1).all(), "a copy"
    second = buffers.stage(Content([replicated("file", "weight", weight)], {}), 0, 1).tensors["file.safetensors"]["weight"]
    assert second.data_ptr() == first.data_ptr() and second.eq(2).all()
    other = buffers.stage(Content([replicated("file", "weight", torch.ones(6))], {}), 0, 1).tensors["file.safetensors"]
    assert other["weight"].shape == (6,), "another shape takes another buffer"


@pytest.mark.parametrize("pinned", [True, False])
def test_only_buffers_that_are_kept_are_pinned(monkeypatch: pytest.MonkeyPatch, pinned: bool) -> None:
    """torch never gives pinned memory back. A CPU has none to give: what is asked for is written down."""
    asked: list[bool] = []

    class OnGpu(Tensor):
        is_cuda = True  # type: ignore[assignment]

    def empty(*shape: Any, pin_memory: bool = False, **more: Any) -> Tensor:
        asked.append(pin_memory)
        return torch.zeros(*shape, **more)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stored = [replicated("file", "gpu", torch.ones(3).as_subclass(OnGpu)), replicated("file", "cpu", torch.ones(3))]
    HostBuffers(pinned).stage(Content(stored, {}), 0, 1)
    assert asked == [pinned, False]
