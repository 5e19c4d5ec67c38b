"""Rates by their definitions, and the peak of memory by memory that is really taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from videofm.train.speed import GIBI, TIMINGS, peak_memory, with_speed


def a_mesh(world_size: int) -> Any:
    return SimpleNamespace(world_size=world_size, device=torch.device("cpu"))


def test_rates_of_a_step() -> None:
    """8 samples of 100 tokens and 3 TFLOP each in 2 s on 4 ranks: 4 samples/s, 400 tokens/s, 12 TFLOP/s of all, 3 of a device,
    which is 0.75 of a peak of 4; 0.5 of the 2 s went to waiting."""
    metrics = {"loss": 0.5, "tokens": 100.0, "flops": 3e12}
    found = with_speed(metrics, 8, 2.0, 0.5, a_mesh(4), peak_tflops=4.0)
    assert found.keys() - set(TIMINGS) == {"loss", "tokens"} and set(TIMINGS) <= found.keys()
    assert found.pop("peak_memory") > 0
    assert found == {
        "loss": 0.5, "tokens": 100.0, "seconds": 2.0, "data_wait": 0.5, "data_wait_share": 0.25, "samples_per_second": 4.0,
        "tokens_per_second": 400.0, "tflops": 3.0, "mfu": 0.75,
    }  # fmt: skip


def test_only_what_is_known_is_told() -> None:
    """Without a peak there is no MFU; an objective that counts nothing has the rate of its samples alone."""
    assert "mfu" not in with_speed({"tokens": 1.0, "flops": 1e9}, 1, 1.0, 0.0, a_mesh(1))
    plain = with_speed({"loss": 1.0}, 1, 1.0, 0.0, a_mesh(1), peak_tflops=1.0)
    assert plain.keys() == {"loss", "seconds", "data_wait", "data_wait_share", "samples_per_second", "peak_memory"}


def test_peak_memory_is_in_bytes() -> None:
    """A quarter of a GiB more than this process ever held raises its peak by that, to a tenth."""
    before = peak_memory(torch.device("cpu"))
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * 4096
    size = before - resident + GIBI // 4
    taken = torch.ones(size, dtype=torch.uint8)
    grown = peak_memory(torch.device("cpu")) - before
    assert taken[-1] == 1 and grown == pytest.approx(GIBI / 4, rel=0.1)
