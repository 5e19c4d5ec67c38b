"""`run_distributed` gives results by rank, and tells which rank raised, died or hung."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers import run_distributed


def add_ranks(rank: int, world_size: int, start: float) -> torch.Tensor:
    value = torch.tensor([start + rank])
    dist.all_reduce(value)
    return value * (rank + 1)


def raise_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one is unwell")


def leave_on_one(rank: int, world_size: int, code: int) -> None:
    if rank == 1:
        os._exit(code)


def hang_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(600)


def test_results_come_by_rank() -> None:
    """Ranks bring 10 and 11, the sum is 21; rank 1 doubles it."""
    assert [value.item() for value in run_distributed(add_ranks, 2, 10.0)] == [21.0, 42.0]


def test_an_exception_is_reported() -> None:
    with pytest.raises(AssertionError, match="(?s)rank 1 of 2 raised:.*rank one is unwell"):
        run_distributed(raise_on_one, 2)


@pytest.mark.parametrize("code", [7, 0])
def test_a_rank_that_leaves_is_reported(code: int) -> None:
    with pytest.raises(AssertionError, match=rf"ranks \[1\] died with exit codes \[{code}\]"):
        run_distributed(leave_on_one, 2, code)


def test_a_hang_ends() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[1\] were not done after 8.0 s"):
        run_distributed(hang_on_one, 2, timeout=8.0)
